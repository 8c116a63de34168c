"""How well the reward tokens tell good completions from bad ones."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quark_fast.evaluation.modes import HeldOut
from quark_fast.evaluation.perplexity import completion_kl, completion_nll
from quark_fast.metrics import (
    RankCorrelation,
    rank_correlation,
)
from quark_fast.model.policy import Policy
from quark_fast.rewards.reward import Reward
from quark_fast.rollout.sampling import Conditioning, Sampler, SampleRequest, Sampling, kept_or_drawn
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.seeds import seed_for

# (prompt, completion, reward) of each completion of a batch.
Drawn = list[tuple[Sequence[int], Sequence[int], float]]


PROBE_TOKENS = 8192  # a look after each round, not a second evaluation


@dataclass(frozen=True)
class Probe:
    """What the policy has learned, without sampling it.

    The rank correlation, over scored completions of held-out prompts by the untouched model, between the
    reward and log p(y | best token) - log p(y | worst token). 0: the tokens mean nothing yet.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]

    @staticmethod
    def draw(
        policy: Policy,
        reference: Any,
        reward: Reward,
        held_out: HeldOut,
        sampling: Sampling,
        seed: int,
        sampler: Sampler = sample,
        share: tuple[int, int] = (0, 1),
        kept: Kept[Drawn] | None = None,
    ) -> list[tuple[str, Drawn]]:
        """("probe", batch) for one completion of each of the first held-out prompts that is scored.

        So many prompts that their completions hold ``PROBE_TOKENS`` tokens at most, but 32 at least.

        Args:
            share: which of the batches, as of ``sample``.
        """
        ids = held_out.ids[: max(32, PROBE_TOKENS // sampling.max_new_tokens)]

        def scored(indices: list[int], drawn: list[list[list[int]]]) -> Drawn:
            texts = [policy.decode(one, held_out.ids[i]) for i, (one,) in zip(indices, drawn, strict=True)]
            rewards = reward([held_out.rows[i] for i in indices], texts)
            return [
                (list(held_out.ids[i]), completion, float(value))
                for i, (completion,), value in zip(indices, drawn, rewards, strict=True)
                if not np.isnan(value)
            ]

        draw = functools.partial(sampler, policy, reference)
        own_seed = seed_for(seed, "probe")
        request = SampleRequest(ids, Conditioning(), sampling, 1, own_seed, share)
        every = kept_or_drawn(draw, request, kept or Kept(), scored)
        return [("probe", batch) for batch in every]

    @classmethod
    def of(cls, drawn: Iterable[Drawn]) -> Probe:
        """A probe of what was drawn."""
        every = [one for batch in drawn for one in batch]
        return cls([p for p, _, _ in every], [c for _, c, _ in every], [r for _, _, r in every])

    def measure(self, policy: Policy, model: Any) -> RankCorrelation:
        """The rank correlation under the policy's frozen copy ``model``."""
        best, worst = (
            completion_nll(policy, model, self.prompts, self.completions, quantile)
            for quantile in (policy.quantiles - 1, 0)
        )
        return rank_correlation(np.subtract(worst, best), self.rewards)

    def kl(self, policy: Policy, model: Any, reference: Any) -> float:
        """Exact KL(policy under the best token || reference), nats, mean over the completions' tokens.

        The contexts are the untouched model's texts, the same for every policy: two of them compare without
        the luck of what each happens to write.
        """
        best = policy.quantiles - 1
        return completion_kl(policy, model, reference, self.prompts, self.completions, best)
