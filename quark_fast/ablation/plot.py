"""A grid's plot."""

from __future__ import annotations

from typing import Any

from quark_fast.ablation.axes import Row
from quark_fast.ablation.table import headline_title, perplexity_title, spread


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
