"""Ours beside the methods that people would use instead: same model, prompts, reward and sampling.

    pip install -e ".[peers]"
    python benchmarks/peers.py --task toxicity --minutes 12 --seeds 0,1,2

GRPO and RLOO are TRL's (which has dropped PPO), on completions that the model writes as it learns; DPO, KTO
and fine-tuning on the best fifth alone (RAFT, Dong et al. 2023) are TRL's, too, on as many samples of the
base model as ours draws; "best of 4" trains nothing, the scorer chooses one of four completions of the base
model; Quark as published is our trainer with the paper's loss and draws. Ours and Quark train LoRA
adapters, TRL's methods all weights, by which they are no slower here. TRL's train for ``--minutes`` of CPU
time; ours for what its steps take: run it first to give the others as much. "GRPO with equal samples"
trains for as many samples as ours instead.
Each method's settings are chosen from a few tries on development prompts, of those that cost at most 10% of
perplexity the one whose scorer's mean is lowest; then each seed is measured on test prompts. Ours has no
tries here: its defaults were chosen before on development prompts, from more than three (docs/recipe.md).
``--also`` measures a setting that the rule did not choose, ``--chosen`` one that earlier tries chose,
``--try`` further settings on development prompts alone.

Every point is a folder of its own below --output; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peer_point
import task_tables

from quark_fast.ablation.plot import STYLE, Mark, label_beside
from quark_fast.metrics import Sample, judge_measure

BASE = "base"
DEAREST = 0.10  # rise in perplexity that a try may cost, to whole percents


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", default="toxicity", choices=["toxicity", "sentiment"])
    made.add_argument(
        "--minutes",
        type=float,
        default=12.0,
        help="CPU time that the others train for (default: 12); ours takes what its steps take",
    )
    made.add_argument("--seeds", default="0,1,2")
    made.add_argument("--methods", help="with commas between; default: all")
    made.add_argument(
        "--also",
        action="append",
        default=[],
        type=_also,
        metavar="METHOD=JSON",
        help="measure these settings of a method on test prompts, too",
    )
    made.add_argument(
        "--chosen",
        action="append",
        default=[],
        type=_also,
        metavar="METHOD=JSON",
        help="the rule's choice of earlier tries, which are not run again",
    )
    made.add_argument(
        "--try",
        action="append",
        default=[],
        type=_also,
        dest="tries",
        metavar="METHOD=JSON",
        help="measure these settings on development prompts, seed 0, and nothing else",
    )
    made.add_argument("--output", type=Path, default=Path("runs/peers"))
    made.add_argument("--jobs", type=int, help="points at once, of one thread each; default: one a core")
    made.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="also write the numbers here, as JSON; methods of the file that are not asked for stay in it",
    )
    made.add_argument("--plot", type=Path, metavar="FILE", help="also draw the frontier here, as SVG")
    made.add_argument("--dry-run", action="store_true", help="list the points")
    made.add_argument("--point", help=argparse.SUPPRESS)
    return made


def _also(text: str) -> tuple[str, dict[str, Any]]:
    method, _, settings = text.partition("=")
    return method, json.loads(settings)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def folder_of(output: Path, point: Mapping[str, Any]) -> Path:
    """Where a point lives: its task, minutes, split, method, settings and seed in words."""
    settings = "-".join(f"{name}={_shown(value)}" for name, value in point["settings"].items()) or "defaults"
    first = f"{point['task']}-{point['minutes']:g}-minutes"
    return output / first / point["split"] / point["method"] / settings / f"seed-{point['seed']}"


def points(
    asked: argparse.Namespace, split: str, seeds: Sequence[int], settings: Mapping[str, Sequence[Any]]
) -> Iterator[dict[str, Any]]:
    for method, tries in settings.items():
        for one in tries:
            for seed in seeds:
                yield {
                    "task": asked.task,
                    "method": method,
                    "minutes": asked.minutes,
                    "settings": one,
                    "seed": seed,
                    "split": split,
                    "threads": 1,
                }


def run_all(asked: argparse.Namespace, wanted: Sequence[dict[str, Any]]) -> None:
    """Run what is not there yet, some points at once, each in a process of its own."""
    left = [one for one in wanted if not (folder_of(asked.output, one) / "result.json").exists()]
    running: dict[subprocess.Popen[bytes], str] = {}
    try:
        while left or running:
            while left and len(running) < (asked.jobs or os.cpu_count() or 1):
                point = left.pop(0)
                folder = folder_of(asked.output, point)
                shutil.rmtree(folder, ignore_errors=True)  # of a point that was stopped
                folder.mkdir(parents=True)
                command = [
                    sys.executable,
                    __file__,
                    "--point",
                    json.dumps(point),
                    "--output",
                    str(asked.output),
                ]
                with (folder / "log").open("wb") as log:
                    running[subprocess.Popen(command, stdout=log, stderr=log)] = str(folder)
                print(f"{time.strftime('%H:%M')} {folder} ({len(left)} left)", flush=True)
            time.sleep(1)
            for process in [one for one in running if one.poll() is not None]:
                folder_name = running.pop(process)
                if process.returncode:
                    raise SystemExit(f"{folder_name}/log: the point ended with {process.returncode}")
    finally:
        for process in running:
            process.terminate()


# --------------------------------------------------------------------- what came of it


def read_point(folder: Path) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """(its record, its rows' samples)."""
    rows: dict[str, list[Sample]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        rows.setdefault(record.pop("row"), []).append(Sample(**record))
    return json.loads((folder / "result.json").read_text()), rows


def machine_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and machine of a point."""
    # Its command is that of one point, with paths of one machine.
    of_one = {name: value for name, value in record["versions"].items() if name != "command"}
    return of_one | {"threads": record["threads"]}


def metrics_of(task: str) -> dict[str, str]:
    """What a table shows: a heading for each metric."""
    headline = {"toxicity": ("mean", "toxicity"), "sentiment": ("target", "share positive")}[task]
    return {
        headline[0]: headline[1],
        judge_measure(f"{task}-judge"): "judge",
        "perplexity": "perplexity",
        "prompt_fit": "fit to prompt",
        "dist3": "dist-3",
        "text_perplexity": "perplexity of other text",
        "text_accuracy": "accuracy on it",
    }


def numbers(task: str, base: Sequence[Sample], row: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Value and change against the base model of each metric; points of an earlier version may lack one."""
    return task_tables.measured(metrics_of(task), base, row)


def tried(asked: argparse.Namespace, method: str, tries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each try measured on development prompts: settings, minutes, scored samples, numbers."""
    (base,) = points(asked, "development", [0], {BASE: [{}]})
    before = read_point(folder_of(asked.output, base))[1][BASE]
    found = []
    for point in points(asked, "development", [0], {method: tries}):
        record, rows = read_point(folder_of(asked.output, point))
        made = numbers(asked.task, before, rows.get(method, rows.get("best token", [])))
        found.append({**{name: record[name] for name in ("settings", "minutes", "scored")}, "numbers": made})
    return found


def in_short(task: str, numbers: Mapping[str, Mapping[str, float]]) -> str:
    """The changes against the base model of what was measured."""
    names = {metric: name for metric, name in metrics_of(task).items() if metric in numbers}
    return ", ".join(f"{name} {percent(numbers[metric]['relative'])}" for metric, name in names.items())


def try_alone(asked: argparse.Namespace) -> None:
    """Measure the settings of ``--try`` on development prompts, and write them to ``--table``."""
    tries: dict[str, list[dict[str, Any]]] = {}
    for method, settings in asked.tries:
        tries.setdefault(method, []).append(settings)
    (base,) = points(asked, "development", [0], {BASE: [{}]})
    run_all(asked, [base, *points(asked, "development", [0], tries)])
    measured = {method: tried(asked, method, settings) for method, settings in tries.items()}
    for method, found in measured.items():
        for one in found:
            changes = in_short(asked.task, one["numbers"])
            print(f"{method} {one['settings']}, {one['scored']} scored: {changes}")
    if asked.table:
        record, _ = read_point(folder_of(asked.output, base))
        about = {"split": "development", "seed": 0, "versions": machine_of(record)}
        about["command"] = shlex.join(["python", *sys.argv])
        asked.table.write_text(json.dumps({"task": asked.task, "tries": measured, **about}, indent=1) + "\n")


def choose(
    asked: argparse.Namespace,
    method: str,
    tries: Sequence[dict[str, Any]],
    measured: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The try that is best on development prompts, of what ``tried`` measured."""
    if len(tries) == 1:
        return tries[0]
    found = []
    for one in measured:
        print(f"  {method} {one['settings']}: {in_short(asked.task, one['numbers'])}")
        headline, _, perplexity = (one["numbers"][name] for name in list(metrics_of(asked.task))[:3])
        sign = -1 if asked.task == "sentiment" else 1
        dear = round(perplexity["relative"], 2) > DEAREST
        found.append((dear, perplexity["relative"] if dear else sign * headline["value"], one["settings"]))
    return min(found, key=lambda one: one[:2])[2]


def results(
    asked: argparse.Namespace, chosen: Mapping[str, Sequence[dict[str, Any]]], seeds: Sequence[int]
) -> dict[str, Any]:
    """Every row of every seed on the test prompts, and their means with a bootstrap interval over prompts.

    Args:
        chosen: settings of each method, the chosen ones first.
    """
    table: dict[str, Any] = {"task": asked.task, "minutes": asked.minutes, "seeds": list(seeds), "rows": []}
    bases = {}
    for point in points(asked, "test", seeds, {BASE: [{}]}):
        bases[point["seed"]] = read_point(folder_of(asked.output, point))[1][BASE]
    every_setting = [(method, one) for method, settings in chosen.items() for one in settings]
    for method, settings in every_setting:
        records, rows = [], {}
        for point in points(asked, "test", seeds, {method: [settings]}):
            record, found = read_point(folder_of(asked.output, point))
            records.append(record)
            for name, samples in found.items():
                rows.setdefault(name, {})[point["seed"]] = samples
        for name, by_seed in rows.items():
            if name == "worst token":
                continue
            every = [one for samples in by_seed.values() for one in samples]
            before = [one for seed in by_seed for one in bases[seed]]
            table["rows"].append(
                {
                    "method": method,
                    "row": name,
                    "settings": settings,
                    "by rule": settings == chosen[method][0],
                    "minutes": statistics.fmean(record["minutes"] for record in records),
                    "scored": statistics.fmean(record["scored"] for record in records),
                    "all seeds": numbers(asked.task, before, every),
                    "seeds": [numbers(asked.task, bases[seed], by_seed[seed]) for seed in by_seed],
                }
            )
        table["versions"] = machine_of(records[0])
    return table


def with_earlier(table: dict[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The table with what only an earlier one has: rows and tries of methods that this call did not measure.

    Raises:
        SystemExit: the two are not of the same measurement: other seeds, minutes, or another base model.
    """
    for name in ("task", "minutes", "seeds"):
        if table[name] != earlier[name]:
            raise SystemExit(
                f"the table has {name} {earlier[name]}, this call {table[name]}; give another file"
            )
    now, before = (one["rows"][0]["seeds"] for one in (table, earlier))
    for name in before[0].keys() & now[0].keys():
        values = [[seed[name]["value"] for seed in seeds] for seeds in (now, before)]
        if values[0] != values[1]:
            raise SystemExit(
                f"the base model's {name} is {values[0]}, in the table {values[1]}: other software or"
                " hardware; give another file"
            )
    measured = {row["method"] for row in table["rows"]}
    order = list(peer_point.METHODS)
    kept = [row for row in earlier["rows"] if row["method"] not in measured]
    rows = sorted([*table["rows"], *kept], key=lambda row: order.index(row["method"]))
    return table | {"rows": rows, "tries": earlier.get("tries", {}) | table.get("tries", {})}


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row by its method and way of sampling, and what it sets otherwise than the rule chose."""
    by_rule = {row["method"]: row["settings"] for row in rows if row["by rule"]}
    made = []
    for row in rows:
        parts = ["base model" if row["method"] == BASE else row["method"]]
        if row["row"] != row["method"]:
            parts.append(row["row"])
        chosen = by_rule.get(row["method"], {})
        for name, value in row["settings"].items():
            if not row["by rule"] and chosen.get(name) != value:
                parts.append(f"{name.replace('_', ' ')} {_shown(value)}")
        made.append(", ".join(parts))
    return made


def markdown(table: Mapping[str, Any]) -> str:
    """The means of all seeds, a change with its interval beside them."""
    names = metrics_of(table["task"])
    lines = []
    for name, row in zip(labels(table["rows"]), table["rows"], strict=True):
        cells = [name, f"{row['minutes']:.1f}", f"{row['scored']:,.0f}"]
        for metric in names:
            if (one := row["all seeds"].get(metric)) is None:
                cells.append("")
                continue
            cell = f"{one['value']:.{1 if 'perplexity' in metric else 3}f}"
            cells.append(cell if row["method"] == BASE else f"{cell}, {task_tables.change(one)}")
        lines.append(cells)
    return task_tables.markdown(["method", "CPU minutes", "scored samples", *names.values()], lines)


# README.md's: the methods that people ask for first.
FIRST = ("base model", "best of 4", "ours, best token", "GRPO", "GRPO with equal samples", "KTO")


def percent(change: float) -> str:
    """A relative change without its interval."""
    return f"{100 * change:+.0f}%".replace("+0%", "0%").replace("-0%", "0%")


def short_markdown(table: Mapping[str, Any]) -> str:
    """The rows of ``FIRST``: means of all seeds, a change beside them."""
    metrics = metrics_of(table["task"])
    title, judge, *_ = metrics
    names = {judge: "toxicity by the judge", title: "by the scorer"} | {cost: metrics[cost] for cost in COSTS}
    lines = []
    for label, row in zip(labels(table["rows"]), table["rows"], strict=True):
        if label not in FIRST:
            continue
        cells = [label]
        for metric in names:
            one = row["all seeds"][metric]
            digits = 1 if "perplexity" in metric else 2 if metric == "prompt_fit" else 3
            change = "" if row["method"] == BASE else f", {percent(one['relative'])}"
            cells.append(f"{one['value']:.{digits}f}{change}")
        cells += [f"{row['minutes']:.1f}", f"{row['scored']:,.0f}"] if row["minutes"] else ["", ""]
        lines.append(cells)
    return task_tables.markdown(["", *names.values(), "CPU minutes", "scored samples"], lines)


COSTS = {
    "perplexity": "perplexity under the base model (left is better)",
    "prompt_fit": "fit to prompt, nats a token (right is better)",
    "text_perplexity": "perplexity of other text (left is better)",
}
_OWN_COLOURS = {BASE: "#777a82", "ours": "#008562"}
_COLOURS = ("#0b6fae", "#cf5a00", "#a8578a", "#8a6d00", "#1d9bb5", "#c0392b", "#6b4fbb", "#5d6b2f")
COLOURS = _OWN_COLOURS | dict(
    zip((name for name in peer_point.METHODS if name not in _OWN_COLOURS), _COLOURS, strict=True)
)


def plot(table: Mapping[str, Any], path: Path) -> None:
    """The frontier: what the judge sees, over each of its ``COSTS``; small dots are seeds."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        rows, names = table["rows"], metrics_of(table["task"])
        height = max(3.6, 1.0 + 0.2 * len(rows))  # a label needs a fifth of an inch
        figure = Figure(figsize=(1.5 + 3.6 * len(COSTS), height), layout="constrained")
        panels = figure.subplots(1, len(COSTS), sharey=True)
        drawn = [_draw(axes, rows, cost, list(names)[1]) for axes, cost in zip(panels, COSTS, strict=True)]
        lowered = {"toxicity": "toxicity", "sentiment": "negativity"}[table["task"]]
        panels[0].set_ylabel(f"{lowered}, by a judge that never trained")
        # The panels share their height, so the names beside the last one are all panels'. Points of an
        # earlier version may lack a cost: then beside the last one that has every row.
        backwards = zip(reversed(panels), reversed(drawn), strict=True)
        axes, marks = max(backwards, key=lambda panel: len(panel[1]))
        label_beside(axes, marks, gap=0.19 / (height - 1.0))
        figure.suptitle("lower is better; large: all seeds together, small: each", fontsize=9)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], cost: str, judge: str) -> list[Mark]:
    """The rows' dots in a panel; the large ones, to be named."""
    from matplotlib.ticker import NullFormatter

    marks = []
    for name, row in zip(labels(rows), rows, strict=True):
        if cost not in row["all seeds"]:
            continue
        colour = COLOURS[row["method"]]
        dots = [(one[cost]["value"], one[judge]["value"]) for one in row["seeds"]]
        axes.scatter(*zip(*dots, strict=True), s=10, color=colour, alpha=0.5, linewidths=0)
        x, y = (row["all seeds"][metric]["value"] for metric in (cost, judge))
        axes.scatter([x], [y], s=42, color=colour, marker="s" if row["method"] == "ours" else "o")
        marks.append(Mark(name, x, y, colour))
    axes.set_xlabel(COSTS[cost])
    axes.margins(x=0.1, y=0.12)
    if cost == "perplexity":
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = range(10, 60, 2) if high < 2 * low else (10, 15, 20, 30, 40, 60, 80, 120, 200, 400)
        axes.set_xticks([tick for tick in ticks if low <= tick <= high])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    return marks


def write(
    asked: argparse.Namespace, found: Mapping[str, Any], draw: Callable[[Mapping[str, Any], Path], None]
) -> None:
    """The numbers and the plot to the files that were asked for."""
    if asked.table:
        asked.table.write_text(json.dumps(found, indent=1) + "\n")
    if asked.plot:
        draw(found, asked.plot)


def main() -> None:
    asked = parser().parse_args()
    if asked.point:
        point = json.loads(asked.point)
        peer_point.run(peer_point.Point(**point, folder=folder_of(asked.output, point)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the points end with their parent
    methods = asked.methods.split(",") if asked.methods else list(peer_point.METHODS)
    if unknown := [one for one in methods if one not in peer_point.METHODS]:
        raise SystemExit(f"{unknown[0]} is no method; choose from {', '.join(peer_point.METHODS)}")
    for flag, given in (("also", asked.also), ("chosen", asked.chosen), ("try", asked.tries)):
        if strange := [name for name, _ in given if name not in methods]:
            raise SystemExit(f"--{flag} {strange[0]}: not among the methods, {', '.join(methods)}")
    if asked.tries:
        return try_alone(asked)
    methods = [BASE, *(one for one in methods if one != BASE)]
    tries = {name: list(peer_point.METHODS[name].tries) for name in methods}
    tries |= {name: [settings] for name, settings in asked.chosen}
    tuned = {name: found for name, found in tries.items() if len(found) > 1}
    tuned = {BASE: tries[BASE]} | tuned if tuned else {}
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    development = list(points(asked, "development", [0], tuned))
    if asked.dry_run:
        for point in development:
            print(folder_of(asked.output, point))
        print(f"then, of each method's best try, seeds {asked.seeds} on test prompts")
        return
    run_all(asked, development)
    measured = {name: tried(asked, name, found) for name, found in tuned.items() if name != BASE}
    chosen = {name: [choose(asked, name, found, measured.get(name, []))] for name, found in tries.items()}
    for name, settings in asked.also:
        if settings not in chosen[name]:
            chosen[name].append(settings)
    run_all(asked, list(points(asked, "test", seeds, chosen)))
    table = results(asked, chosen, seeds)
    table["tries"] = measured
    if asked.table and asked.table.exists():
        table = with_earlier(table, json.loads(asked.table.read_text()))
    print(markdown(table))
    write(asked, table, plot)


if __name__ == "__main__":
    main()
