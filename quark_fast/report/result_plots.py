"""Plots of an evaluation: each way of sampling, the dials, and how the scores are distributed."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from quark_fast.files.safe_text import clean
from quark_fast.report.columns import fill, find_column, main_columns
from quark_fast.report.drawing import Palette, inline_svg, label_line_ends, new_figure, whole_ticks
from quark_fast.report.files import RunFiles
from quark_fast.report.records import Array, number_of, series_of
from quark_fast.report.results import (
    BASE,
    Way,
    after_names,
    base_row,
    interval_of,
    name_of,
    rows_of,
    way_of,
)


def plot_samplings(run: RunFiles, palette: Palette) -> str:
    """The first metric, perplexity and variety of each sampling with intervals, side by side."""
    rows = rows_of(run.evaluation)
    if not rows:
        return ""
    shown = main_columns(run.evaluation)
    titles = [fill(column.title, run.evaluation) for column in shown]
    figure, panels = new_figure((9.6, 0.9 + 0.3 * len(rows)), (1, len(shown)), share_y=True)
    for axes, column, title in zip(panels, shown, titles, strict=True):
        base = interval_of(rows[0], column.key).value
        axes.axvline(base, color=palette["base"], lw=1, ls=(0, (2, 3)))
        for y, row in enumerate(rows):
            colour = palette[way_of(name_of(row))]
            number = interval_of(row, column.key)
            axes.plot([number.low, number.high], [y, y], color=colour)
            axes.plot(number.value, y, "o", color=colour, ms=7)
        if column.key == "dist3":  # else hundredths would look like a landslide
            low, high = axes.get_xlim()
            more = max(0.0, 0.1 - (high - low)) / 2
            axes.set_xlim(low - more, high + more)
        axes.set_xlabel(title)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        axes.margins(y=0.15)
    panels[0].set_yticks(range(len(rows)), [name_of(row) for row in rows])
    panels[0].tick_params(axis="y", labelcolor=palette["ink"])
    panels[0].invert_yaxis()
    label = f"{', '.join(titles)} of each way of sampling, with intervals"
    return inline_svg(figure, "samplings", label, palette)


_DIALS = {
    "guidance": "guidance w  (0: worst token, 1: best token alone)",
    "quantile": "quantile whose token stands in front",
}


def plot_dial(run: RunFiles, palette: Palette, dial: Literal["guidance", "quantile"], metric: str) -> str:
    """The metric over the guidance w, or over the quantile in front; empty where no curve is to be drawn."""
    rows = [row for row in rows_of(run.evaluation) if math.isfinite(number_of(row, dial))]
    before = base_row(run.evaluation)
    # The worst and the best quantile alone are w = 0 and w = 1.
    if len(rows) < {"guidance": 2, "quantile": 3}[dial] or before is None:
        return ""
    rows.sort(key=lambda row: number_of(row, dial))
    title = fill(find_column(metric).title, run.evaluation)
    figure, (axes,) = new_figure()
    base, grey = interval_of(before, metric), palette["base"]
    axes.axhspan(base.low, base.high, color=grey, alpha=0.15, lw=0)
    axes.axhline(base.value, color=grey, lw=1.2, ls=(0, (2, 3)))
    xs = [number_of(row, dial) for row in rows]
    numbers = [interval_of(row, metric) for row in rows]
    axes.plot(xs, [number.value for number in numbers], color=palette["muted"], lw=1, alpha=0.6)
    for x, row, number in zip(xs, rows, numbers, strict=True):
        colour = palette[way_of(name_of(row))]
        axes.plot([x, x], [number.low, number.high], color=colour)
        axes.plot(x, number.value, "o", color=colour, ms=7)
    axes.set_xlabel(_DIALS[dial])
    axes.set_ylabel(title)
    axes.margins(x=0.08, y=0.12)
    if dial == "quantile":
        whole_ticks(axes)
    label_line_ends(axes, [(base.value, BASE if way_of(name_of(before)) == "base" else "first row", grey)])
    return inline_svg(figure, f"{dial}-{metric}", f"{title} over the {dial}", palette)


def _scores_by_row(run: RunFiles) -> list[tuple[str, Way, Array]]:
    """(name, way, scores) of the base model's row, the best token's and the headline's."""
    found: list[tuple[str, Way, Array]] = []
    before = base_row(run.evaluation)
    for name in [*([str(before.get("name"))] if before else []), *after_names(run.evaluation)]:
        scores = series_of([row for row in run.evaluation_rows if row.get("row") == name], "score")
        scores = scores[~np.isnan(scores)]
        if scores.size:
            found.append((clean(name), way_of(name), scores))
    return found


def plot_histogram(run: RunFiles, palette: Palette) -> str:
    """Share of completions in each tenth of the score, before and after."""
    groups = _scores_by_row(run)
    if not groups:
        return ""
    scored = fill("{property}", run.evaluation)
    figure, (axes,) = new_figure()
    top = max(1.0, max(float(scores.max()) for _, _, scores in groups))
    bottom = min(0.0, min(float(scores.min()) for _, _, scores in groups))
    edges = np.linspace(bottom, top, 11)
    width = (edges[1] - edges[0]) / (len(groups) + 0.6)
    for index, (name, way, scores) in enumerate(groups):
        share = 100 * np.histogram(scores, edges)[0] / scores.size
        left = edges[:-1] + (index + 0.3) * width
        axes.bar(left, share, 0.88 * width, align="edge", color=palette[way], label=name)
    axes.set_xticks(edges[::2])
    axes.set_xlabel(scored)
    axes.set_ylabel("completions, %")
    axes.legend(frameon=False, loc="upper right", handlelength=0.9, handleheight=0.9)
    return inline_svg(figure, "histogram", f"Histogram of {scored} before and after", palette)


def plot_exceedance(run: RunFiles, palette: Palette) -> str:
    """Share of completions with at least a given score: the upper tail, which a histogram hides."""
    groups = _scores_by_row(run)
    if not groups:
        return ""
    scored = fill("{property}", run.evaluation)
    figure, (axes,) = new_figure()
    ends = []
    for name, way, scores in groups:
        ordered = np.sort(scores)
        share = 100 * np.arange(ordered.size, 0, -1) / ordered.size
        axes.step(ordered, share, where="pre", color=palette[way], lw=1.8)
        ends.append((float(np.mean(scores >= 0.5)) * 100, name, palette[way]))
    axes.set_yscale("log")
    axes.set_ylim(min(1.0, 100 / max(scores.size for _, _, scores in groups)), 105)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()
    axes.set_xlabel(f"{scored} of at least")
    axes.set_ylabel("completions, % (log scale)")
    for index, (_, name, colour) in enumerate(sorted(ends, reverse=True)):
        axes.text(0.98, 0.95 - 0.09 * index, name, color=colour, ha="right", transform=axes.transAxes)
    return inline_svg(figure, "exceedance", f"Share of completions above each {scored}", palette)
