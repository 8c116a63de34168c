"""Which class the base model's completions put a prompt into."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from quark_fast.evaluation.modes import HeldOut
from quark_fast.model.policy import Policy
from quark_fast.rewards.reward import Reward
from quark_fast.rollout.sampling import Conditioning, Sampler, SampleRequest, Sampling, kept_or_drawn
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.journal import Kept
from quark_fast.runtime.seeds import seed_for

CLASS_SAMPLES = 25


def prompt_class(positive: float) -> str:
    """The class of a prompt by its share of positive completions: negative, neutral or positive."""
    # The paper's 0, 12 or 13, and 25 of 25 fall into the middle of these. VADER's shares lie closer together.
    return "negative" if positive <= 0.4 else "positive" if positive >= 0.6 else "neutral"


def classify_prompts(
    policy: Policy,
    reference: Any,
    reward: Reward,
    held_out: HeldOut,
    sampling: Sampling,
    seed: int,
    target: str,
    sampler: Sampler = sample,
    share: tuple[int, int] = (0, 1),
    kept: Kept[list[tuple[int, str]]] | None = None,
) -> Iterator[tuple[int, str]]:
    """Sort prompts as the paper does, by how many of 25 completions of the untouched model are positive.

    The paper keeps the prompts with 0, 12 or 13, and 25 of them (Liu et al., "DExperts", 2021); here each
    prompt has a class, see ``prompt_class``, and a completion that the reward puts at exactly 0.5 counts
    half. The samples are not those of the evaluation, whose untouched row would else owe its numbers to the
    choice. A row with a ``num_positive``, DExperts' own count, is believed.

    Args:
        sampling: as in the evaluation; if that is greedy, at temperature 1.
        target: "positive" or "negative", the sentiment whose reward it is.
        share: which of the batches, as of ``sample``.
    Yields:
        (index of the prompt, its class), by ``num_positive`` first.
    """
    sampling = dataclasses.replace(sampling, temperature=sampling.temperature or 1.0)
    counted = {i: float(row["num_positive"]) for i, row in enumerate(held_out.rows) if "num_positive" in row}
    for i, number in counted.items():
        yield i, prompt_class(number / CLASS_SAMPLES)
    open_ids = [i for i in range(len(held_out.ids)) if i not in counted]
    prompts = [held_out.ids[i] for i in open_ids]

    def classes(places: list[int], drawn: list[list[list[int]]]) -> list[tuple[int, str]]:
        found = []
        for place, completions in zip(places, drawn, strict=True):
            row = held_out.rows[open_ids[place]]
            texts = [policy.decode(one, prompts[place]) for one in completions]
            rewards = reward([row] * len(completions), texts)
            having = np.where(rewards == 0.5, 0.5, rewards > 0.5)[~np.isnan(rewards)]
            positive = float(having.mean()) if len(having) else 0.5
            found.append((open_ids[place], prompt_class(positive if target == "positive" else 1 - positive)))
        return found

    for batch in kept_or_drawn(
        functools.partial(sampler, policy, reference),
        SampleRequest(
            prompts, Conditioning(), sampling, CLASS_SAMPLES, seed_for(seed, "prompt classes"), share
        ),
        kept or Kept(),
        classes,
    ):
        yield from batch
