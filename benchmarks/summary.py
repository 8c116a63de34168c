"""Tables and a plot of the loss's results, from the files that the benchmarks wrote.

python benchmarks/summary.py            # benchmarks/results/loss-*.json -> tables here, results/loss.svg
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
ROWS = ["eager-authors", "eager-lean", "compile", "ours-fresh", "ours-inplace"]
LINEAR_ROWS = ["eager", "compile", "quark_loss", "linear_quark_loss"]
LABELS = {
    "eager": "eager, lean",
    "quark_loss": "quark_loss, in place",
    "linear_quark_loss": "linear_quark_loss",
    "eager-authors": "eager, as the authors",
    "eager-lean": "eager, lean",
    "compile": "torch.compile",
    "ours-fresh": "quark_fast",
    "ours-inplace": "quark_fast, in place",
}

Group = dict[str, dict[str, Any]]  # row -> figures


def groups(results: dict[str, Any]) -> dict[str, Group]:
    found: dict[str, Group] = {}
    for row in results["rows"]:
        found.setdefault(row["group"], {})[row["row"]] = row
    return found


def table(results: dict[str, Any], rows: list[str]) -> str:
    """Multiples of the roof, and memory, a line a group."""
    lines = [
        "| case | " + " | ".join(LABELS[row] for row in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name, group in groups(results).items():
        cells = [
            f"{group[row]['to_roof']:.2f} ({group[row]['extra_mb']:.0f} MB)" if row in group else "-"
            for row in rows
        ]
        lines.append(f"| {name.replace('-', ', ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(results: dict[str, Any], size: str) -> str:
    """How many times as long as ours the others take; ours, in place or not, as a multiple of the roof."""
    lines = [
        "| dtype, KL | torch.compile / ours | authors' eager / ours | ours / roof |",
        "|---|---|---|---|",
    ]
    for name, group in groups(results).items():
        if not name.startswith(size) or not group.keys() >= {"compile", "eager-authors"}:
            continue
        ours = min(group[row]["to_roof"] for row in ("ours-fresh", "ours-inplace"))
        compiled, authors = (group[row]["to_roof"] / ours for row in ("compile", "eager-authors"))
        case = name.removeprefix(f"{size}-").replace("-", ", ")
        lines.append(f"| {case} | {compiled:.1f} | {authors:.0f} | {ours:.2f} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], size: str, path: Path) -> None:
    """Time of each row as a multiple of the roof, for both dtypes."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quark_fast", "font.family": "sans-serif"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        group = groups(results)[f"{size}-{dtype}-policy_ref"]
        times = [group[row]["to_roof"] for row in ROWS]
        colours = ["#9aa5b1"] * 3 + ["#2f6fde"] * 2
        bars = axis.barh([LABELS[row] for row in ROWS], times, color=colours)
        axis.bar_label(bars, [f"{time:.1f}" for time in times], padding=3)
        axis.set_xscale("log")
        axis.set_xlim(1, max(times) * 2)
        axis.invert_yaxis()
        axis.set_title(dtype)
        axis.set_xlabel("time / one plain pass over the tensors")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    for path in sorted([*RESULTS.glob("loss-*.json"), *RESULTS.glob("linear-*.json")]):
        results = json.loads(path.read_text())
        print(f"\n## {path.name}\n\n{results['machine']}, torch {results['torch']}: `{results['command']}`\n")
        linear = path.name.startswith("linear")
        print(table(results, LINEAR_ROWS if linear else ROWS), "\n")
        if not linear:
            print(ratios(results, "N320-V50257"))
        if path.name == "loss-1-thread-amx.json":
            plot(results, "N320-V50257", RESULTS / "loss.svg")


if __name__ == "__main__":
    main()
