"""Learn: optimizer steps on samples under the token of their current quantile."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quark_fast.model.batch import Counts
from quark_fast.pool.pool import RolloutBatch
from quark_fast.runtime.distributed import LossModule, whole
from quark_fast.runtime.memory import within_memory
from quark_fast.training.objective import Terms, read_terms
from quark_fast.training.setup import Setup
from quark_fast.training.state import State


class Learner:
    """Makes the steps of a run."""

    def __init__(self, setup: Setup, wrapped: LossModule, optimizer: Any) -> None:
        self.config, self.objective = setup.config, setup.objective
        self.processes, self.accelerator = setup.processes, setup.accelerator
        self.wrapped, self.optimizer = wrapped, optimizer

    @torch.enable_grad()  # which a notebook may have switched off for all its cells
    def step(self, state: State, batch: RolloutBatch, smaller: Callable[[int], None]) -> dict[str, Any]:
        """One optimizer step; micro-batches add up to exactly the loss of the whole batch.

        Args:
            smaller: called with the new micro-batch where the memory did not suffice for the old one.
        Returns:
            Numbers for the step's row of metrics.jsonl; ``skipped_for`` names what was not finite.
        Raises:
            OutOfMemory: not even one sample fits.
        """
        started = time.monotonic()
        self.objective.kl_coef = state.kl.coef
        terms, state.micro_batch = within_memory(
            functools.partial(self._gradient, batch),
            state.micro_batch,
            smaller,
            self.processes.lacked_memory,
        )
        decay = self.config.decay(state.step - state.earlier_steps, self.config.rounds - state.left_out)
        sums, norm, bad = self._update(state, terms, decay, len(batch.completions))
        seconds = time.monotonic() - started
        numbers: dict[str, Any] = {
            **sums,
            **({"kl_coef": self.objective.kl_coef} if self.config.kl_target else {}),
            "grad_norm": norm,
            "lr": self.config.step_size * decay,
            "tokens_per_s": sum(map(len, batch.completions)) / seconds,
            "seconds": seconds,
        }
        numbers = {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # JSON has no NaN
        if state.bad_steps.skipped:
            numbers["skipped"] = state.bad_steps.skipped
        return numbers if bad is None else numbers | {"skipped_for": bad}

    def _gradient(self, batch: RolloutBatch, micro_batch: int) -> list[Terms]:
        """Add up the gradient of this process's samples; the terms of each micro-batch, not read yet."""
        self._forget_gradients()  # of an attempt that ran out of memory
        # Each process takes its samples over the whole batch's counts times its share of them: the mean over
        # processes, which is what DDP and FSDP2 make of gradients, is then the loss of the whole batch.
        counts = Counts.of(batch.prompts, batch.completions, 1 / self.processes.count)
        own = self.processes.part(np.arange(len(batch.completions)))
        every: list[Terms] = []
        for start in range(0, len(own), micro_batch):
            part = own[start : start + micro_batch]
            compute = functools.partial(
                self.objective,
                [batch.prompts[i].tolist() for i in part],
                [batch.completions[i].tolist() for i in part],
                batch.quantiles[part].tolist(),
                counts,
            )
            with self.processes.accumulating(self.accelerator, self.wrapped):
                loss, terms = self.wrapped(compute)
                self.accelerator.backward(loss)
            every.append(terms)
        return every

    def _update(
        self, state: State, terms: list[Terms], decay: float, samples: int
    ) -> tuple[dict[str, float], float, str | None]:
        """Clip the gradient and move the weights, unless a term is not finite.

        Returns:
            (the terms of the whole batch's loss, the gradient's norm, the term that is not finite).
        """
        rates = (self.config.step_size, self.config.reward_token_lr)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        sums, norm = self._read(terms)
        scaler = self.accelerator.scaler
        bad = state.bad_steps.judge(sums, norm, scaler and scaler.get_scale())
        if bad is None:
            self.optimizer.step()
            if self.config.kl_target and math.isfinite(norm):  # else fp16's scaler skips the step
                state.kl.update(sums["kl"], samples)
        elif scaler is not None:
            scaler.update()  # else it would refuse the next gradient
        self._forget_gradients()
        return sums, norm, bad

    def _read(self, terms: list[Terms]) -> tuple[dict[str, float], float]:
        """The terms of the whole batch's loss, and the norm of its gradient, which is then clipped.

        By one read, at which a GPU is waited for. Where gradients are still to be averaged by two: before,
        DeepSpeed has to know whether the terms are finite.
        """
        if not (self.processes.replicated or self.processes.zero):
            found = read_terms([*terms, {"norm": (self._clip(), 1.0)}])
            norm = found.pop("norm")
            return self.processes.mean(found), norm
        sums = self.processes.mean(read_terms(terms))
        finite = all(map(math.isfinite, sums.values()))
        self.processes.average_gradients(self.accelerator, self.wrapped, finite)
        return sums, float(self._clip())

    def _clip(self) -> Any:
        """Clip the gradient; its norm before."""
        # In the model's own order, by which accelerate recognises the parameters that it has sharded.
        parameters = list(self.wrapped.parameters())
        return whole(self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm))

    def _forget_gradients(self) -> None:
        # DDP's gradients lie in buffers that it keeps: others beside them would take as much again.
        self.optimizer.zero_grad(set_to_none=not self.processes.replicated)
