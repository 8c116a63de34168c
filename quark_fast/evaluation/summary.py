"""What is written about an evaluation: its rows and how it was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from quark_fast.data.row import Row
from quark_fast.evaluation.modes import HeldOut, Mode
from quark_fast.metrics import (
    Sample,
    as_json,
    compare,
    evaluate_samples,
)
from quark_fast.model.policy import Policy
from quark_fast.rewards.reward import Reward
from quark_fast.rollout.sampling import Sampling
from quark_fast.tasks.task import Task


def describe_evaluation(
    task: Task,
    target: str,
    reward: Reward,
    policy: Policy,
    sampling: Sampling,
    held_out: HeldOut,
    seed: int,
    guidance: Sequence[float],
    perplexity: Mapping[str, str],
    dtypes: Iterable[torch.dtype],
) -> dict[str, Any]:
    """What makes two tables comparable: task, scorer, prompts, sampling; and which metrics its tables show.

    Args:
        guidance: values of w for the guided rows; the first is the one that the table is about.
        perplexity: the model that measures it, and whether on the sampled tokens or on re-tokenised text.
        dtypes: what the models compute in; told, not compared.
    """
    return {
        "task": task.name,
        "target": target,
        "headline": task.headline,
        "columns": list(task.columns),
        "more_columns": list(task.more_columns),
        "property": reward.property or "reward",
        "scorer": {"name": reward.name, "version": reward.version, "sha256": reward.sha256},
        "perplexity": dict(perplexity),
        "prompts": len(held_out.rows),
        "prompts_sha256": _sha256([[row["prompt"] for row in held_out.rows], held_out.texts]),
        "classes_sha256": classes_sha256(task, held_out.rows),
        "samples_per_prompt": held_out.samples,
        "sampling": {
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "min_new_tokens": sampling.min_new_tokens,
            "prefix": policy.tokenizer.decode(policy.prefix),
            "seed": seed,
            "guidance": next(iter(guidance), None),
            "dtype": " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})),
        },
    }


def classes_sha256(task: Task, rows: Sequence[Row]) -> str | None:
    """Of the prompts' classes; None where the task has none, or a row none yet."""
    classes = [row.get("prompt_class") for row in rows]
    return _sha256(classes) if task.prompt_classes and None not in classes else None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def summarise(
    samples: dict[str, list[Sample]], table: Sequence[Mode], about: dict[str, Any]
) -> dict[str, Any]:
    """``evaluation.json``: per mode its metrics, and the change against the first mode."""
    before = samples[table[0].name]
    rows = [summary(mode.name, samples[mode.name], before, mode.places) for mode in table]
    return {**about, "rows": rows}


def summary(name: str, after: list[Sample], before: list[Sample], more: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a table: its metrics, and the change against ``before``; none where that is the row."""
    change = None if after is before else compare(before, after)
    return {
        "name": name,
        **more,
        "metrics": {k: as_json(v) for k, v in evaluate_samples(after).items()},
        "change": None if change is None else {k: as_json(v) for k, v in change.items()},
    }
