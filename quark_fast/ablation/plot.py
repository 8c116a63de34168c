"""A grid's plot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quark_fast.ablation.table import headline_title, perplexity_title
from quark_fast.report.drawing import spread
from quark_fast.report.results import BASE

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quark_fast",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# From the name's left edge, so that no line crosses a name.
_LINE: dict[str, Any] = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.5, "relpos": (0.0, 0.5), "shrinkB": 4}
BEFORE_COLOUR, BASE_COLOUR, POINT_COLOUR = "#777a82", "#1f2024", "#0b6fae"


@dataclass(frozen=True)
class Mark:
    """A dot of a panel, with the interval of its height where there is one."""

    name: str
    x: float
    y: float
    colour: str
    interval: tuple[float, float] | None = None


def plot(results: dict[str, Any]) -> str:
    """``ablations.svg``: for each axis the headline metric against perplexity, and against KL."""
    import matplotlib
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(point["axis"] for point in results["points"]))
    x_titles = {"perplexity": perplexity_title(results), "kl": "KL, nats a token"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(axes), 6.2), layout="constrained", facecolor="white")
        panels = figure.subplots(2, len(axes), sharey=True, sharex="row", squeeze=False)
        drawn = []
        for column, axis in enumerate(axes):
            panels[0][column].set_title(axis)
            for row, (key, title) in enumerate(x_titles.items()):
                panel, marks = panels[row][column], list(_marks(results, axis, key))
                panel.set_xlabel(title)
                panel.margins(0.15, 0.12)
                if (before := results[BASE]["headline"]) is not None:
                    panel.axhline(before, color=BEFORE_COLOUR, lw=1, ls=(0, (2, 3)))
                _draw(panel, marks)
                drawn.append((panel, marks))
        for row in panels:
            row[0].set_ylabel(headline_title(results))
        for panel, marks in drawn:  # now that each panel's limits, which they share, are known
            label_beside(panel, marks, gap=0.075)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _marks(results: dict[str, Any], axis: str, key: str) -> Iterator[Mark]:
    """The base model, then the points of an axis; those that have both numbers."""
    before = results[BASE]
    x, y = before.get(key, 0.0), before["headline"]
    if x is not None and y is not None:
        yield Mark(BASE, x, y, BEFORE_COLOUR)
    for point in results["points"]:
        x, y = point["mean"][key], point["mean"]["headline"]
        if point["axis"] != axis or x is None or y is None:
            continue
        colour = BASE_COLOUR if point["run"] == "base" else POINT_COLOUR
        low, high = point["change"]["low"], point["change"]["high"]
        unknown = None in (before["headline"], low, high)
        interval = None if unknown else (before["headline"] + low, before["headline"] + high)
        yield Mark(point["value"], x, y, colour, interval)


def _draw(panel: Any, marks: Sequence[Mark]) -> None:
    for mark in marks:
        if mark.interval:
            panel.plot([mark.x, mark.x], mark.interval, color=mark.colour, lw=1, alpha=0.35)
        panel.plot(mark.x, mark.y, "o", color=mark.colour, ms=5)


def label_beside(panel: Any, marks: Sequence[Mark], gap: float) -> None:
    """Name the dots beside the panel, where the names hide none, each with a line to its own.

    Args:
        panel: with the limits that it will have.
        gap: between two names, of the panel's height.
    """
    low, high = panel.get_ylim()
    heights = spread([(mark.y - low) / (high - low) for mark in marks], gap)
    for mark, height in zip(marks, heights, strict=True):
        panel.annotate(
            mark.name,
            (mark.x, mark.y),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            color=mark.colour,
            arrowprops=_LINE | {"color": mark.colour},
        )
