"""The numbers of a grid's runs, over seeds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark_fast.ablation.axes import Point, Row, binding, name_of, run_path, runs
from quark_fast.ablation.plot import plot
from quark_fast.ablation.table import markdown
from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.evaluation.saved_tables import check_comparable
from quark_fast.files.atomic import replacing
from quark_fast.metrics import Sample, as_json, compare
from quark_fast.report.files import read_run

# --- results ----------------------------------------------------------------------------------------

AFTER = "best token"


@dataclass(frozen=True)
class _Finished:
    """What the table needs of one run."""

    path: Path
    evaluation: Mapping[str, Any]
    numbers: Row
    before: list[Sample]
    after: list[Sample]


def write_results(folder: Path, base: Config, grid: Sequence[Point], seeds: Sequence[int]) -> Path:
    """Write ``ablations.json``, ``ablations.md`` and ``ablations.svg`` of a grid whose runs are finished."""
    results = summarise_grid(folder, base, grid, seeds)
    for name, text in (
        ("ablations.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n"),
        ("ablations.md", markdown(results)),
        ("ablations.svg", plot(results)),
    ):
        with replacing(folder / name) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return folder


def summarise_grid(folder: Path, base: Config, grid: Sequence[Point], seeds: Sequence[int]) -> Row:
    """The numbers of every point: each seed's, their mean and standard deviation, and two comparisons.

    A comparison has the 95% bootstrap interval over prompts of a difference in the task's headline metric,
    paired by prompt, the completions of all seeds together: what the evaluation's luck leaves open. The luck
    of training is in the deviation between seeds alone.
    """
    base_path = run_path(folder, seeds[0], {})
    first = read_run(base_path)
    about = {
        name: first.evaluation[name]
        for name in ("task", "target", "headline", "property", "scorer", "prompts", "samples_per_prompt")
    }
    headline = str(about["headline"])
    fluency = "text_perplexity" if "text_perplexity" in first.evaluation["columns"] else "perplexity"
    read = {
        name_of(settings): [
            _read(run_path(folder, seed, settings), seed, headline, fluency) for seed in seeds
        ]
        for settings in runs(grid)
    }
    for one in itertools.chain.from_iterable(read.values()):
        try:
            # Each seed's untouched model sorts the prompts into classes of its own.
            check_comparable(str(one.path), one.evaluation, str(base_path), first.evaluation, classes=False)
        except UsageError as error:
            raise UsageError(f"{error}; remove one of these folders and run the grid again") from error

    def together(name: str, side: str) -> list[Sample]:
        return [sample for one in read[name] for sample in getattr(one, side)]

    def row(point: Point) -> Row:
        numbers = [one.numbers for one in read[point.name]]
        shown = ("headline", "perplexity", "dist3", "kl", "rank_correlation", "minutes")
        after = together(point.name, "after")
        against = together(name_of(point.against), "after")
        changes = compare(together(point.name, "before"), after)
        compared = None if point.settings == point.against else compare(against, after)
        return {
            "axis": point.axis,
            "value": point.value,
            "run": point.name,
            "against": name_of(point.against),
            "mean": {key: _mean([one[key] for one in numbers]) for key in shown},
            "deviation": {key: _deviation([one[key] for one in numbers]) for key in shown},
            "change": as_json(changes[headline]),
            "difference": None if compared is None else as_json(compared[headline]),
            "perplexity_change": as_json(changes[fluency]),
            "perplexity_difference": None if compared is None else as_json(compared[fluency]),
            "seeds": numbers,
        }

    return {
        **about,
        "perplexity_of": fluency,
        "versions": dict(first.versions)
        | {"minutes": sum(r.numbers["minutes"] for p in read.values() for r in p)},
        "seeds": list(seeds),
        "base": binding(base),
        "untouched": {
            key: _mean([one.numbers["untouched"][key] for one in read["base"]])
            for key in ("headline", "perplexity", "dist3")
        },
        "points": [row(point) for point in grid],
    }


def _read(path: Path, seed: int, headline: str, fluency: str) -> _Finished:
    run = read_run(path)
    table = {row["name"]: row["metrics"] for row in run.evaluation["rows"]}
    fields = {f.name for f in dataclasses.fields(Sample)}

    def samples(name: str) -> list[Sample]:
        return [
            Sample(**{key: value for key, value in row.items() if key in fields})
            for row in run.evaluation_rows
            if row["row"] == name
        ]

    def metrics(name: str) -> Row:
        keys = {"headline": headline, "perplexity": fluency, "dist3": "dist3"}
        return {key: table[name][metric]["value"] for key, metric in keys.items()}

    probe: Mapping[str, Any] = run.probes[-1] if run.probes else {}
    return _Finished(
        path,
        run.evaluation,
        {
            "seed": seed,
            **metrics(AFTER),
            "kl": probe.get("kl"),
            "rank_correlation": probe.get("rank_correlation"),
            "minutes": run.versions["minutes"],
            "untouched": metrics("untouched"),
        },
        samples("untouched"),
        samples(AFTER),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.stdev(known) if len(known) > 1 else None
