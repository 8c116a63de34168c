"""The plots of the page, as inline SVG in colours that follow the reader's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quark_fast.files.safe_text import clean
from quark_fast.report.columns import fill, find_column, main_columns
from quark_fast.report.files import Run
from quark_fast.report.results import (
    Mode,
    after_names,
    base_row,
    interval_of,
    mode_of,
    name_of,
    rows_of,
)
from quark_fast.report.rows import Array, lists_of, number_of, series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# role: (on light paper, on dark paper). The samplings are Okabe and Ito's colour-blind-safe hues,
# lightened for the dark; a quantile between is grey.
_COLOURS = {
    "ink": ("#1f2024", "#ebe9e4"),
    "muted": ("#63656b", "#a3a4a9"),
    "line": ("#e4e1da", "#34363b"),
    "untouched": ("#777a82", "#a3a6ae"),
    "none": ("#a8578a", "#d891bc"),
    "worst": ("#cf5a00", "#f08c48"),
    "middle": ("#a9a59c", "#85868b"),
    "best": ("#0b6fae", "#55abe3"),
    "guided": ("#008562", "#35bf95"),
}


class Palette:
    """Colours by role, one for each theme.

    Matplotlib draws with a placeholder colour for each role and `bind` puts a CSS variable in its
    place, so the reader's theme decides. Quantiles run from the worst token's colour to the best's.
    """

    def __init__(self, quantiles: int) -> None:
        self._colours = dict(_COLOURS)
        for k in range(quantiles):
            place = k / (quantiles - 1) if quantiles > 1 else 1.0
            worst, middle, best = (_COLOURS[mode] for mode in ("worst", "middle", "best"))
            self._colours[f"quantile-{k}"] = (
                _mix(worst[0], middle[0], best[0], place),
                _mix(worst[1], middle[1], best[1], place),
            )

    def __getitem__(self, role: str) -> str:
        return f"#0a{0x0B00 + list(self._colours).index(role):04x}"

    def css(self, theme: Literal["light", "dark"]) -> str:
        index = 0 if theme == "light" else 1
        return " ".join(f"--{role}: {pair[index]};" for role, pair in self._colours.items())

    def bind(self, svg: str) -> str:
        for role in self._colours:
            svg = svg.replace(self[role], f"var(--{role})")
        return svg


def _mix(first: str, middle: str, last: str, place: float) -> str:
    """The colour at `place` in 0..1 on the way first - middle - last."""
    stops = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (first, middle, last)]
    mixed = [np.interp(place, [0, 0.5, 1], channel) for channel in zip(*stops, strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


_PLOT_SIZE = (4.7, 2.9)


@contextmanager
def plot_style(palette: Palette) -> Iterator[None]:
    """Matplotlib's settings for the plots, put back afterwards."""
    import matplotlib

    line, muted = palette["line"], palette["muted"]
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": "quark_fast",  # ids by content: equal runs give equal bytes
        "text.parse_math": False,
        "text.color": palette["ink"],
        "font.size": 9.5,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.edgecolor": line,
        "axes.labelcolor": muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.8,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "ytick.major.size": 0,
        "lines.solid_capstyle": "round",
        "lines.linewidth": 2,
    }
    with matplotlib.rc_context(settings):
        yield


def _plot(
    name: str,
    label: str,
    palette: Palette,
    draw: Callable[[Sequence[Axes]], None],
    size: tuple[float, float] = _PLOT_SIZE,
    panels: tuple[int, int] = (1, 1),
    share_y: bool = False,
) -> str:
    """An inline SVG of what `draw` puts on the axes.

    Args:
        name: prefix of the ids in the SVG, different for each plot of a page.
        label: what a screen reader says.
        size: inches; an inch is shown as 72 CSS pixels or scaled to the page.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(*panels, sharey=share_y, squeeze=False).ravel().tolist())
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return palette.bind(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names lines (y, text, colour) at their right end, pushed apart where they would overlap."""
    labels = sorted(label for label in labels if math.isfinite(label[0]))
    if not labels:
        return
    low, high = axes.get_ylim()
    # 9.5-point text needs 0.155 inch; a panel is about three quarters as high as its figure.
    gap = 0.155 * (high - low) / (0.75 * _PLOT_SIZE[1])
    wanted = np.array([label[0] for label in labels])
    placed = wanted.copy()
    for i in range(1, placed.size):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed += (wanted - placed).mean()
    for y, (_, text, colour) in zip(placed, labels, strict=True):
        axes.annotate(
            text,
            (1, float(y)),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _round_ticks(axes: Axes, rounds: Array) -> None:
    _whole_ticks(axes)
    if rounds.size == 1:
        axes.set_xticks(rounds)


def plot_samplings(run: Run, palette: Palette) -> str:
    """The first metric, perplexity and variety of each sampling with intervals, side by side."""
    rows = rows_of(run.evaluation)
    shown = main_columns(run.evaluation)
    before = base_row(run.evaluation)

    def draw(panels: Sequence[Axes]) -> None:
        for axes, column in zip(panels, shown, strict=True):
            if before is not None:
                value = interval_of(before, column.key).value
                axes.axvline(value, color=palette["untouched"], lw=1, ls=(0, (2, 3)))
            for place, row in enumerate(rows):
                colour = palette[mode_of(name_of(row))]
                number = interval_of(row, column.key)
                axes.plot([number.low, number.high], [place, place], color=colour)
                axes.plot(number.value, place, "o", color=colour, ms=7)
            if column.key == "dist3":  # else hundredths would look like a landslide
                low, high = axes.get_xlim()
                more = max(0.0, 0.1 - (high - low)) / 2
                axes.set_xlim(low - more, high + more)
            axes.set_xlabel(fill(column.title, run.evaluation))
            axes.grid(visible=False, axis="y")
            axes.grid(axis="x")
            axes.margins(y=0.15)
        panels[0].set_yticks(range(len(rows)), [name_of(row) for row in rows])
        panels[0].tick_params(axis="y", labelcolor=palette["ink"])
        panels[0].invert_yaxis()

    if not rows:
        return ""
    names = [fill(column.title, run.evaluation) for column in shown]
    label = f"{', '.join(names)} of each way of sampling, with intervals"
    size = (9.6, 0.9 + 0.3 * len(rows))
    return _plot("samplings", label, palette, draw, size, (1, len(shown)), share_y=True)


_DIALS = {
    "guidance": "guidance w  (0: worst token, 1: best token alone)",
    "quantile": "quantile whose token stands in front",
}


def plot_dial(run: Run, palette: Palette, dial: Literal["guidance", "quantile"], metric: str) -> str:
    """The metric over the guidance w, or over the quantile in front."""
    rows = [row for row in rows_of(run.evaluation) if math.isfinite(number_of(row, dial))]
    rows.sort(key=lambda row: number_of(row, dial))
    column = find_column(metric)
    before = base_row(run.evaluation)

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        if before is not None:
            base, grey = interval_of(before, metric), palette["untouched"]
            axes.axhspan(base.low, base.high, color=grey, alpha=0.15, lw=0)
            axes.axhline(base.value, color=grey, lw=1.2, ls=(0, (2, 3)))
        places = [number_of(row, dial) for row in rows]
        numbers = [interval_of(row, metric) for row in rows]
        axes.plot(places, [number.value for number in numbers], color=palette["muted"], lw=1, alpha=0.6)
        for at, row, number in zip(places, rows, numbers, strict=True):
            colour = palette[mode_of(name_of(row))]
            axes.plot([at, at], [number.low, number.high], color=colour)
            axes.plot(at, number.value, "o", color=colour, ms=7)
        axes.set_xlabel(_DIALS[dial])
        axes.set_ylabel(fill(column.title, run.evaluation))
        axes.margins(x=0.08, y=0.12)
        if dial == "quantile":
            _whole_ticks(axes)
        if before is not None:
            mode = mode_of(name_of(before))
            _end_labels(axes, [(base.value, mode if mode == "untouched" else "first row", grey)])

    if len(rows) < 2:
        return ""
    label = f"{fill(column.title, run.evaluation)} over the {dial}"
    return _plot(f"{dial}-{metric}", label, palette, draw)


def _scores_by_row(run: Run) -> list[tuple[str, Mode, Array]]:
    """(name, mode, scores) of the untouched row, the best token's and the headline's."""
    found: list[tuple[str, Mode, Array]] = []
    before = base_row(run.evaluation)
    for name in [*([str(before.get("name"))] if before else []), *after_names(run.evaluation)]:
        scores = series_of([row for row in run.evaluation_rows if row.get("row") == name], "score")
        scores = scores[~np.isnan(scores)]
        if scores.size:
            found.append((clean(name), mode_of(name), scores))
    return found


def plot_histogram(run: Run, palette: Palette) -> str:
    """Share of completions in each tenth of the score, untouched and after."""
    groups = _scores_by_row(run)

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        top = max(1.0, max(float(scores.max()) for _, _, scores in groups))
        bottom = min(0.0, min(float(scores.min()) for _, _, scores in groups))
        edges = np.linspace(bottom, top, 11)
        width = (edges[1] - edges[0]) / (len(groups) + 0.6)
        for place, (name, mode, scores) in enumerate(groups):
            share = 100 * np.histogram(scores, edges)[0] / scores.size
            left = edges[:-1] + (place + 0.3) * width
            axes.bar(left, share, 0.88 * width, align="edge", color=palette[mode], label=name)
        axes.set_xticks(edges[::2])
        axes.set_xlabel(run_property)
        axes.set_ylabel("completions, %")
        axes.legend(frameon=False, loc="upper right", handlelength=0.9, handleheight=0.9)

    if not groups:
        return ""
    run_property = fill("{property}", run.evaluation)
    return _plot("histogram", f"Histogram of {run_property} before and after", palette, draw)


def plot_exceedance(run: Run, palette: Palette) -> str:
    """Share of completions with at least a given score: the upper tail, which a histogram hides."""
    groups = _scores_by_row(run)

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        ends = []
        for name, mode, scores in groups:
            ordered = np.sort(scores)
            share = 100 * np.arange(ordered.size, 0, -1) / ordered.size
            axes.step(ordered, share, where="pre", color=palette[mode], lw=1.8)
            ends.append((float(np.mean(scores >= 0.5)) * 100, name, palette[mode]))
        axes.set_yscale("log")
        axes.set_ylim(min(1.0, 100 / max(scores.size for _, _, scores in groups)), 105)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.minorticks_off()
        axes.set_xlabel(f"{run_property} of at least")
        axes.set_ylabel("completions, % (log scale)")
        for place, (_, name, colour) in enumerate(sorted(ends, reverse=True)):
            axes.text(0.98, 0.95 - 0.09 * place, name, color=colour, ha="right", transform=axes.transAxes)

    if not groups:
        return ""
    run_property = fill("{property}", run.evaluation)
    return _plot("exceedance", f"Share of completions above each {run_property}", palette, draw)


def plot_rewards(run: Run, palette: Palette) -> str:
    """Mean reward of new samples and of each quantile of the pool, over the rounds."""
    rounds = series_of(run.rounds, "round")
    table = lists_of(run.rounds, "reward_by_quantile")
    mean = series_of(run.rounds, "reward_mean")
    last = table.shape[1] - 1

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        for k in range(last + 1):
            axes.plot(rounds, table[:, k], "o-", color=palette[f"quantile-{k}"], lw=1.6, ms=4)
        axes.plot(rounds, mean, "o-", color=palette["ink"], lw=2.4, ms=5)
        axes.set_xlabel("round  (0: sampled from the untouched model)")
        axes.set_ylabel("mean reward")
        _round_ticks(axes, rounds)
        names = {0: "quantile 0 (worst)", last: f"quantile {last} (best)"}
        labels = [
            (float(table[-1, k]), names.get(k, f"quantile {k}"), palette[f"quantile-{k}"])
            for k in range(last + 1)
        ]
        _end_labels(axes, [*labels, (float(mean[-1]), "new samples", palette["ink"])])

    if not run.rounds:
        return ""
    return _plot("rewards", "Mean reward by round and quantile", palette, draw)


def plot_thresholds(run: Run, palette: Palette) -> str:
    """The rewards that part neighbouring quantiles of the pool, over the rounds."""
    rounds = series_of(run.rounds, "round")
    table = lists_of(run.rounds, "thresholds")

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        labels = []
        for k in range(table.shape[1]):
            colour = palette[f"quantile-{k + 1}"]
            axes.plot(rounds, table[:, k], "o-", color=colour, lw=1.6, ms=4)
            labels.append((float(table[-1, k]), f"{k} | {k + 1}", colour))
        axes.set_xlabel("round")
        axes.set_ylabel("reward")
        _round_ticks(axes, rounds)
        _end_labels(axes, labels)

    if not table.size:
        return ""
    return _plot("thresholds", "Rewards at the quantile boundaries by round", palette, draw)


_STEP_PANELS = (
    ("loss", "loss, nats per token"),
    ("nll", "nll, nats per token"),
    ("kl", "KL to the reference, nats per token"),
    ("entropy", "entropy, nats per token"),
    ("unlikelihood", "unlikelihood, nats per token"),
    ("kl_coef", "weight of the KL, adapted"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_s", "tokens per second"),
)


def plot_steps(run: Run, palette: Palette) -> str:
    """What is minimised and its parts, every step and smoothed."""
    steps = series_of(run.steps, "step")
    every = [(title, series_of(run.steps, key)) for key, title in _STEP_PANELS]
    panels_shown = [(title, values) for title, values in every if np.isfinite(values).any()]
    explored = series_of(run.rounds, "step")

    def draw(panels: Sequence[Axes]) -> None:
        for axes, (title, values) in zip(panels, panels_shown, strict=False):
            for step in explored[(explored > steps[0]) & (explored < steps[-1])]:
                axes.axvline(step, color=palette["line"], lw=1)
            axes.plot(steps, values, color=palette["best"], lw=0.8, alpha=0.4)
            axes.plot(steps, smooth(values), color=palette["best"])
            axes.set_title(title, loc="left", fontsize=9.5, color=palette["ink"])
            axes.set_xlabel("step")
            _whole_ticks(axes)
        for axes in panels[len(panels_shown) :]:
            axes.set_visible(False)

    if not panels_shown:
        return ""
    height = -(-len(panels_shown) // 3)
    size = (9.6, 0.3 + 2.1 * height)
    return _plot("steps", "Loss and its parts by step", palette, draw, size, (height, 3))


def plot_probe(run: Run, palette: Palette) -> str:
    """The probe's rank correlation over steps, one standard error each way."""
    steps, error = series_of(run.probes, "step"), series_of(run.probes, "standard_error")
    value = series_of(run.probes, "rank_correlation")

    def draw(panels: Sequence[Axes]) -> None:
        (axes,) = panels
        axes.axhline(0, color=palette["muted"], lw=1)
        axes.vlines(steps, value - error, value + error, color=palette["best"], lw=1.4, alpha=0.7)
        axes.plot(steps, value, "o-", color=palette["best"], ms=5, lw=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel("rank correlation")
        _whole_ticks(axes)

    if not np.isfinite(value).any():
        return ""
    label = "Rank correlation of the probe by step"
    return _plot("probe", label, palette, draw, (9.6, 2.3))


def smooth(values: Array) -> Array:
    """Exponential moving average over about a twentieth of the series, without its start-up bias.

    m_t = sum_{s<=t} decay^(t-s) x_s / sum_{s<=t} decay^(t-s) (Kingma and Ba, "Adam", 2015,
    section 3, for the correction); a value that is not finite is passed over.
    """
    decay = 1 - 1 / max(1.0, values.size / 20)
    total = weight = 0.0
    smoothed = np.full(values.size, np.nan)
    for index, value in enumerate(values.tolist()):
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        if weight:
            smoothed[index] = total / weight
    return smoothed
