"""The README's tables of the three tasks, from the evaluations in docs/results.

python benchmarks/task_tables.py
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quark_fast.report.results import scorer_line

RESULTS = Path(__file__).parents[1] / "docs" / "results"
# task: (headline metric, its name, whether it is shown in percent)
TASKS = {
    "toxicity": ("mean", "mean toxicity", False),
    "sentiment": ("target", "share of positive completions", True),
}
ROWS = ["untouched", "best token", "guided w=1.5", "guided w=2", "worst token", "no token"]


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def change(numbers: dict[str, float]) -> str:
    parts = (numbers[key] for key in ("relative", "relative_low", "relative_high"))
    return "{:+.0f}% [{:+.0f}, {:+.0f}]".format(*(100 * part for part in parts))


def task_table(task: str) -> str:
    """Ways of sampling down, seeds across: the headline with its change, and what it costs."""
    metric, title, percent = TASKS[task]
    files = sorted(RESULTS.glob(f"{task}-seed*.json"))
    evaluations = [json.loads(file.read_text()) for file in files]
    runs = [{row["name"]: row for row in evaluation["rows"]} for evaluation in evaluations]
    lines = []
    for name in ROWS:
        cells = []
        for run in runs:
            if name not in run:  # a run may have sampled in fewer ways
                cells.append("")
                continue
            value = run[name]["metrics"][metric]["value"]
            cells.append(f"{100 * value:.1f}%" if percent else f"{value:.3f}")
            if run[name].get("change"):
                cells[-1] += f", {change(run[name]['change'][metric])}"
        costs = " / ".join(
            f"{run[name]['metrics']['perplexity']['value']:.1f}" for run in runs if name in run
        )
        lines.append([name, *cells, costs])
    seeds = [file.stem.split("-seed")[1] for file in files]
    table = markdown([title, *(f"seed {seed}" for seed in seeds), "perplexity"], lines)
    (scorer,) = {scorer_line(evaluation) for evaluation in evaluations}  # one scorer in one table
    return f"{table}\n\n{scorer}"


def unlikelihood_table(path: Path) -> str:
    """A grid's points down, seeds across: the headline, the change over all seeds, and what it costs."""
    grid: dict[str, Any] = json.loads(path.read_text())
    base = grid["points"][0]["seeds"]
    lines = [
        [
            "untouched",
            *(f"{100 * one['untouched']['headline']:.1f}%" for one in base),
            "",
            " / ".join(f"{one['untouched']['perplexity']:.1f}" for one in base),
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


if __name__ == "__main__":
    for task in TASKS:
        print(f"\n{task}\n\n{task_table(task)}")
    print(f"\nrepetition\n\n{unlikelihood_table(RESULTS / 'unlikelihood.json')}")
