"""The parts of a run, as ``start.py`` has loaded them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from quark_fast.config import Config
from quark_fast.evaluation.held_out import (
    EncodedPrompts,
    EvaluationSetup,
    evaluation_sampling,
)
from quark_fast.metrics import FEWEST_PROMPTS
from quark_fast.model.check_model import Checked
from quark_fast.model.copies import SharedCopy
from quark_fast.model.policy import Policy
from quark_fast.report.columns import intervals_note
from quark_fast.rewards.reward import Reward
from quark_fast.rollout.sampling import Sampler, Sampling
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.tasks.task import Task
from quark_fast.training.objective import Objective
from quark_fast.training.run_prompts import RunPrompts


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
        saved: config.yaml as the last start left it; of a new run, ``config``.
        sampling_dtype: of frozen copies, which sample and evaluate.
        copied: the one of the policy as it is, for the probe and the next round's samples.
        base: what tells the base model's weights from others, see ``start.base_digest``.
    """

    config: Config
    folder: RunFolder
    processes: Processes
    accelerator: Accelerator
    saved: Config
    task: Task
    prompts: RunPrompts
    reward: Reward
    judges: tuple[Reward, ...]
    controls: list[list[int]]
    policy: Policy
    reference: Any
    sampling_dtype: torch.dtype
    copied: SharedCopy
    checked: Checked
    objective: Objective
    base: str

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def batch_rows(self) -> int:
        """Completions of a batch, each with a random generator, which a resume does not change."""
        return self.saved.sample_batch

    def in_words(self) -> list[str]:
        """A line each: the model, what was left out of the prompts, unusual settings, how many prompts."""
        config, prompts = self.config, self.prompts
        counts = (
            f"{len(prompts.train)} training and {len(prompts.held_out.rows)} held-out prompts, none longer"
            f" than {self.policy.room_of(config):,} tokens, reward {self.reward.name},"
            f" {config.precision} on {self.device}, run folder {self.folder.path}"
        )
        held_out = len(prompts.held_out.rows)
        few = f"held out: {intervals_note(held_out)}" if held_out < FEWEST_PROMPTS and config.eval else ""
        lines = ("; ".join(self.checked.lines), "; ".join(prompts.notes), *config.remarks(), counts, few)
        return [line for line in lines if line]

    def round_sampling(self, round: int) -> Sampling:
        """How the completions of a round are drawn."""
        config = self.config
        drawn = Sampling(
            config.max_new_tokens, config.min_new_tokens, config.temperature_of(round), config.top_p
        )
        return in_batches(drawn, self.batch_rows, config)

    def held_out_sampling(self) -> Sampling:
        """How the completions of the evaluation are drawn."""
        return in_batches(evaluation_sampling(self.config), self.batch_rows, self.config)

    def measured_on(
        self,
        prompts: EncodedPrompts,
        sampling: Sampling,
        sampler: Sampler = sample,
    ) -> EvaluationSetup:
        """What an evaluation on these prompts samples, of which this process its part, and is scored by."""
        return EvaluationSetup(
            self.policy,
            self.reference,
            self.reward,
            prompts,
            sampling,
            self.config.seed,
            sampler,
            self.processes.shard,
            self.judges,
            self.controls,
            self.task.shows("prompt_fit"),
            self.config.read_batch,
        )


def in_batches(sampling: Sampling, rows: int, config: Config) -> Sampling:
    """In batches of ``rows``, decoded and no more completions side by side as the settings say."""
    asked = config.sample_at_once
    at_once = min(asked or rows, config.sample_batch, rows)
    at_once = at_once if asked or at_once < rows else 0
    return dataclasses.replace(sampling, rows=rows, at_once=at_once, decoding=config.decoding)
