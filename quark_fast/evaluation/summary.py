"""What is written about an evaluation: its rows and how it was done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quark_fast.data.row import Row
from quark_fast.evaluation.held_out import EncodedPrompts, EvaluationSetup
from quark_fast.evaluation.judging import described
from quark_fast.evaluation.perplexity import TEXT_PROMPT
from quark_fast.metrics import Sample, as_json, compare, evaluate_samples
from quark_fast.report.records import number_of
from quark_fast.rewards.reward import Reward
from quark_fast.rewards.weighted_sum import WeightedSum, terms
from quark_fast.tasks.task import Task


@dataclass(frozen=True)
class MeasuredRow:
    """A row of the table with its samples; ``about`` is what the table holds of it beside its numbers."""

    name: str
    about: Mapping[str, Any]
    samples: list[Sample]


def describe_evaluation(
    setup: EvaluationSetup,
    task: Task,
    target: str,
    split: str | None,
    guidance: Sequence[float],
    perplexity: Mapping[str, str],
    dtypes: Iterable[torch.dtype],
) -> dict[str, Any]:
    """What makes two tables comparable: task, scorer, prompts, sampling; and which metrics its tables show.

    Args:
        split: which of a run's prompts these are, "test" or "development"; None: neither.
        guidance: values of w for the guided rows; the first is the one that the table is about. It says of
            those above 1 or below 0 whose nucleus they are drawn from (``Conditioning``).
        perplexity: the model that measures it, and whether on the sampled tokens or on re-tokenised text.
        dtypes: what the models compute in; shown, not compared.
    """
    reward, held_out, sampling, policy = setup.reward, setup.held_out, setup.sampling, setup.policy
    return {
        "task": task.name,
        "target": target,
        **shown_metrics(task, scored=not reward.is_none),
        "property": reward.property or "reward",
        "scorer": scorer_in_words(reward),
        "judges": described(setup.judges),
        "perplexity": dict(perplexity),
        "split": split,
        "prompts": len(held_out.rows),
        "prompts_sha256": _sha256([[row["prompt"] for row in held_out.rows], held_out.texts]),
        "cut": what_was_cut({"": held_out}),
        "classes_sha256": classes_sha256(task, held_out.rows),
        "samples_per_prompt": held_out.samples,
        "text_prompt_tokens": TEXT_PROMPT,
        "text_passages": None if held_out.texts else min(len(held_out.rows), len(setup.controls)),
        "text_tokens_sha256": _sha256(texts) if (texts := held_out.texts or setup.controls) else None,
        "sampling": {
            "top_p": sampling.top_p,
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_new_tokens,
            "min_new_tokens": sampling.min_new_tokens,
            "prefix": policy.tokenizer.decode(policy.prefix),
            "seed": setup.seed,
            "guidance": next(iter(guidance), None),
            **({"guided_nucleus": ONE_TOKEN} if beyond_the_mix(guidance, vars(sampling)) else {}),
            "dtype": " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})),
        },
    }


ONE_TOKEN, THE_MIX = "one token alone", "the mix"


def beyond_the_mix(guidance: Iterable[float], sampling: Mapping[str, Any]) -> bool:
    """Whether it matters for any of these w whose nucleus is drawn from: the mix's, or that of one token."""
    cut = number_of(sampling, "top_p") < 1 and number_of(sampling, "temperature") > 0
    return cut and any(w > 1 or w < 0 for w in guidance)


def scorer_in_words(reward: Reward) -> dict[str, Any]:
    """What a table holds of the reward, by which others may or may not be compared with it."""
    if not isinstance(reward.function, WeightedSum):
        return reward.described()
    return reward.described() | {"terms": [part.described() for part in terms(reward)]}


_OF_DRAWS = {"entropy", "base_kl"}
OF_TEXTS = {"text_perplexity", "text_accuracy"}
# Metrics that need no reward.
_WITHOUT_REWARD = {"perplexity", "prompt_fit", "dist2", "dist3"} | OF_TEXTS | _OF_DRAWS


def shown_metrics(task: Task, scored: bool = True) -> dict[str, Any]:
    """Which metrics the tables of a task show; those of completions without rewards, if not ``scored``."""
    columns, more = (
        [key for key in keys if scored or key in _WITHOUT_REWARD]
        for keys in (task.columns, task.more_columns)
    )
    return {"headline": task.headline if scored else "perplexity", "columns": columns, "more_columns": more}


def classes_sha256(task: Task, rows: Sequence[Row]) -> str | None:
    """Of the prompts' classes; None where the task has none, or a row none yet."""
    classes = [row.get("prompt_class") for row in rows]
    return _sha256(classes) if task.prompt_classes and None not in classes else None


def what_was_cut(held_out: Mapping[str, EncodedPrompts]) -> dict[str, Any] | None:
    """Which models read the last tokens alone of how many prompts, and the hash of what all of them read.

    Args:
        held_out: by the model's name; "" for the only one.
    Returns:
        None: every model reads every prompt whole.
    """
    cut = [
        {"model": name, "prompts": one.cut, "tokens": max(map(len, one.ids))}
        for name, one in held_out.items()
        if one.cut
    ]
    # Models that read the same tokens count once: a run's own table compares with one of several runs.
    read = sorted({_sha256(one.ids) for one in held_out.values()})
    return {"by": cut, "sha256": read[0] if len(read) == 1 else _sha256(read)} if cut else None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def without_texts(row: MeasuredRow) -> MeasuredRow:
    """The same without what its model made of ordinary texts."""
    samples = [dataclasses.replace(one, text_nll=0.0, text_correct=0, text_tokens=0) for one in row.samples]
    return dataclasses.replace(row, samples=samples)


def summarise(rows: Sequence[MeasuredRow], about: Mapping[str, Any]) -> dict[str, Any]:
    """A whole table, as in ``evaluation.json``: each row's metrics, and its change against the first row.

    It has no columns for entropy and KL where no row has any: not ours to draw, or drawn before there were.
    Nor has it any for ordinary texts where none was measured.
    """
    first, metrics = rows[0], [evaluate_samples(row.samples) for row in rows]
    lacking = (_OF_DRAWS | OF_TEXTS).difference(*metrics)
    columns = {
        name: [key for key in about[name] if key not in lacking]
        for name in ("columns", "more_columns")
        if name in about
    }
    return {
        **about,
        **columns,
        "rows": [
            {
                "name": row.name,
                **row.about,
                "metrics": {k: as_json(v) for k, v in found.items()},
                "change": None
                if row is first
                else {k: as_json(v) for k, v in compare(first.samples, row.samples).items()},
            }
            for row, found in zip(rows, metrics, strict=True)
        ],
    }
