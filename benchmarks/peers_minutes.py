"""What more minutes buy: ours beside TRL's GRPO and KTO, each trained for half, once and twice ours' time.

    python benchmarks/peers_minutes.py --table docs/results/peers-toxicity-minutes.json \
        --plot docs/results/peers-toxicity-minutes.svg

Ours gets more time as more samples and more steps in the same two rounds. TRL's get it as minutes; every
length has tries of its own, of which the rule of ``peers.py`` takes one. All is measured on development
prompts, seed 0: a curve is for choosing how long to train, and its points are tries.

Every point is a folder of its own below --output, as those of ``peers.py``, which it shares.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peers
from task_tables import markdown

from quark_fast.config import Config

TIMES = (0.5, 1.0, 2.0)
TRIES: dict[str, tuple[dict[str, Any], ...]] = {
    "GRPO": ({"learning_rate": 1e-4, "beta": 0.05}, {"learning_rate": 2e-4, "beta": 0.05}),
    "KTO": ({"learning_rate": 8e-5, "beta": 0.3}, {"learning_rate": 1.6e-4, "beta": 0.3}),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", default="toxicity", choices=["toxicity"])
    made.add_argument(
        "--minutes", type=float, default=4.5, help="CPU time of TRL's methods at 1 (default: 4.5)"
    )
    made.add_argument("--output", type=Path, default=Path("runs/peers"))
    made.add_argument("--jobs", type=int, help="points at once, of one thread each; default: one a core")
    made.add_argument("--table", type=Path, metavar="FILE", help="also write the numbers here, as JSON")
    made.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curves here, as SVG")
    return made


def ours_at(task: str, times: float) -> dict[str, int]:
    """What the task's defaults sample and learn, times so much."""
    config = Config(task=task)
    return {
        name: round(getattr(config, name) * times) for name in ("initial_samples", "explore_samples", "steps")
    }


def lengths(asked: argparse.Namespace) -> list[tuple[argparse.Namespace, dict[str, list[dict[str, Any]]]]]:
    """Of each length: the settings of ``peers.py`` for it, and each method's tries."""
    return [
        (
            argparse.Namespace(**vars(asked) | {"minutes": asked.minutes * times}),
            {"ours": [ours_at(asked.task, times)]} | {method: list(tries) for method, tries in TRIES.items()},
        )
        for times in TIMES
    ]


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """Every try of every length, and which one the rule takes."""
    rows = []
    for at, tries in lengths(asked):
        for method, settings in tries.items():
            found = peers.tried(at, method, settings)
            chosen = peers.choose(at, method, settings, found)
            rows += [{"method": method, "chosen": one["settings"] == chosen, **one} for one in found]
    return {"task": asked.task, "rows": rows}


def table(found: Mapping[str, Any]) -> str:
    """Of each method and length what the rule took."""
    names = peers.metrics_of(found["task"])
    lines = []
    for row in (one for one in found["rows"] if one["chosen"]):
        rate = row["settings"].get("learning_rate")
        cells = [f"{row['method']}{f', step size {rate:g}' if rate else ''}"]
        cells += [f"{row['minutes']:.1f}", f"{row['scored']:,}"]
        cells += [peers.percent(row["numbers"][name]["relative"]) for name in names]
        lines.append(cells)
    return markdown(["method", "CPU minutes", "scored samples", *names.values()], lines)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Scorer, judge and what they cost over the minutes; pale: tries that the rule did not take."""
    import matplotlib

    with matplotlib.rc_context(peers.STYLE):
        from matplotlib.figure import Figure

        names = peers.metrics_of(found["task"])
        shown = [*list(names)[:2], *peers.COSTS]
        figure = Figure(figsize=(2.6 * len(shown), 3.2), layout="constrained")
        for metric, axes in zip(shown, figure.subplots(1, len(shown)), strict=True):
            for method in ("ours", *TRIES):
                colour = peers.COLOURS[method]
                rows = [row for row in found["rows"] if row["method"] == method]
                points = [(row["minutes"], 100 * row["numbers"][metric]["relative"]) for row in rows]
                axes.scatter(*zip(*points, strict=True), s=14, color=colour, alpha=0.35, linewidths=0)
                taken = [one for one, row in zip(points, rows, strict=True) if row["chosen"]]
                axes.plot(*zip(*taken, strict=True), "o-", color=colour, markersize=5, label=method)
            axes.set_title(names[metric], fontsize=9)
            axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
            axes.yaxis.set_major_formatter(lambda change, _: peers.percent(change / 100))
            axes.set_xlabel("CPU minutes")
        figure.axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    asked = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the points end with their parent
    wanted = []
    for at, tries in lengths(asked):
        wanted += peers.points(at, "development", [0], {peers.BASE: [{}]} | tries)
    peers.run_all(asked, wanted)
    found = measured(asked)
    print(table(found))
    peers.write(asked, found, plot)


if __name__ == "__main__":
    main()
