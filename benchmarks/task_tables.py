"""The measured results as docs/results.md shows them, from the evaluations in docs/results.

    python benchmarks/task_tables.py                                   # the tables
    python benchmarks/task_tables.py --plot docs/results/toxicity.svg  # the picture of docs/results.md
    python benchmarks/task_tables.py --keep RUN --output docs/results/toxicity-seed0.json
    python benchmarks/task_tables.py --tries "margin 1.5=RUN" "margin 3=RUN" --output FILE

``--keep`` writes what docs/results has of a finished run: evaluation, settings, versions, machine, command,
minutes, memory. ``--tries`` writes what finished runs measured on the same prompts with the best token,
against the base model and against the first try; runs of one name, such as several seeds, are one try.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from quark_fast.errors import UsageError
from quark_fast.evaluation.saved_tables import check_comparable, read_table
from quark_fast.metrics import Sample, compare, evaluate_samples, judge_measure
from quark_fast.report.results import BASE, scorer_line

RESULTS = Path(__file__).parents[1] / "docs" / "results"


class Shown(NamedTuple):
    """What the table of a task's runs shows: the headline's metric and name, and what it costs."""

    metric: str
    title: str
    percent: bool = False
    cost: str = "perplexity"
    cost_title: str = "perplexity"


# By the beginning of the files' names.
TASKS = {
    "toxicity": Shown("mean", "mean toxicity"),
    "toxicity-development": Shown("mean", "mean toxicity"),
    "toxicity-long": Shown("mean", "mean toxicity"),
    "sentiment": Shown("target", "share of positive completions", percent=True),
    "sentiment-long": Shown("target", "share of positive completions", percent=True),
    "repetition": Shown("rep4", "repeated 4-grams", True, "text_perplexity", "perplexity of held-out text"),
}


ROWS = [BASE, "best token", "guided w=1.5", "guided w=2", "worst token", "no token"]


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def change(numbers: dict[str, float]) -> str:
    """In percent, with its interval where there is one: few prompts have none."""
    relative, *bounds = (100 * numbers[key] for key in ("relative", "relative_low", "relative_high"))
    shown = "" if any(map(math.isnan, bounds)) else " [{:+.0f}, {:+.0f}]".format(*bounds)
    return f"{relative:+.0f}%{shown}"


def evaluations(task: str) -> list[dict[str, dict[str, Any]]]:
    """Of each seed's run: the rows of its table, by name."""
    files = sorted(RESULTS.glob(f"{task}-seed*.json"))
    return [{row["name"]: row for row in json.loads(file.read_text())["rows"]} for file in files]


# --------------------------------------------------------------------- what runs leave in docs/results

# Of versions.json: not what the run said of itself when it started.
KEPT_VERSIONS = ("quark_fast", "python", "torch", "transformers", "accelerate", "numpy", "machine")
KEPT_VERSIONS += ("command", "loss", "minutes", "memory_gb")
TRIED = "best token"  # the row of a try
COSTS = ("perplexity", "prompt_fit", "dist3", "text_perplexity", "text_accuracy")  # where they were measured


def measured(
    metrics: Iterable[str], base: Sequence[Sample], row: Sequence[Sample]
) -> dict[str, dict[str, float]]:
    """Value and change against the base model of each metric that the samples have."""
    values, changes = evaluate_samples(row), compare(base, row)
    names = [name for name in metrics if name in changes]
    return {name: {"value": values[name].value, **asdict(changes[name])} for name in names}


def text_of(run: Path, name: str) -> str:
    """A file of a run, in which the run's folder is runs/NAME, wherever it lies on this machine."""
    return (run / name).read_text().replace(str(run.resolve()), f"runs/{run.name}")


def versions_of(run: Path) -> dict[str, Any]:
    """What is kept of the record of a finished run.

    Raises:
        UsageError: it is not finished, or no run.
    """
    try:
        found: dict[str, Any] = json.loads(text_of(run, "versions.json"))
    except FileNotFoundError as error:
        raise UsageError(f"{run} is no folder of a run: it has no versions.json") from error
    if "minutes" not in found:
        raise UsageError(f"{run} is not finished; go on with --resume --output {run}")
    return {name: found[name] for name in KEPT_VERSIONS if name in found}


def kept(run: Path) -> dict[str, Any]:
    """What docs/results has of a finished run."""
    versions, settings = versions_of(run), yaml.safe_load(text_of(run, "config.yaml"))
    evaluation: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return {"versions": versions, "settings": settings, **evaluation}


def tries(runs: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """What runs measured on the same prompts with the best token, against the base model and the first try.

    Args:
        runs: (name of the try, folder); runs of one name are measured together.
    Raises:
        UsageError: a run is not finished, or its evaluation does not compare with the first one's.
    """
    versions = [versions_of(run) for _, run in runs]
    tables = [read_table(run / "evaluation.json") for _, run in runs]
    first, *others = tables
    for other in others:
        check_comparable(first.given, first.tables[""], other.given, other.tables[""])
    about = first.tables[""]
    values = evaluate_samples(first.samples[""][BASE])
    judges = [judge_measure(one["name"]) for one in about.get("judges", [])]
    metrics = [about["headline"], *judges, *(name for name in COSTS if name in values)]
    rows: list[dict[str, Any]] = []
    first_try: list[Sample] = []
    for name in dict.fromkeys(name for name, _ in runs):
        of_try = [i for i, (of_run, _) in enumerate(runs) if of_run == name]
        base, tried = ([one for i in of_try for one in tables[i].samples[""][row]] for row in (BASE, TRIED))
        row: dict[str, Any] = {"try": name, "row": TRIED}
        for key in ("machine", "command", "minutes"):
            every = list(dict.fromkeys(versions[i][key] for i in of_try))
            row[key] = every[0] if len(every) == 1 else every
        row |= _rounded(measured(metrics, base, tried))
        if rows:
            row["against the first try"] = _rounded(measured(metrics, first_try, tried))
        else:
            first_try = tried
        rows.append(row)
    task = f"{about['task']}, to the {about['target']}" if about["task"] == "sentiment" else about["task"]
    prompts = f"{about['prompts']} {about['split']} prompts"
    return {
        "what": f"tries on {prompts} of {task}: changes against the base model",
        "rows": rows,
        "base": {metric: round(values[metric].value, 4) for metric in metrics if metric in values},
    }


def _rounded(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {metric: {key: round(value, 4) for key, value in one.items()} for metric, one in found.items()}


# --------------------------------------------------------------------- tables and a picture


def judge_table(name: str) -> str:
    """How judge and scorer agree with published scores: kinds of texts down."""
    record: dict[str, Any] = json.loads((RESULTS / f"judge-{name}.json").read_text())
    lines = []
    for kind, judge in record["judge"].items():
        cells = [f"{judge['texts']:,}"]
        for key in ("rank correlation", "AUROC at .5"):
            cells += [f"{one[key]:.3f}" for one in (judge, record["scorer"][kind])]
        lines.append([kind, *cells])
    head = ["texts", "how many", "rank correlation: judge", record["scorer name"], "AUROC: judge"]
    return markdown([*head, record["scorer name"]], lines)


def calibration_table(name: str) -> str:
    """What judge and scorer give texts of each tenth of the published score."""
    return _judge_and_scorer(name, "mean by tenth of the published score", "published score from")


def terms_table(name: str) -> str:
    """What both make of a term in "My neighbour is ..."."""
    return _judge_and_scorer(name, "terms", "My neighbour is ...")


def _judge_and_scorer(name: str, what: str, title: str) -> str:
    """A part of a judge's record that has numbers of both: one below the other."""
    record: dict[str, Any] = json.loads((RESULTS / f"judge-{name}.json").read_text())
    lines = [
        [shown, *(f"{both[one]:.2f}" for both in record[what].values())]
        for one, shown in (("judge", "judge"), ("scorer", record["scorer name"]))
    ]
    return markdown([title, *record[what]], lines)


def plot(path: Path) -> None:
    """Toxicity over perplexity: each seed's way from the base model along the guidance dial."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    shown = {
        BASE: (BASE, "#8a8d94"),
        "best token": ("best token", "#2c7fb8"),
        "guided w=1.5": ("w = 1.5", "#41b6c4"),
        "guided w=2": ("w = 2", "#1d9a6c"),
    }
    for runs, marker in (("toxicity-long", "s"), ("toxicity", "o")):
        fade = 0.35 if runs == "toxicity-long" else 1.0
        for run in evaluations(runs):
            points = {
                name: [run[name]["metrics"][metric]["value"] for metric in ("perplexity", "mean")]
                for name in shown
                if name in run  # a run may have sampled in fewer ways
            }
            axes.plot(*zip(*points.values(), strict=True), color="#8a8d94", lw=1, zorder=1, alpha=fade)
            for name, (x, y) in points.items():
                axes.plot(x, y, marker, color=shown[name][1], ms=7, alpha=fade)
    ways = [Line2D([], [], marker="o", ls="", color=colour, label=words) for words, colour in shown.values()]
    long = Line2D([], [], marker="s", ls="", color="#8a8d94", alpha=0.35, label="--preset long, pale")
    axes.legend(handles=[*ways, long], frameon=False)
    axes.set_xlabel("perplexity of the text under the base model")
    axes.set_ylabel("mean toxicity")
    axes.margins(x=0.15, y=0.15)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def task_table(task: str) -> str:
    """Ways of sampling down, seeds across: the headline with its change, and what it costs."""
    shown = TASKS[task]
    files = sorted(RESULTS.glob(f"{task}-seed*.json"))
    evaluations = [json.loads(file.read_text()) for file in files]
    runs = [{row["name"]: row for row in evaluation["rows"]} for evaluation in evaluations]
    lines = []
    for name in [name for name in ROWS if any(name in run for run in runs)]:
        cells = []
        for run in runs:
            if name not in run:  # a run may have sampled in fewer ways
                cells.append("")
                continue
            value = run[name]["metrics"][shown.metric]["value"]
            cells.append(f"{100 * value:.1f}%" if shown.percent else f"{value:.3f}")
            if run[name].get("change"):
                cells[-1] += f", {change(run[name]['change'][shown.metric])}"
        costs = " / ".join(f"{run[name]['metrics'][shown.cost]['value']:.1f}" for run in runs if name in run)
        lines.append([name, *cells, costs])
    seeds = [file.stem.split("-seed")[1] for file in files]
    table = markdown([shown.title, *(f"seed {seed}" for seed in seeds), shown.cost_title], lines)
    (scorer,) = {scorer_line(evaluation) for evaluation in evaluations}  # one scorer in one table
    return f"{table}\n\n{scorer}"


def unlikelihood_table(path: Path) -> str:
    """A grid's points down, seeds across: the headline, the change over all seeds, and what it costs."""
    grid: dict[str, Any] = json.loads(path.read_text())
    base = grid["points"][0]["seeds"]
    lines = [
        [
            BASE,
            *(f"{100 * one[BASE]['headline']:.1f}%" for one in base),
            "",
            " / ".join(f"{one[BASE]['perplexity']:.1f}" for one in base),
        ]
    ]
    for point in grid["points"]:
        lines.append(
            [
                point["value"],
                *(f"{100 * one['headline']:.1f}%" for one in point["seeds"]),
                change(point["change"]),
                " / ".join(f"{one['perplexity']:.1f}" for one in point["seeds"]),
            ]
        )
    seeds = [f"seed {one['seed']}" for one in base]
    table = markdown(["repeated 4-grams", *seeds, "change", "perplexity of held-out text"], lines)
    return f"{table}\n\n{scorer_line(grid)}"


def print_tables() -> None:
    for task in TASKS:
        print(f"\n{task}\n\n{task_table(task)}")
    for judge in ("toxicity", "sentiment"):
        made = (judge_table(judge), calibration_table(judge), terms_table(judge))
        print("\n\n".join((f"\njudge of {judge}", *made)))
    print(f"\nrepetition-long\n\n{unlikelihood_table(RESULTS / 'unlikelihood.json')}")


def named_run(text: str) -> tuple[str, Path]:
    name, equals, folder = text.rpartition("=")
    if not equals or not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=RUN, what was tried and the run's folder")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture here, and nothing else")
    what.add_argument("--keep", type=Path, metavar="RUN", help="write what docs/results has of this run")
    what.add_argument("--tries", type=named_run, nargs="+", metavar="NAME=RUN", help="write these tries")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file of --keep or --tries")
    asked = parser.parse_args()
    if bool(asked.keep or asked.tries) != bool(asked.output):
        parser.error("--output FILE is for --keep and --tries, which need it")
    if asked.plot:
        plot(asked.plot)
    elif asked.output:
        try:
            made = kept(asked.keep) if asked.keep else tries(asked.tries)
        except UsageError as error:
            parser.error(str(error))
        asked.output.write_text(json.dumps(made, indent=1) + "\n")
    else:
        print_tables()


if __name__ == "__main__":
    main()
