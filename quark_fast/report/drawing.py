"""What every plot shares: colours that follow the reader's theme, one style, and the figure as inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# role: (on light paper, on dark paper). The samplings are Okabe and Ito's colour-blind-safe hues,
# lightened for the dark; a quantile between is grey.
_COLOURS = {
    "ink": ("#1f2024", "#ebe9e4"),
    "muted": ("#63656b", "#a3a4a9"),
    "line": ("#e4e1da", "#34363b"),
    "base": ("#777a82", "#a3a6ae"),
    "none": ("#a8578a", "#d891bc"),
    "worst": ("#cf5a00", "#f08c48"),
    "middle": ("#a9a59c", "#85868b"),
    "best": ("#0b6fae", "#55abe3"),
    "guided": ("#008562", "#35bf95"),
    "paper": ("#faf9f6", "#17181b"),
    "card": ("#ffffff", "#1e2024"),
    "warn": ("#8a5a00", "#e0b050"),
}


class Palette:
    """Colours by role, one for each theme.

    Matplotlib draws with a placeholder colour for each role and `bind` puts a CSS variable in its
    place, so the reader's theme decides. Quantiles run from the worst token's colour to the best's.
    """

    def __init__(self, quantiles: int) -> None:
        self._colours = dict(_COLOURS)
        for k in range(quantiles):
            position = k / (quantiles - 1) if quantiles > 1 else 1.0
            worst, middle, best = (_COLOURS[way] for way in ("worst", "middle", "best"))
            self._colours[f"quantile-{k}"] = (
                _mix(worst[0], middle[0], best[0], position),
                _mix(worst[1], middle[1], best[1], position),
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


def _mix(first: str, middle: str, last: str, position: float) -> str:
    """The colour at `position` in 0..1 on the way first - middle - last."""
    stops = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (first, middle, last)]
    mixed = [np.interp(position, [0, 0.5, 1], channel) for channel in zip(*stops, strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


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


# Inches; an inch is shown as 72 CSS pixels or scaled to the page.
_PLOT_SIZE = (4.7, 2.9)


def new_figure(
    size: tuple[float, float] = _PLOT_SIZE, panels: tuple[int, int] = (1, 1), share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with rows and columns of panels, and its panels in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*panels, sharey=share_y, squeeze=False).ravel().tolist()


def panel_grid(
    titles: Sequence[str], x: str, palette: Palette, above: float = 0.3
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, three in a row, over whole numbers of ``x``; these panels.

    Args:
        above: room over the panels, inches.
    """
    height = -(-len(titles) // 3)
    figure, panels = new_figure((9.6, above + 2.1 * height), (height, 3))
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=9.5, color=palette["ink"])
        axes.set_xlabel(x)
        whole_ticks(axes)
    for axes in panels[len(titles) :]:
        axes.set_visible(False)
    return figure, panels[: len(titles)]


def inline_svg(figure: Figure, name: str, label: str, palette: Palette) -> str:
    """The figure for an HTML page.

    Args:
        name: prefix of the ids in the SVG, different for each plot of a page.
        label: what a screen reader reads out.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    canvas = FigureCanvasSVG(figure)
    figure.dpi = 72  # what an SVG is drawn with, so that the panels are laid out for its sizes of text
    if layout := figure.get_layout_engine():
        # Once, without drawing: savefig draws everything twice, first for the sake of the layout.
        layout.execute(figure)
        figure.set_layout_engine("none")
    file = io.StringIO()
    canvas.print_svg(file, metadata={"Date": None})  # type: ignore[no-untyped-call]
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return palette.bind(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved no more than it takes for any two to be ``gap`` apart; their order stays."""
    stacks: list[list[int]] = []  # labels that touch, bottom to top; each stack is centred on its own

    def middle(stack: Sequence[int]) -> float:
        return sum(heights[i] for i in stack) / len(stack)

    for i in sorted(range(len(heights)), key=heights.__getitem__):
        stacks.append([i])
        while len(stacks) > 1:
            below, above = stacks[-2:]
            if middle(above) - middle(below) >= gap * len(above) / 2 + gap * len(below) / 2:
                break
            stacks[-2:] = [below + above]
    moved = [0.0] * len(heights)
    for stack in stacks:
        for index, i in enumerate(stack):
            moved[i] = middle(stack) + gap * (index - (len(stack) - 1) / 2)
    return moved


def label_line_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names lines (y, text, colour) at their right end, pushed apart where they would overlap."""
    labels = sorted(label for label in labels if math.isfinite(label[0]))
    if not labels:
        return
    low, high = axes.get_ylim()
    # 9.5-point text needs 0.155 inch; a panel is about three quarters as high as its figure.
    gap = 0.155 * (high - low) / (0.75 * _PLOT_SIZE[1])
    wanted = [label[0] for label in labels]
    for y, (_, text, colour) in zip(spread(wanted, gap), labels, strict=True):
        axes.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )


def whole_ticks(axes: Axes) -> None:
    """Whole numbers alone on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
