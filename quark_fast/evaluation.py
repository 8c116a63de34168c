"""Before and after: held-out prompts, the same prefix, scorer and sampling on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quark_fast.batch import completion_logits, make_batch
from quark_fast.metrics import (
    RankCorrelation,
    Sample,
    as_json,
    compare,
    evaluate_samples,
    rank_correlation,
)
from quark_fast.ops.loss import quark_loss
from quark_fast.policy import Policy
from quark_fast.prompts import Row
from quark_fast.reward import Reward
from quark_fast.rollout import Conditioning, Sampling, sample


@dataclass(frozen=True)
class Mode:
    """One row of the table: a name, whose logits, and what stands before the prompt."""

    name: str
    conditioning: Conditioning
    untouched: bool = False

    @property
    def guidance(self) -> float | None:
        """Place on the curve over w: the worst token is 0, the best 1; None is off the curve."""
        if self.conditioning.quantile is None:
            return None
        if self.conditioning.against is not None:
            return self.conditioning.guidance
        return 0.0 if self.conditioning.quantile == 0 else 1.0


def modes(quantiles: int, guidance: Sequence[float]) -> list[Mode]:
    """Untouched, best, guided by each w, worst, no token."""
    best = quantiles - 1
    guided = [Mode(f"guided w={w:g}", Conditioning(best, 0, w)) for w in guidance if w != 1.0]
    return [
        Mode("untouched", Conditioning(), untouched=True),
        Mode("best token", Conditioning(best)),
        *guided,
        Mode("worst token", Conditioning(0)),
        Mode("no token", Conditioning()),
    ]


@dataclass(frozen=True)
class HeldOut:
    """Prompts to evaluate on: rows (for the reward), token ids, and completions wanted of each."""

    rows: Sequence[Row]
    ids: Sequence[Sequence[int]]
    samples: int


def evaluate(
    policy: Policy,
    model: Any,
    reference: Any,
    reward: Reward,
    held_out: HeldOut,
    table: Sequence[Mode],
    sampling: Sampling,
    seed: int,
) -> Iterator[tuple[str, list[Sample]]]:
    """Sample, score and measure every mode, a batch of prompts at a time.

    All modes share one seed: the same luck on both sides of every comparison.

    Args:
        model: the policy's frozen copy.
        reference: the untouched model. It samples for the mode "untouched", and the perplexity of every
            completion is measured under it: prefix and prompt in front, no reward token.
    Yields:
        (name of the mode, its samples on the next few prompts).
    """
    for mode in table:
        source = reference if mode.untouched else model
        for indices, drawn in sample(
            policy, source, held_out.ids, mode.conditioning, sampling, held_out.samples, 1_000_003 * seed + 7
        ):
            flat = [(i, completion) for i, group in zip(indices, drawn, strict=True) for completion in group]
            yield mode.name, _measure(policy, reference, reward, held_out, flat)


def _measure(
    policy: Policy,
    reference: Any,
    reward: Reward,
    held_out: HeldOut,
    completions: Sequence[tuple[int, list[int]]],
) -> list[Sample]:
    """Score and perplexity of completions, each with the index of its prompt."""
    texts = [policy.decode(completion) for _, completion in completions]
    rewards = reward([held_out.rows[i] for i, _ in completions], texts)
    nll = completion_nll(
        policy, reference, [held_out.ids[i] for i, _ in completions], [c for _, c in completions]
    )
    return [
        Sample(
            prompt_id=i,
            prompt=held_out.rows[i]["prompt"],
            completion=text,
            score=None if np.isnan(value) else score(reward, float(value)),
            nll=total,
            tokens=len(completion),
        )
        for (i, completion), text, value, total in zip(completions, texts, rewards, nll, strict=True)
    ]


def score(reward: Reward, value: float) -> float:
    """What the tables show: the property (1 - reward) where the reward measures one, else the reward."""
    return value if reward.property is None else 1.0 - value


@torch.inference_mode()
def completion_nll(
    policy: Policy,
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantile: int | None = None,
    rows: int = 64,
) -> list[float]:
    """-log p of each completion under ``model``, nats, given the quantile's token (None: no token)."""
    totals: list[float] = []
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        quantiles = [quantile] * len(prompts[part])
        batch = make_batch(policy, prompts[part], completions[part], quantiles, model.device)
        out = quark_loss(
            completion_logits(model, batch),
            None,
            batch.labels,
            batch.mask,
            kl_coef=0.0,
            entropy_coef=0.0,
            vocab_size=policy.vocabulary,
        )
        totals += out.nll.sum(-1).tolist()
    return totals


@dataclass(frozen=True)
class Probe:
    """What the policy has learned, without sampling it.

    The rank correlation, over scored completions of held-out prompts by the untouched model, between the
    reward and log p(y | best token) - log p(y | worst token). 0: the tokens mean nothing yet.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    rewards: Sequence[float]

    @classmethod
    def draw(
        cls, policy: Policy, reference: Any, reward: Reward, held_out: HeldOut, sampling: Sampling, seed: int
    ) -> Probe:
        """One completion of every held-out prompt; unscored ones are left out."""
        kept: list[tuple[int, list[int], float]] = []
        for indices, drawn in sample(policy, reference, held_out.ids, Conditioning(), sampling, 1, seed):
            texts = [policy.decode(completion) for (completion,) in drawn]
            rewards = reward([held_out.rows[i] for i in indices], texts)
            for i, (completion,), value in zip(indices, drawn, rewards, strict=True):
                if not np.isnan(value):
                    kept.append((i, completion, float(value)))
        return cls([held_out.ids[i] for i, _, _ in kept], [c for _, c, _ in kept], [r for _, _, r in kept])

    def measure(self, policy: Policy, model: Any) -> RankCorrelation:
        """The rank correlation under the policy's frozen copy ``model``."""
        best, worst = (
            completion_nll(policy, model, self.prompts, self.completions, quantile)
            for quantile in (policy.quantiles - 1, 0)
        )
        return rank_correlation(np.subtract(worst, best), self.rewards)


def describe_evaluation(
    task: str, reward: Reward, policy: Policy, sampling: Sampling, prompts: int, samples: int
) -> dict[str, Any]:
    """What makes two tables comparable: task, scorer, sampling."""
    return {
        "task": task,
        "property": reward.property or "reward",
        "scorer": {"name": reward.name, "version": reward.version, "sha256": reward.sha256},
        "prompts": prompts,
        "samples_per_prompt": samples,
        "sampling": {
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "prefix": policy.tokenizer.decode(policy.prefix),
        },
    }


def summarise(
    samples: dict[str, list[Sample]], table: Sequence[Mode], about: dict[str, Any]
) -> dict[str, Any]:
    """``evaluation.json``: per mode its metrics, and the change against the first mode."""
    rows = []
    before = samples[table[0].name]
    for mode in table:
        after = samples[mode.name]
        change = None if after is before else compare(before, after)
        rows.append(
            {
                "name": mode.name,
                "guidance": mode.guidance,
                "metrics": {k: as_json(v) for k, v in evaluate_samples(after).items()},
                "change": None if change is None else {k: as_json(v) for k, v in change.items()},
            }
        )
    return {**about, "rows": rows}
