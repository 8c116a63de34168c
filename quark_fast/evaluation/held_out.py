"""Before and after: held-out prompts, the same prefix, scorer and sampling on both sides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from quark_fast.data.row import Row
from quark_fast.evaluation.modes import HeldOut, Mode
from quark_fast.evaluation.perplexity import Nll, id_nll, text_fit, with_fit
from quark_fast.metrics import (
    Sample,
)
from quark_fast.model.policy import Policy
from quark_fast.rewards.reward import Reward
from quark_fast.rollout.sampling import Conditioning, Sampler, Sampling, kept_or_drawn
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.seeds import seed_for
from quark_fast.tasks.task import no_measures


def evaluate(
    policy: Policy,
    model: Any,
    reference: Any,
    reward: Reward,
    held_out: HeldOut,
    table: Sequence[Mode],
    sampling: Sampling,
    seed: int,
    measures: Callable[[Row, Sequence[int], float], dict[str, float]] = no_measures,
    sampler: Sampler = sample,
    nll: Nll | None = None,
    share: tuple[int, int] = (0, 1),
    kept: Callable[[Mode], Kept[list[Sample]]] = lambda _: Kept(),
) -> Iterator[tuple[str, list[Sample]]]:
    """Sample, score and measure every mode, a batch of prompts at a time.

    All modes share one seed: the same luck on both sides of every comparison.

    Args:
        model: the policy's frozen copy.
        reference: the untouched model, which samples for the mode "untouched".
        measures: the task's own, as ``Task.measures``.
        sampler: samples the untouched model, as ``rollout.sample`` does.
        nll: what the perplexity is computed from; default: ``id_nll`` under the reference.
        share: which of the batches, as of ``sample``.
        kept: the batches of a mode that were made before, and where more are kept.
    Yields:
        (name of the mode, its samples on the next few prompts).
    """
    nll = nll or id_nll(policy, reference, held_out.ids)
    for mode in table:
        source = reference if mode.untouched else model

        def measured(
            indices: list[int], drawn: list[list[list[int]]], mode: Mode = mode, source: Any = source
        ) -> list[Sample]:
            flat = [(i, completion) for i, group in zip(indices, drawn, strict=True) for completion in group]
            part = _measure(policy, reward, held_out, flat, measures, nll)
            if held_out.texts:
                fits = text_fit(policy, source, [held_out.texts[i] for i in indices], mode.conditioning)
                of_prompt = dict(zip(indices, fits, strict=True))
                part = [with_fit(one, *of_prompt[one.prompt_id]) for one in part]
            return part

        for part in kept_or_drawn(
            functools.partial(sampler if mode.untouched else sample, policy, source),
            held_out.ids,
            mode.conditioning,
            sampling,
            held_out.samples,
            seed_for(seed, "evaluation"),
            share,
            kept(mode),
            measured,
        ):
            yield mode.name, part


def first_completions(
    policy: Policy, model: Any, prompts: HeldOut, sampling: Sampling, seed: int
) -> Iterator[tuple[list[Row], list[str]]]:
    """What a reward is tried out on: (rows of prompts, a completion of each), of 4 and then of 60 prompts."""
    for number, some in enumerate((slice(0, 4), slice(4, 64))):
        rows, own_seed = prompts.rows[some], seed_for(seed, "check of the reward", number)
        some_ids = prompts.ids[some]
        for indices, drawn in sample(policy, model, some_ids, Conditioning(), sampling, 1, own_seed):
            yield (
                [rows[i] for i in indices],
                [policy.decode(one, some_ids[i]) for i, (one,) in zip(indices, drawn, strict=True)],
            )


def _measure(
    policy: Policy,
    reward: Reward,
    held_out: HeldOut,
    completions: Sequence[tuple[int, list[int]]],
    measures: Callable[[Row, Sequence[int], float], dict[str, float]],
    nll: Nll,
) -> list[Sample]:
    """Score and perplexity of completions, each with the index of its prompt."""
    texts = [policy.decode(completion, held_out.ids[i]) for i, completion in completions]
    rewards = reward([held_out.rows[i] for i, _ in completions], texts)
    fluency = nll([i for i, _ in completions], [completion for _, completion in completions], texts)
    return [
        Sample(
            prompt_id=i,
            prompt=held_out.rows[i]["prompt"],
            completion=text,
            score=None if np.isnan(value) else score(reward, float(value)),
            nll=total,
            tokens=tokens,
            measures={} if np.isnan(value) else measures(held_out.rows[i], completion, float(value)),
        )
        for (i, completion), text, value, (total, tokens) in zip(
            completions, texts, rewards, fluency, strict=True
        )
    ]


def score(reward: Reward, value: float) -> float:
    """What the tables show: the property (1 - reward) where the reward measures one, else the reward."""
    return value if reward.property is None else 1.0 - value
