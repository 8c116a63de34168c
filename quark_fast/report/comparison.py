"""Several runs on one page: curves over one another, settings that differ, their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quark_fast.config import Config
from quark_fast.report.drawing import (
    Palette,
    inline_svg,
    label_line_ends,
    new_figure,
    panel_grid,
    plot_style,
    whole_ticks,
)
from quark_fast.report.files import RunFiles
from quark_fast.report.records import Record, along, series_of
from quark_fast.report.training_plots import STEP_PANELS, smooth

# Colours of the runs in their order; then again.
_COLOURS = ("best", "worst", "guided", "none", "warn", "base")
# Settings of which every run has its own.
_OWN = ("output", "resume", "from_run", "push_to_hub", "hub_private_repo")


@dataclass(frozen=True)
class Compared:
    """Runs beside one another.

    Attributes:
        runs: their files by a short name.
        settings: setting -> its value in each run, of those that differ.
        why_apart: why their tables do not stand in one; empty where they do.
    """

    runs: Mapping[str, RunFiles]
    settings: Mapping[str, Sequence[str]]
    why_apart: str = ""

    def colour(self, name: str) -> str:
        return _COLOURS[list(self.runs).index(name) % len(_COLOURS)]


def differing(files: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings of config.yaml files whose values are not the same in all, with the value of each.

    The files may be of several versions: one that lacks a setting had a default that is not known here.
    """
    known = [field.name for field in dataclasses.fields(Config)]
    found = {}
    for name in dict.fromkeys([*known, *(name for file in files for name in file)]):
        values = [file.get(name, "not there") for file in files]
        if name not in _OWN and any(value != values[0] for value in values):
            found[name] = [str(value) for value in values]
    return found


def comparison_plots(compared: Compared, palette: Palette) -> dict[str, str]:
    """name -> SVG, in place of a run's own; empty: no run has the values, or one picture cannot show them."""
    with plot_style(palette):
        return {
            "histogram": "",  # of the first run's rows alone
            "exceedance": "",
            "rewards": _over(
                compared,
                palette,
                "rewards",
                "mean reward of new samples",
                "round",
                lambda run: run.rounds,
                "reward_mean",
            ),
            "probe": _over(
                compared,
                palette,
                "probe",
                "rank correlation",
                "step",
                lambda run: run.probes,
                "rank_correlation",
            ),
            "steps": _steps(compared, palette),
        }


def _over(
    compared: Compared,
    palette: Palette,
    name: str,
    title: str,
    x: str,
    rows: Callable[[RunFiles], list[Record]],
    key: str,
) -> str:
    """A value by round or step, one line a run, named at its end."""
    figure, (axes,) = new_figure()
    labels = []
    for run_name, run in compared.runs.items():
        values = series_of(rows(run), key)
        if np.isfinite(values).any():
            colour = palette[compared.colour(run_name)]
            axes.plot(along(rows(run), x), values, "o-", color=colour, lw=1.6, ms=4)
            labels.append((float(values[np.isfinite(values)][-1]), run_name, colour))
    if not labels:
        return ""
    axes.set_xlabel(x)
    axes.set_ylabel(title)
    whole_ticks(axes)
    label_line_ends(axes, labels)
    return inline_svg(figure, name, f"{title.capitalize()} by {x}, of each run", palette)


def _steps(compared: Compared, palette: Palette) -> str:
    """The terms of the loss, smoothed, one line a run; the runs' names stand above."""
    series = {
        title: {name: series_of(run.steps, key) for name, run in compared.runs.items()}
        for key, title in STEP_PANELS
    }
    shown = [(t, runs) for t, runs in series.items() if any(np.isfinite(v).any() for v in runs.values())]
    if not shown:
        return ""
    figure, panels = panel_grid([title for title, _ in shown], "step", palette, above=0.6)
    for axes, (_, runs) in zip(panels, shown, strict=True):
        for name, values in runs.items():
            steps, colour = series_of(compared.runs[name].steps, "step"), palette[compared.colour(name)]
            axes.plot(steps, smooth(values), color=colour, lw=1.6)
    lines: list[Any] = panels[0].get_lines()
    figure.legend(lines, list(compared.runs), loc="outside upper left", ncols=4, frameon=False)
    return inline_svg(figure, "steps", "Loss and its parts by step, of each run", palette)
