"""What came of a grid's runs, over the seeds: the numbers of ablations.json."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark_fast.ablation.axes import Point, binding, distinct_settings, name_of, run_path
from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.saved_tables import check_comparable
from quark_fast.metrics import Change, Sample, as_json, compare
from quark_fast.report.files import read_run
from quark_fast.report.results import BASE

BEFORE, AFTER = BASE, "best token"  # rows of a run's evaluation
ABOUT = ("task", "target", "headline", "property", "scorer", "split", "prompts", "samples_per_prompt")
AVERAGED = ("headline", "perplexity", "dist3", "kl", "rank_correlation", "minutes")


@dataclass(frozen=True)
class _Finished:
    """What the summary needs of one run."""

    path: Path
    evaluation: Mapping[str, Any]
    numbers: dict[str, Any]
    before: list[Sample]
    after: list[Sample]


def summarise(folder: Path, base: Config, points: Sequence[Point], seeds: Sequence[int]) -> dict[str, Any]:
    """The numbers of every point: each seed's, their mean and standard deviation, and two comparisons.

    A comparison has the 95% bootstrap interval over prompts of a difference in the task's headline metric,
    paired by prompt, the completions of all seeds together: what the evaluation's luck leaves open. The luck
    of training is in the deviation between seeds alone.
    """
    first = read_run(run_path(folder, seeds[0], {}))
    perplexity = "perplexity" if "perplexity" in first.evaluation["columns"] else "text_perplexity"
    metrics = {"headline": str(first.evaluation["headline"]), "perplexity": perplexity, "dist3": "dist3"}
    finished = {
        name_of(settings): [_read(run_path(folder, seed, settings), seed, metrics) for seed in seeds]
        for settings in distinct_settings(points)
    }
    everything = list(itertools.chain.from_iterable(finished.values()))
    _check_same_evaluation(everything)
    return {
        **{name: first.evaluation[name] for name in ABOUT},
        "perplexity_of": perplexity,
        "versions": {**first.versions, "minutes": sum(one.numbers["minutes"] for one in everything)},
        "seeds": list(seeds),
        "base": binding(base),
        BEFORE: {
            key: _mean_and_deviation(one.numbers[BEFORE][key] for one in finished["base"])[0]
            for key in metrics
        },
        "points": [_summary_of(point, finished, metrics) for point in points],
    }


def _read(path: Path, seed: int, metrics: Mapping[str, str]) -> _Finished:
    finished = read_run(path)
    table = {row["name"]: row["metrics"] for row in finished.evaluation["rows"]}
    fields = {field.name for field in dataclasses.fields(Sample)}

    def samples(name: str) -> list[Sample]:
        return [
            Sample(**{key: value for key, value in row.items() if key in fields})
            for row in finished.evaluation_rows
            if row["row"] == name
        ]

    def numbers(name: str) -> dict[str, Any]:
        # Of completions without any score a task's own measure is not there.
        return {key: table[name].get(metric, {}).get("value") for key, metric in metrics.items()}

    probe = finished.probe_of_model
    own = {
        "seed": seed,
        **numbers(AFTER),
        "kl": probe.get("kl"),
        "rank_correlation": probe.get("rank_correlation"),
        "minutes": finished.versions["minutes"],
        BEFORE: numbers(BEFORE),
    }
    return _Finished(path, finished.evaluation, own, samples(BEFORE), samples(AFTER))


def _check_same_evaluation(finished: Sequence[_Finished]) -> None:
    """Raise UsageError unless all were evaluated as the first, which is the base."""
    first = finished[0]
    for one in finished:
        try:
            # Each seed's base model sorts the prompts into classes of its own.
            check_comparable(str(one.path), one.evaluation, str(first.path), first.evaluation, classes=False)
        except UsageError as error:
            raise UsageError(f"{error}; remove one of these folders and run the grid again") from error


def _summary_of(
    point: Point, finished: Mapping[str, Sequence[_Finished]], metrics: Mapping[str, str]
) -> dict[str, Any]:
    own, others = finished[point.name], finished[name_of(point.against)]
    before = [sample for one in own for sample in one.before]
    after = [sample for one in own for sample in one.after]
    against = [sample for one in others for sample in one.after]
    changes = _Changes(compare(before, after))
    differences = None if point.settings == point.against else _Changes(compare(against, after))
    averages = {key: _mean_and_deviation(one.numbers[key] for one in own) for key in AVERAGED}
    headline, perplexity = metrics["headline"], metrics["perplexity"]
    return {
        "axis": point.axis,
        "value": point.value,
        "run": point.name,
        "against": name_of(point.against),
        "mean": {key: mean for key, (mean, _) in averages.items()},
        "deviation": {key: deviation for key, (_, deviation) in averages.items()},
        "change": as_json(changes[headline]),
        "difference": None if differences is None else as_json(differences[headline]),
        "perplexity_change": as_json(changes[perplexity]),
        "perplexity_difference": None if differences is None else as_json(differences[perplexity]),
        "seeds": [one.numbers for one in own],
    }


class _Changes(dict[str, Change]):
    """By metric; not known of a metric that one side lacks."""

    def __missing__(self, metric: str) -> Change:
        return Change(*[math.nan] * 6)


def _mean_and_deviation(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None
