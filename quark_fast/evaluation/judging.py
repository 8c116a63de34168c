"""Judges beside the reward: what scorers that took no part in training make of the completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from quark_fast.data.row import Row
from quark_fast.metrics import Sample, judge_measure
from quark_fast.rewards.reward import Reward


def judge_measures(
    judges: Sequence[Reward], rows: Sequence[Row], completions: Sequence[str]
) -> list[dict[str, float]]:
    """What each judge makes of completions of the rows' prompts, by ``judge_measure`` of its name.

    Of a judge of a property, as of a reward: 1 - its value. Where a judge is silent it is left out.
    """
    found: list[dict[str, float]] = [{} for _ in completions]
    for judge in judges:
        for numbers, value in zip(found, judge(rows, completions), strict=True):
            if not np.isnan(value):
                numbers[judge_measure(judge.name)] = float(value if judge.property is None else 1.0 - value)
    return found


def judged(judges: Sequence[Reward], samples: Sequence[Sample]) -> list[Sample]:
    """Samples made before, with these judges' measures; a judge is shown the prompts' texts alone."""
    rows, texts = [{"prompt": one.prompt} for one in samples], [one.completion for one in samples]
    return [
        dataclasses.replace(one, measures={**one.measures, **numbers})
        for one, numbers in zip(samples, judge_measures(judges, rows, texts), strict=True)
    ]


def described(judges: Sequence[Reward]) -> list[dict[str, Any]]:
    """What a table holds of each."""
    return [
        {"name": one.name, "version": one.version, "sha256": one.sha256, "property": one.property}
        for one in judges
    ]
