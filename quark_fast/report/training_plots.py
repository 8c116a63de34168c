"""Plots of a training run: rewards and quantile boundaries by round, the loss and the probe by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from quark_fast.errors import UsageError
from quark_fast.files.safe_text import clean
from quark_fast.keep_best import Goal
from quark_fast.report.columns import one_line
from quark_fast.report.drawing import (
    Palette,
    inline_svg,
    label_line_ends,
    new_figure,
    panel_grid,
    whole_ticks,
)
from quark_fast.report.files import RunFiles
from quark_fast.report.records import Array, Record, along, lists_of, number_of, series_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_rewards(run: RunFiles, palette: Palette) -> str:
    """Mean reward of new samples and of each quantile of the pool, over the rounds."""
    if not run.rounds:
        return ""
    figure, (axes,) = new_figure()
    table = lists_of(run.rounds, "reward_by_quantile")
    last = table.shape[1] - 1
    names = {0: "quantile 0 (worst)", last: f"quantile {last} (best)"}
    labels = [
        _over_rounds(axes, run, table[:, k], names.get(k, f"quantile {k}"), palette[f"quantile-{k}"])
        for k in range(last + 1)
    ]
    mean = series_of(run.rounds, "reward_mean")
    labels.append(_over_rounds(axes, run, mean, "new samples", palette["ink"], lw=2.4, ms=5))
    axes.set_xlabel("round  (1: sampled from the base model)")
    axes.set_ylabel("mean reward")
    label_line_ends(axes, labels)
    return inline_svg(figure, "rewards", "Mean reward by round and quantile", palette)


def plot_thresholds(run: RunFiles, palette: Palette) -> str:
    """The rewards that part neighbouring quantiles of the pool, over the rounds."""
    table = lists_of(run.rounds, "thresholds")
    if not table.size:
        return ""
    figure, (axes,) = new_figure()
    labels = [
        _over_rounds(axes, run, table[:, k], f"{k} | {k + 1}", palette[f"quantile-{k + 1}"])
        for k in range(table.shape[1])
    ]
    axes.set_xlabel("round")
    axes.set_ylabel("reward")
    label_line_ends(axes, labels)
    return inline_svg(figure, "thresholds", "Rewards at the quantile boundaries by round", palette)


def _over_rounds(
    axes: Axes, run: RunFiles, values: Array, name: str, colour: str, lw: float = 1.6, ms: float = 4
) -> tuple[float, str, str]:
    """Draws a value of each round; returns the label of the line's end."""
    rounds = along(run.rounds, "round")
    axes.plot(rounds, values, "o-", color=colour, lw=lw, ms=ms)
    whole_ticks(axes)
    if rounds.size == 1:
        axes.set_xticks(rounds)
    return float(values[-1]), name, colour


STEP_PANELS = (
    ("loss", "loss, nats per token"),
    ("contrast", "contrast with the mirror token"),
    ("base_contrast", "contrast with the base model"),
    ("nll", "nll, nats per token"),
    ("kl", "KL to the base model, nats per token"),
    ("prompt_kl", "KL on the prompts' tokens, nats per token"),
    ("entropy", "entropy, nats per token"),
    ("unlikelihood", "unlikelihood, nats per token"),
    ("kl_coef", "weight of the KL, adapted"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_s", "tokens per second"),
)


def plot_steps(run: RunFiles, palette: Palette) -> str:
    """What is minimised and its parts, every step and smoothed."""
    every = [(title, series_of(run.steps, key)) for key, title in STEP_PANELS]
    shown = [(title, values) for title, values in every if np.isfinite(values).any()]
    if not shown:
        return ""
    steps, explored = series_of(run.steps, "step"), series_of(run.rounds, "step")
    figure, panels = panel_grid([title for title, _ in shown], "step", palette)
    for axes, (_, values) in zip(panels, shown, strict=True):
        for step in explored[(explored > steps[0]) & (explored < steps[-1])]:
            axes.axvline(step, color=palette["line"], lw=1)
        axes.plot(steps, values, color=palette["best"], lw=0.8, alpha=0.4)
        axes.plot(steps, smooth(values), color=palette["best"])
    return inline_svg(figure, "steps", "Loss and its parts by step", palette)


def plot_probe(run: RunFiles, palette: Palette) -> str:
    """The probe's rank correlation over steps, one standard error each way."""
    steps, error = series_of(run.probes, "step"), series_of(run.probes, "standard_error")
    value = series_of(run.probes, "rank_correlation")
    if not np.isfinite(value).any():
        return ""
    figure, (axes,) = new_figure((9.6, 2.3))
    axes.axhline(0, color=palette["muted"], lw=1)
    axes.vlines(steps, value - error, value + error, color=palette["best"], lw=1.4, alpha=0.7)
    axes.plot(steps, value, "o-", color=palette["best"], ms=5, lw=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("rank correlation")
    whole_ticks(axes)
    return inline_svg(figure, "probe", "Rank correlation of the probe by step", palette)


def plot_compared(run: RunFiles, palette: Palette) -> str:
    """Every measure by which rounds may be compared, over the rounds; the one that was kept; the bounds."""
    tables = [_object_of(record, "measures") for record in run.compared]
    names = [name for name in dict.fromkeys(name for table in tables for name in table)][:24]
    shown = {name: series_of(tables, name) for name in names}
    if run.evaluation.get("property") != "reward" and len(shown) > 1:
        shown.pop("reward", None)  # 1 - the property, which is there
    shown = {name: values for name, values in shown.items() if np.isfinite(values).any()}
    if not shown:
        return ""
    rounds, kept = series_of(run.compared, "round"), run.kept
    goal = _goal_of(kept)
    titles = [f"{name}: {goal.direction}" if goal and name == goal.measure else name for name in shown]
    figure, panels = panel_grid([one_line(clean(title))[:40] for title in titles], "round", palette)
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        bounds = lists_of([_object_of(record, "intervals") for record in run.compared], name)
        if bounds.shape[1] == 2:
            axes.vlines(rounds, bounds[:, 0], bounds[:, 1], color=palette["best"], lw=1.4, alpha=0.5)
        axes.plot(rounds, values, "o-", color=palette["best"], ms=4, lw=1.4)
        at = rounds == number_of(kept, "round")
        axes.plot(rounds[at], values[at], "o", color=palette["guided"], ms=8)
        for bound in goal.bounds if goal else ():
            if bound.measure == name and rounds[0] == 0:
                axes.axhline(bound.factor * values[0], color=palette["warn"], lw=1.2, ls="--")
    return inline_svg(figure, "compared", "Measures on development prompts by round", palette)


def _object_of(record: Record, key: str) -> Record:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def _goal_of(kept: Record) -> Goal | None:
    """By what the round was kept; None where a file has something else there."""
    try:
        return Goal.parse(str(kept.get("keep_best")))
    except UsageError:
        return None


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
