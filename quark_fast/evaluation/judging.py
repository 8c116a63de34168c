"""Judges beside the reward: what scorers that took no part in training make of the completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quark_fast.data.row import Row
from quark_fast.metrics import Sample, judge_measure
from quark_fast.rewards.reward import Reward
from quark_fast.runtime.overlap import Begun, together


def begin_judging(
    judges: Sequence[Reward], rows: Sequence[Row], completions: Sequence[str]
) -> Begun[list[dict[str, float]]]:
    """What each judge makes of completions of the rows' prompts, by ``judge_measure`` of its name.

    Of a judge of a property, as of a reward: 1 - its value. Where a judge is silent it is left out.
    Asynchronous judges are not waited for.
    """

    def measures(every: list[npt.NDArray[np.float64]]) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in completions]
        for judge, values in zip(judges, every, strict=True):
            for numbers, value in zip(found, values, strict=True):
                if not np.isnan(value):
                    shown = value if judge.property is None else 1.0 - value
                    numbers[judge_measure(judge.name)] = float(shown)
        return found

    return together(judge.begin(rows, completions) for judge in judges).then(measures)


def judged(judges: Sequence[Reward], samples: Sequence[Sample]) -> list[Sample]:
    """Samples made before, with these judges' measures; a judge is shown the prompts' texts alone."""
    rows, texts = [{"prompt": one.prompt} for one in samples], [one.completion for one in samples]
    anew = {judge_measure(judge.name) for judge in judges}  # where one is silent now, no number stays
    others = [{key: n for key, n in one.measures.items() if key not in anew} for one in samples]
    found = begin_judging(judges, rows, texts).result()
    return [
        dataclasses.replace(one, measures=kept | numbers)
        for one, kept, numbers in zip(samples, others, found, strict=True)
    ]


def described(judges: Sequence[Reward]) -> list[dict[str, Any]]:
    """What a table holds of each."""
    return [one.described() | {"property": one.property} for one in judges]
