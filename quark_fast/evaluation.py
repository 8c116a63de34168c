"""Before and after: held-out prompts, the same prefix, scorer and sampling on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quark_fast.batch import completion_logits, make_batch
from quark_fast.metrics import Sample, as_json, compare, evaluate_samples
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


def evaluate_mode(
    mode: Mode,
    policy: Policy,
    model: Any,
    reference: Any,
    reward: Reward,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    samples: int,
    seed: int,
) -> Iterator[list[Sample]]:
    """Sample, score and measure one mode; yields the samples of a batch of prompts at a time.

    Args:
        model: the policy's frozen copy.
        reference: the untouched model; it samples for the mode "untouched", and every completion's
            perplexity is measured under it: prefix and prompt in front, no reward token.
        rows, prompts: the held-out prompts as rows (for the reward) and as token ids.
    """
    source = reference if mode.untouched else model
    for indices, drawn in sample(policy, source, prompts, mode.conditioning, sampling, samples, seed):
        flat = [(i, completion) for i, group in zip(indices, drawn, strict=True) for completion in group]
        texts = [policy.decode(completion) for _, completion in flat]
        rewards = reward([rows[i] for i, _ in flat], texts)
        nll = reference_nll(policy, reference, [prompts[i] for i, _ in flat], [c for _, c in flat])
        yield [
            Sample(
                prompt_id=i,
                prompt=rows[i]["prompt"],
                completion=text,
                score=None if value != value else score(reward, float(value)),
                nll=total,
                tokens=len(completion),
            )
            for (i, completion), text, value, total in zip(flat, texts, rewards, nll, strict=True)
        ]


def score(reward: Reward, value: float) -> float:
    """What the tables show: the property (1 - reward) where the reward measures one, else the reward."""
    return value if reward.property is None else 1.0 - value


@torch.inference_mode()
def reference_nll(
    policy: Policy,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    rows: int = 64,
) -> list[float]:
    """Summed -log p of each completion under ``reference``, in nats, without a reward token."""
    totals: list[float] = []
    for start in range(0, len(prompts), rows):
        part = slice(start, start + rows)
        batch = make_batch(
            policy, prompts[part], completions[part], [None] * len(prompts[part]), reference.device
        )
        logits = completion_logits(reference, batch)
        out = quark_loss(
            logits,
            None,
            batch.labels,
            batch.mask,
            kl_coef=0.0,
            entropy_coef=0.0,
            vocab_size=policy.vocabulary,
        )
        totals += out.nll.sum(-1).tolist()
    return totals


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
                "change": change and {k: as_json(v) for k, v in change.items()},
            }
        )
    return {**about, "rows": rows}
