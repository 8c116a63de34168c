"""What JSON files that may be anyone's say, read safely: numbers (NaN for what is none), judges and cuts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quark_fast.metrics import LARGEST

Record = Mapping[str, Any]
Array = npt.NDArray[np.float64]


def samples_path(table: Path) -> Path:
    """Where the samples behind a table are: beside it, table.jsonl for table.json."""
    return table.with_suffix(".jsonl")


def number_of(record: Record, key: str) -> float:
    """record[key] as a float; NaN where it is absent, null or no number, or one that no plot can hold."""
    return _as_float(record.get(key))


def _as_float(value: Any) -> float:
    known = isinstance(value, int | float) and (abs(value) < LARGEST or value in (math.inf, -math.inf))
    return float(value) if known else math.nan


def series_of(records: Sequence[Record], key: str) -> Array:
    return np.array([number_of(record, key) for record in records], dtype=np.float64)


def along(records: Sequence[Record], axis: str) -> Array:
    """Where records stand on an axis of "step" or "round"; rounds, which files count from 0, count from 1."""
    return series_of(records, axis) + (axis == "round")


def lists_of(records: Sequence[Record], key: str) -> Array:
    """(records, longest list, 1,000 at most) of record[key], NaN where a list is short or absent."""
    lists = [value[:1000] if isinstance(value := record.get(key), list) else [] for record in records]
    table = np.full((len(records), max(map(len, lists), default=0)), np.nan)
    for index, values in enumerate(lists):
        table[index, : len(values)] = [_as_float(value) for value in values]
    return table


def cuts_of(evaluation: Record) -> list[tuple[str, int, int]]:
    """(model, prompts, tokens): how many prompts a model read the last tokens alone of, and how many at most.

    The model is "" where it is the only one; a file may hold anything.
    """
    cut = evaluation.get("cut")
    by = cut.get("by") if isinstance(cut, dict) else None
    found = []
    for one in by if isinstance(by, list) else []:
        prompts, tokens = (one.get(key) if isinstance(one, dict) else None for key in ("prompts", "tokens"))
        if isinstance(prompts, int) and isinstance(tokens, int):
            found.append((str(one.get("model") or ""), prompts, tokens))
    return found


def judges_of(evaluation: Record) -> list[Record]:
    """What a table says of its judges; a file may hold anything."""
    judges = evaluation.get("judges")
    return [judge for judge in judges if isinstance(judge, dict)] if isinstance(judges, list) else []


def scorer_terms(evaluation: Record) -> list[Record]:
    """What a table says of the terms of its scorer, where that is a sum; a file may hold anything."""
    scorer = evaluation.get("scorer")
    parts = scorer.get("terms") if isinstance(scorer, dict) else None
    return [one for one in parts if isinstance(one, dict)] if isinstance(parts, list) else []


def runs_trained_by(evaluation: Record, judge: Record) -> list[str]:
    """The runs of a table that a judge rewarded, alone or in a sum; a file may hold anything."""
    every = evaluation.get("trained_by")
    by = every.items() if isinstance(every, dict) else ()
    return [run for run, names in by if isinstance(names, list) and judge.get("name") in names]
