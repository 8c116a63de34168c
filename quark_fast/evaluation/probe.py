"""How well the reward tokens tell good completions from bad ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quark_fast.evaluation.held_out import Completion, EncodedPrompts, EvaluationSetup
from quark_fast.evaluation.perplexity import ReferenceLogits, completion_nll, completion_nll_and_kl
from quark_fast.metrics import RankCorrelation, rank_correlation
from quark_fast.model.policy import Policy
from quark_fast.rollout.sampling import Conditioning, DrawnBatch
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.overlap import Begun

# (prompt, completion, reward) of each completion of a batch.
Drawn = list[tuple[Sequence[int], Sequence[int], float]]


# A look after each round, not a second evaluation: with 100 completions the standard error is 0.1.
PROBE_TOKENS = 2048
PROBE_PROMPTS = 64
PROBE_ROWS = 32  # completions of a batch on a CPU, each batch with a random generator of its own
FAR = 0.4  # nats a token; the defaults of toxicity and sentiment end at .14 to .23


@dataclass(frozen=True)
class Probe:
    """What the policy has learned, without sampling it.

    The rank correlation, over scored completions of held-out prompts by the base model, between the reward
    and log p(y | best token) - log p(y | worst token). 0: the tokens mean nothing yet.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]

    @staticmethod
    def draw(setup: EvaluationSetup, kept: Kept[Drawn] | None = None) -> list[tuple[str, Drawn]]:
        """("probe", batch) for one completion of each of the first held-out prompts that is scored.

        So many prompts that their completions hold ``PROBE_TOKENS`` tokens at most, but at least
        ``PROBE_PROMPTS``.
        """
        some = slice(max(PROBE_PROMPTS, PROBE_TOKENS // setup.sampling.max_new_tokens))
        held_out = EncodedPrompts(setup.held_out.rows[some], setup.held_out.ids[some], samples=1)
        setup = dataclasses.replace(setup, held_out=held_out)

        def with_reward(found: list[Completion]) -> Drawn:
            return [(list(held_out.ids[i]), ids, value) for i, ids, _, value in found if not np.isnan(value)]

        def scored(drawn: DrawnBatch) -> Begun[Drawn]:
            return setup.scored(setup.with_texts(drawn)).then(with_reward)

        batches = setup.draw("probe", setup.reference, Conditioning(), scored, kept)
        return list(setup.in_order(("probe", batch) for batch in batches))

    @classmethod
    def of(cls, drawn: Iterable[Drawn]) -> Probe:
        """A probe of what was drawn."""
        every = [one for batch in drawn for one in batch]
        return cls([p for p, _, _ in every], [c for _, c, _ in every], [r for _, _, r in every])

    def measure(
        self, policy: Policy, model: Any, reference: ReferenceLogits, rows: int = 0
    ) -> tuple[RankCorrelation, float]:
        """The rank correlation under the policy's frozen copy ``model``, and how far that has moved.

        The latter is the exact KL(policy under the best token || reference), nats, mean over the completions'
        tokens. The contexts are the base model's texts, the same for every policy: two of them compare
        without the luck of what each happens to write.
        """
        best, kl = completion_nll_and_kl(policy, model, reference, policy.quantiles - 1, rows)
        worst = completion_nll(policy, model, self.prompts, self.completions, 0, rows)
        return rank_correlation(np.subtract(worst, best), self.rewards), kl


def noise_note(found: RankCorrelation, kl: float) -> str:
    """What to tell of a model whose tokens mean nothing by a probe, the more if it has moved far; else ""."""
    if not found.value < found.standard_error:  # not a NaN's, either
        return ""
    note = "the reward tokens tell good from bad completions no better than chance so far"
    if kl > FAR:
        note += (
            f", and the model is {kl:.2f} nats a token away from the base model: it learns noise. More"
            " --initial-samples or a lower --learning-rate may help"
        )
    return note
