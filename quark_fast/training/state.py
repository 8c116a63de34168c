"""What a run has come to: everything that changes while it trains, but weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch

from quark_fast.config import Config
from quark_fast.pool.pool import RolloutPool
from quark_fast.pool.tokens import Ints
from quark_fast.training.stability import BadSteps, KLController


@dataclass(frozen=True)
class MeasuredRound:
    """What a round came to on development prompts.

    Attributes:
        round: from 1; 0 is the base model.
        measures: by name; NaN where there is no value.
        trained: quantiles whose reward token had been trained by then, in order.
        sha256: of its weights in the run folder; "": they were not kept.
    """

    round: int
    measures: Mapping[str, float]
    trained: tuple[int, ...] = ()
    sha256: str = ""

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """As ``vars`` gives it, from a checkpoint."""
        measures = {str(name): float(value) for name, value in saved["measures"].items()}
        return cls(int(saved["round"]), measures, tuple(map(int, saved["trained"])), str(saved["sha256"]))


def first_micro_batch(config: Config, processes: int, device: torch.device) -> int:
    """Samples a forward pass of each of so many processes, as long as the memory suffices."""
    return min(config.samples_a_pass(device.type == "cpu"), config.batch_size // processes)


@dataclass
class State:
    """Saved in every checkpoint, and the same on every process.

    Attributes:
        pool: the scored samples.
        prompt_of: index of each sample's training prompt.
        draws: how often each sample was drawn.
        kl: controls the weight of the KL.
        bad_steps: how many steps were skipped.
        micro_batch: samples a forward pass, as many as the memory sufficed for.
        earlier_rounds, earlier_steps: of the run that this one is trained on from; its own count from there.
        round, sampled: the current round, from 0, and whether its samples are in the pool.
        step: optimizer steps made.
        left_out: rounds without steps, since all rewards were equal.
        trained: quantiles whose reward token has been trained.
        seconds: what the run took so far.
        measured: the base model, then every round, on development prompts, if rounds are compared.
    """

    pool: RolloutPool
    kl: KLController
    micro_batch: int
    prompt_of: list[int] = field(default_factory=list)
    draws: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    bad_steps: BadSteps = field(default_factory=BadSteps)
    earlier_rounds: int = 0
    earlier_steps: int = 0
    round: int = 0
    sampled: bool = False
    step: int = 0
    left_out: int = 0
    trained: set[int] = field(default_factory=set)
    seconds: float = 0.0
    measured: list[MeasuredRound] = field(default_factory=list)

    @classmethod
    def new(cls, config: Config, processes: int, device: torch.device) -> State:
        """Of a run that begins."""
        return cls(
            pool=RolloutPool(quantiles=config.quantiles, ties=config.ties, seed=config.seed),
            kl=KLController(config.kl_coef, config.kl_target, config.kl_horizon),
            micro_batch=first_micro_batch(config, processes, device),
        )

    def first_step(self, config: Config) -> int:
        """Steps that were made before this round."""
        return self.earlier_steps + (self.round - self.earlier_rounds - self.left_out) * config.steps

    def all_rounds(self, config: Config) -> int:
        """Rounds that there are when the run ends, those before it included."""
        return self.earlier_rounds + config.rounds
