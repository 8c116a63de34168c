"""Ablations: a grid of runs around a base, each axis varied alone, and what came out of them."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quark_fast.config import Config, UsageError
from quark_fast.durable import replacing
from quark_fast.evaluator import check_comparable
from quark_fast.machine import settled_precision
from quark_fast.metrics import Sample, as_json, compare
from quark_fast.report.columns import COLUMNS, scores_are_rewards
from quark_fast.report.files import read_run
from quark_fast.report.results import scorer_line
from quark_fast.run_folder import RunFolder
from quark_fast.trainer import Interrupted, Trainer
from quark_fast.untouched import UntouchedSamples

Row = dict[str, Any]

# What the points of a grid have otherwise than a run of its own: a quarter of the steps, one way of sampling.
DEFAULTS: dict[str, Any] = {
    "output": "runs/ablations",
    "prompt_limit": 200,
    "initial_samples": 8,
    "explore_samples": 2,
    "steps": 16,
    "warmup_steps": 4,
    "eval_modes": "best",
}

# Settings that may be others when a grid goes on: no number depends on them.
FREE = {
    "output",
    "resume",
    "seed",
    "threads",
    "micro_batch",
    "checkpoint_every",
    "show_offensive",
    "reward_cache",
    "reward_batch",
    "reward_concurrency",
    "reward_timeout",
    "reward_retries",
    "reward_backoff",
}


@dataclass(frozen=True)
class Point:
    """One run of the grid, at every seed.

    Attributes:
        value: what the axis has here, as the table names it.
        settings: the settings that differ from the base's; none at the base.
        against: likewise, of the point that it is compared with.
    """

    axis: str
    value: str
    settings: dict[str, Any]
    against: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return _name(self.settings)


def _name(settings: Mapping[str, Any]) -> str:
    return "_".join(f"{name}={value}" for name, value in settings.items()) or "base"


# --- the axes: (base) -> (value, settings) ----------------------------------------------------------

Values = Iterator[tuple[str, dict[str, Any]]]


def _kl(base: Config) -> Values:
    """beta at 0, 1/4, 1 and 4 times the base's; at the base's beta the other direction, and the estimate."""
    if not base.kl_coef:
        raise UsageError("the axis kl takes multiples of kl_coef, which is 0; give the base one by --kl-coef")
    for factor in (0.0, 0.25, 1.0, 4.0):
        yield f"beta {factor * base.kl_coef:g}", {"kl_coef": factor * base.kl_coef}
    for name in ("policy_ref", "ref_policy", "sampled"):
        if name != base.kl:
            yield name, {"kl": name}


def _quantiles(base: Config) -> Values:
    """K."""
    for quantiles in sorted({2, 5, 8, base.quantiles}):
        yield f"K {quantiles}", {"quantiles": quantiles}


def _exploration(base: Config) -> Values:
    """Rounds x steps, the total as in the base; one round never explores again."""
    total = base.rounds * base.steps
    for rounds in sorted({1, 2, 4, base.rounds}):
        if total % rounds:
            raise UsageError(
                f"the axis exploration cuts the {base.rounds} * {base.steps} = {total} steps into {rounds}"
                " rounds; give --rounds and --steps whose product divides by that"
            )
        yield f"{rounds} x {total // rounds}", {"rounds": rounds, "steps": total // rounds}


def _tokens(base: Config) -> Values:
    """The token that explores: the best one, guided and plain; one drawn at random for each prompt."""
    if base.rounds == 1:
        raise UsageError("the axis tokens is about exploring, but rounds = 1 never does; give --rounds 2")
    guidance = f", w {base.guidance:g}" if base.guidance != 1 else ""
    yield f"best{guidance}", {"explore_token": "best"}
    if base.guidance != 1:
        yield "best, w 1", {"explore_token": "best", "guidance": 1.0}
    yield f"random{guidance}", {"explore_token": "random"}


def _selection(base: Config) -> Values:
    """The quantiles trained on: extremes, all equally, the best alone; the last two without contrast, too.

    The contrast pulls the best and the worst token apart whichever samples it sees, so that the best alone
    means what it does in the paper only without it; then in the paper's loss, which all three have.
    """
    plain: dict[str, Any] = {"contrast_coef": 0.0, "kl_coef": 0.05} if base.contrast_coef else {}
    suffix = ", no contrast" if plain else ""
    if plain:
        for weights in ("extremes", "equal"):
            yield weights, {"quantile_weights": weights}
    for weights in ("extremes", "equal", "best"):
        yield weights + suffix, {**plain, "quantile_weights": weights}


def _unlikelihood(base: Config) -> Values:
    """Quark with the unlikelihood of repeated n-grams, and each of the two alone.

    Without Quark there is one quantile, so one token stands before every sample, whatever its reward.
    """
    if not base.unlikelihood_coef or base.quantiles == 1:
        raise UsageError(
            f"the axis unlikelihood takes a base apart that has both, not unlikelihood_coef ="
            f" {base.unlikelihood_coef:g} with quantiles = {base.quantiles}; --task repetition has"
        )
    yield "Quark + unlikelihood", {}
    yield "Quark alone", {"unlikelihood_coef": 0.0}
    yield "unlikelihood alone", {"quantiles": 1, "contrast_coef": 0.0, "guidance": 1.0, "eval_guidance": ""}


AXES: dict[str, Callable[[Config], Values]] = {
    "kl": _kl,
    "quantiles": _quantiles,
    "exploration": _exploration,
    "tokens": _tokens,
    "selection": _selection,
    "unlikelihood": _unlikelihood,
}


def usual_axes(base: Config) -> list[str]:
    """All axes; that of the unlikelihood only for a base that has it."""
    return [name for name in AXES if name != "unlikelihood" or base.unlikelihood_coef]


def points(base: Config, axes: Sequence[str]) -> list[Point]:
    """The points of the axes, in order; one that stands on several axes stands here once for each.

    Raises:
        UsageError: an unknown axis, or one that this base cannot have.
    """
    found = []
    for axis in axes:
        if axis not in AXES:
            raise UsageError(f"grid = {axis!r}; choose from {', '.join(AXES)}")
        for value, settings in AXES[axis](base):
            differing = {name: v for name, v in settings.items() if v != getattr(base, name)}
            try:
                dataclasses.replace(base, **differing).check()
            except UsageError as error:
                raise UsageError(f"axis {axis}, point {value}: {error}") from error
            against: dict[str, Any] = {}
            if axis == "selection" and {"contrast_coef", "kl_coef"} & differing.keys():
                against = {k: v for k, v in differing.items() if k != "quantile_weights"}
                if base.quantile_weights != "equal":
                    against["quantile_weights"] = "equal"
            found.append(Point(axis, value, differing, against))
    return found


def runs(grid: Sequence[Point]) -> list[dict[str, Any]]:
    """The settings of each different point, the base first: it is what the others are compared with."""
    unique: dict[str, dict[str, Any]] = {_name({}): {}}
    for point in grid:
        unique.setdefault(point.name, point.settings)
    return list(unique.values())


# --- running ----------------------------------------------------------------------------------------


def run_grid(
    base: Config,
    axes: Sequence[str],
    seeds: Sequence[int],
    *,
    about: Callable[[str], None] = lambda _: None,
    **given: Any,
) -> Path:
    """Run what is not finished of the grid in ``base.output``, and write its table and plot.

    A point is a run folder ``seed-N/SETTINGS`` of its own. All take the untouched model's samples of a seed
    from one place, which changes no number (``untouched.UntouchedSamples``). Calling this again goes on
    where the last call ended, also within a point, and may have other axes or seeds; the table has those of
    the last call.

    Args:
        about: called with a line before every run.
        given: to the ``Trainer``.
    Raises:
        UsageError: before any long work, as the trainer's; or the folder is of a grid with other settings.
        Interrupted: Ctrl-C or SIGTERM; calling again goes on.
    """
    if not seeds or not axes:
        raise UsageError("a grid needs at least one axis and one seed")
    grid = points(base, axes)
    folder = base.output_folder
    base = _begin(folder, base)
    sampler = UntouchedSamples(folder / "untouched")
    wanted = [(seed, settings) for seed in seeds for settings in runs(grid)]
    for place, (seed, settings) in enumerate(wanted, start=1):
        path = _run_path(folder, seed, settings)
        line = f"run {place}/{len(wanted)}: seed {seed}, {_name(settings)}"
        if RunFolder(path).finished:
            about(f"{line}: finished")
            continue
        about(line)
        resume = (path / "config.yaml").exists()
        config = dataclasses.replace(base, **settings, seed=seed, output=str(path), resume=resume)
        try:
            Trainer(config, sampler=sampler, **given).train()
        except Interrupted as stop:
            raise Interrupted(f"stopped in {line}; the same command goes on") from stop
        gc.collect()  # two models and an optimizer, in circles
    return write_results(folder, base, grid, seeds)


def _run_path(folder: Path, seed: int, settings: Mapping[str, Any]) -> Path:
    return folder / f"seed-{seed}" / _name(settings)


def _begin(folder: Path, base: Config) -> Config:
    """Make the grid's folder, or check that it is this grid's; the base with its precision settled."""
    record = folder / "grid.json"
    if not record.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is no grid (no grid.json); choose another --output")
        base = dataclasses.replace(base, precision=settled_precision(base.precision))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
        with replacing(record) as scratch:
            scratch.write_text(json.dumps(_binding(base), indent=2))
        return base
    try:
        saved = json.loads(record.read_text())
    except ValueError as error:
        raise UsageError(f"{record} is damaged ({error}); choose another --output") from error
    if base.precision == "auto":
        base = dataclasses.replace(base, precision=saved["precision"])
    mine = _binding(base)
    for name in sorted(mine.keys() | saved.keys()):
        if mine.get(name) != saved.get(name):
            raise UsageError(
                f"{name} = {mine.get(name)!r}, but the grid in {folder} was made with {saved.get(name)!r};"
                " give it its own, or choose another --output"
            )
    return base


def _binding(base: Config) -> Row:
    return {name: value for name, value in dataclasses.asdict(base).items() if name not in FREE}


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
    base_path = _run_path(folder, seeds[0], {})
    first = read_run(base_path)
    about = {
        name: first.evaluation[name]
        for name in ("task", "target", "headline", "property", "scorer", "prompts", "samples_per_prompt")
    }
    headline = str(about["headline"])
    fluency = "text_perplexity" if "text_perplexity" in first.evaluation["columns"] else "perplexity"
    read = {
        _name(settings): [_read(_run_path(folder, seed, settings), seed, headline, fluency) for seed in seeds]
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
        against = together(_name(point.against), "after")
        changes = compare(together(point.name, "before"), after)
        compared = None if point.settings == point.against else compare(against, after)
        return {
            "axis": point.axis,
            "value": point.value,
            "run": point.name,
            "against": _name(point.against),
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
        "base": _binding(base),
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


# --- table ------------------------------------------------------------------------------------------


def headline_title(results: Row) -> str:
    """What the headline metric is called."""
    title = next(column.title for column in COLUMNS if column.key == results["headline"])
    return title.format(property=results["property"], target=results["target"], threshold=".5")


def perplexity_title(results: Row) -> str:
    return "perplexity of text" if results["perplexity_of"] == "text_perplexity" else "perplexity"


def table(results: Row) -> list[list[str]]:
    """The results as texts, a heading first; mean over the seeds, and with several +- their deviation."""
    before = results["untouched"]
    plain = results["headline"] == "mean" and scores_are_rewards(results)
    lines = [
        [
            "axis",
            "point",
            headline_title(results),
            "change against untouched",
            "difference from",
            "difference",
            perplexity_title(results),
            "dist-3",
            "KL",
            "probe",
        ],
        [
            "",
            "untouched",
            _number(before["headline"], 3),
            *[""] * 3,
            _number(before["perplexity"], 1),
            _number(before["dist3"], 2),
            *[""] * 2,
        ],
    ]
    named = {point["run"]: point["value"] for point in reversed(results["points"])} | {"base": "base"}
    for point in results["points"]:

        def shown(key: str, digits: int, point: Row = point) -> str:
            return _number(point["mean"][key], digits, point["deviation"][key])

        lines.append(
            [
                point["axis"],
                point["value"] + (" (base)" if point["run"] == "base" else ""),
                shown("headline", 3),
                # A mean reward may be 0 or below.
                _difference(point["change"]) if plain else _percent(point["change"]),
                "" if point["difference"] is None else named[point["against"]],
                "" if point["difference"] is None else _difference(point["difference"]),
                f"{shown('perplexity', 1)} ({_percent(point['perplexity_change'], short=True)})",
                shown("dist3", 2),
                shown("kl", 3),
                shown("rank_correlation", 2),
            ]
        )
    return lines


def _number(value: float | None, digits: int, deviation: float | None = None) -> str:
    if value is None:
        return ""
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def _percent(change: Row, short: bool = False) -> str:
    values = [change["relative"], change["relative_low"], change["relative_high"]]
    if None in values:
        return ""
    middle, low, high = (f"{100 * value:+.0f}" for value in values)
    return f"{middle}%" if short else f"{middle}% [{low}, {high}]"


def _difference(change: Row) -> str:
    return f"{change['difference']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"


def markdown(results: Row) -> str:
    """``ablations.md``: the table and what its columns are."""
    head, *lines = table(results)
    seeds = ", ".join(map(str, results["seeds"]))
    perplexity = (
        "Perplexity of text: the model's own on the held-out texts, its token in front."
        if results["perplexity_of"] == "text_perplexity"
        else "Perplexity: of the completions under the untouched model."
    )
    several = " (mean ± standard deviation over the seeds)" if len(results["seeds"]) > 1 else ""
    versions = results["versions"]
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"Under the best token alone (w = 1); seeds {seeds}{several}; {results['prompts']} held-out"
            f" prompts, {results['samples_per_prompt']} completions each. In brackets 95% bootstrap intervals"
            f" over prompts, paired by prompt. {perplexity}"
            " KL: of the policy under the best token from the untouched model, exact, nats a token, on the"
            " untouched model's completions. Probe: rank correlation of reward and"
            " log p(best) - log p(worst) there.",
            "",
            scorer_line(results),
            "",
            f"`{versions['command']}`, {versions['machine']}, {versions['minutes']:.0f} minutes.",
            "",
        ]
    )


# --- plot -------------------------------------------------------------------------------------------


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved no more than it takes for any two to be ``gap`` apart; their order stays."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    stacks: list[list[int]] = []  # labels that touch, bottom to top; each stack is centred on its own

    def middle(stack: Sequence[int]) -> float:
        return sum(heights[i] for i in stack) / len(stack)

    def reach(stack: Sequence[int]) -> float:
        return gap * len(stack) / 2

    for i in order:
        stacks.append([i])
        while len(stacks) > 1:
            below, above = stacks[-2:]
            if middle(above) - middle(below) >= reach(above) + reach(below):
                break
            stacks[-2:] = [below + above]
    placed = [0.0] * len(heights)
    for stack in stacks:
        for place, i in enumerate(stack):
            placed[i] = middle(stack) + gap * (place - (len(stack) - 1) / 2)
    return placed


def plot(results: Row) -> str:
    """``ablations.svg``: for each axis the headline metric against perplexity, and against KL."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(point["axis"] for point in results["points"]))
    before = results["untouched"]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "quark_fast",
        "text.parse_math": False,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2 * len(axes), 6.2), layout="constrained", facecolor="white")
        panels = figure.subplots(2, len(axes), sharey=True, sharex="row", squeeze=False)
        labels: dict[Any, list[tuple[str, float, float, str]]] = {}
        for column, axis in enumerate(axes):
            rows = [point for point in results["points"] if point["axis"] == axis]
            panels[0][column].set_title(axis)
            for panel, key, start in (
                (panels[0][column], "perplexity", before["perplexity"]),
                (panels[1][column], "kl", 0.0),
            ):
                panel.axhline(before["headline"], color="#777a82", lw=1, ls=(0, (2, 3)))
                panel.plot(start, before["headline"], "o", color="#777a82", ms=5)
                labels[panel] = [("untouched", start, before["headline"], "#777a82")]
                panel.set_xlabel(perplexity_title(results) if key == "perplexity" else "KL, nats a token")
                panel.margins(0.15, 0.12)
                for point in rows:
                    x, y = point["mean"][key], point["mean"]["headline"]
                    if x is None or y is None:
                        continue
                    colour = "#1f2024" if point["run"] == "base" else "#0b6fae"
                    change = point["change"]
                    if change["low"] is not None:
                        bounds = [before["headline"] + change[end] for end in ("low", "high")]
                        panel.plot([x, x], bounds, color=colour, lw=1, alpha=0.35)
                    panel.plot(x, y, "o", color=colour, ms=5)
                    labels[panel].append((point["value"], x, y, colour))
        for row in panels:
            row[0].set_ylabel(headline_title(results))
        # Beside the panel, where they hide no point, each with a line to its own.
        for panel, named in labels.items():
            low, high = panel.get_ylim()
            heights = spread([y for _, _, y, _ in named], 0.075 * (high - low))
            for (name, x, y, colour), height in zip(named, heights, strict=True):
                panel.annotate(
                    name,
                    (x, y),
                    (1.04, (height - low) / (high - low)),
                    textcoords="axes fraction",
                    va="center",
                    color=colour,
                    arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5, "shrinkB": 4},
                )
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
