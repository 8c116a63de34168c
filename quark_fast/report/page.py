"""The page: one HTML file that stands alone and follows the reader's light or dark theme.

Its words are in page.html.jinja, its style is in page.css; here is what they show. Every value that the
template writes is cleaned and escaped, whoever wrote it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from quark_fast.files.atomic import replacing
from quark_fast.files.safe_text import clean
from quark_fast.report.columns import (
    Column,
    columns_of,
    counted,
    fill,
    format_value,
    main_columns,
    scores_are_rewards,
)
from quark_fast.report.comparison import Compared, comparison_plots
from quark_fast.report.drawing import Palette, plot_style
from quark_fast.report.files import RunFiles, read_run
from quark_fast.report.records import Record, lists_of, number_of, series_of
from quark_fast.report.result_plots import plot_dial, plot_exceedance, plot_histogram, plot_samplings
from quark_fast.report.results import (
    after_names,
    base_name,
    base_row,
    cell_of,
    first_row,
    has_intervals,
    headline_parts,
    kept_round,
    main_row,
    name_of,
    other_names,
    rows_of,
    scorer_name,
    way_of,
)
from quark_fast.report.tables import about, notes, tables
from quark_fast.report.texts import Example, has_control, has_scores, median_samples, pick_examples
from quark_fast.report.training_plots import (
    plot_compared,
    plot_probe,
    plot_rewards,
    plot_steps,
    plot_thresholds,
)


def write_report(run_dir: Path | str, run: RunFiles | None = None) -> Path:
    """Writes `report.html` into the run folder, whole or not at all, and returns its path.

    Args:
        run: the folder's files, where they are read already.
    Raises:
        FileNotFoundError: the folder is not there. Missing files in it are named in the report.
    """
    folder = Path(run_dir)
    page = render_html(run or read_run(folder))
    path = folder / "report.html"
    with replacing(path) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return path


def comparison_page(
    evaluation: Record, samples: Iterable[Record], versions: Record, compared: Compared | None = None
) -> str:
    """The page of an evaluation that no run folder holds, or of several runs, as one HTML document.

    Args:
        samples: those of ``side_by_side.Evaluated``.
        compared: the runs, whose joint table this is; empty where its ``why_apart`` says that there is none.
    """
    rows = rows_of(evaluation)
    runs = {name_of(row).rpartition(": ")[0] for row in rows if math.isfinite(number_of(row, "guidance"))}
    if compared or len(runs) > 1:  # one curve through the rows of several runs would mean nothing
        rows = [{k: v for k, v in row.items() if k not in ("guidance", "quantile")} for row in rows]
    shown = [row for row in samples if not row.get("out_of_domain")]
    name = " beside ".join(compared.runs) if compared else "evaluation"
    table: Record = {**evaluation, "rows": rows} if rows else {}
    return render_html(RunFiles(name, versions, table, shown), compared)


def render_html(run: RunFiles, compared: Compared | None = None) -> str:
    """The report as one HTML document, of several runs with ``compared``."""
    rewards, thresholds = (lists_of(run.rounds, name) for name in ("reward_by_quantile", "thresholds"))
    palette = Palette(max(rewards.shape[1], thresholds.shape[1] + 1))
    last_round, training_samples = median_samples(run.completions)
    # One row's change is what a run is about, not what several are.
    found = [] if compared else headline_parts(run.evaluation)
    no_result = f"This run has no result yet: {counted(len(run.steps), 'step')} recorded."
    if compared is not None:
        no_result = f"{len(compared.runs)} runs side by side"
    if run.left_out:
        no_result = "This run was not evaluated: python -m quark_fast.evaluate RUN does so."
    template = _environment().get_template("page.html.jinja")
    return template.render(
        run=run,
        evaluation=run.evaluation,
        palette=palette,
        plots=_plots(run, palette) | _as_markup(comparison_plots(compared, palette) if compared else {}),
        compared=compared,
        headline=found[0] if found else no_result,
        qualified=" ".join(found[1:]),
        kept=kept_round(run.kept),
        facts=_facts(run),
        tiles=[] if compared else _tiles(run.evaluation),
        examples=_examples(run),
        last_round=last_round,
        training_samples=training_samples,
        command=_command(run),
        settings=_settings(run),
    )


@cache
def _environment() -> Environment:
    """Where templates come from, and what they may call; they write nothing but safe text."""
    made = Environment(
        loader=FunctionLoader(lambda name: (files("quark_fast.report") / name).read_text(encoding="utf-8")),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    texts = (base_name, clean, fill, format_value, has_control, has_scores, name_of, notes)
    rows = (base_row, cell_of, columns_of, has_intervals, main_columns, rows_of, way_of)
    parts = (*rows, tables, bar_width, quantile_colour)
    made.globals.update({function.__name__: function for function in [*texts, *parts]})
    made.globals["command_of"] = _command
    return made


def bar_width(score: float) -> str:
    """Percent of a score's bar that is filled."""
    return f"{100 * min(max(score, 0.0), 1.0) if math.isfinite(score) else 0:.0f}"


def quantile_colour(name: str) -> str:
    """The palette's name for "quantile 3"."""
    return name.replace(" ", "-")


def _plots(run: RunFiles, palette: Palette) -> dict[str, Markup]:
    """Every plot as SVG; empty where the run has no numbers for it."""
    first, fluency, *_ = (column.key for column in main_columns(run.evaluation))
    with plot_style(palette):
        made = {
            "samplings": plot_samplings(run, palette),
            "quantile_first": plot_dial(run, palette, "quantile", first),
            "quantile_fluency": plot_dial(run, palette, "quantile", fluency),
            "guidance_first": plot_dial(run, palette, "guidance", first),
            "guidance_fluency": plot_dial(run, palette, "guidance", fluency),
            "histogram": plot_histogram(run, palette),
            "exceedance": plot_exceedance(run, palette),
            "rewards": plot_rewards(run, palette),
            "thresholds": plot_thresholds(run, palette),
            "steps": plot_steps(run, palette),
            "probe": plot_probe(run, palette),
            "compared": plot_compared(run, palette),
        }
    return _as_markup(made)


def _as_markup(plots: Mapping[str, str]) -> dict[str, Markup]:
    return {name: Markup(svg) for name, svg in plots.items()}


def _facts(run: RunFiles) -> dict[str, Any]:
    """What stands under the headline."""
    evaluation = run.evaluation
    facts = {
        # With a reward of the user's own, the task gives prompts and sampling only: not named.
        "task": None if scores_are_rewards(evaluation) else evaluation.get("task"),
        "evaluated on": about(evaluation).partition(" on ")[2],
        "trained": _trained(run),
        "samples scored": _scored(run),
        "scorer": scorer_name(evaluation),
    }
    return {name: value for name, value in facts.items() if value}


def _trained(run: RunFiles) -> str | None:
    if not run.steps:
        return None
    before = f", after {number_of(run.begun, 'step'):.0f} of an earlier run" if run.begun else ""
    return counted(len(run.steps), "step") + before


def _scored(run: RunFiles) -> str | None:
    if not run.rounds:
        return None
    samples, unscored = (int(np.nansum(series_of(run.rounds, k))) for k in ("samples", "unscored"))
    return f"{samples - unscored:,} in {counted(len(run.rounds), 'round')}" + (
        f", {unscored:,} more without a score" if unscored else ""
    )


def _tiles(evaluation: Record) -> list[tuple[Record, Column]]:
    """The three or four numbers to remember."""
    main, best = main_row(evaluation), first_row(evaluation, "best")
    if main is None:
        return []
    tiles = [(main, column) for column in main_columns(evaluation)]
    if best is not None and best is not main:
        tiles.insert(1, (best, tiles[0][1]))
    return tiles


def _examples(run: RunFiles) -> list[Example]:
    after, worst = after_names(run.evaluation), first_row(run.evaluation, "worst")
    after += [str(worst.get("name"))] if worst else []
    after = list(dict.fromkeys(after + other_names(run.evaluation)))
    return pick_examples(run.evaluation_rows, 10, after or None, scores_are_rewards(run.evaluation))


def _command(run: RunFiles) -> Any:
    command = run.versions.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    return command or (run.config and "python -m quark_fast.train --config config.yaml")


def _settings(run: RunFiles) -> dict[str, dict[str, str]]:
    """What the run was made with, under the titles that the page gives it."""
    versions = {k: v for k, v in run.versions.items() if k not in ("command", "scorer", "starts") and v}
    if scorer := run.evaluation.get("scorer"):
        versions["scorer"] = scorer
    starts = run.versions.get("starts")
    again = [one for one in starts[1:] if isinstance(one, dict)] if isinstance(starts, list) else []
    resumed = {
        str(one.get("time")): f"from step {one.get('step')}: {one.get('command')} ({one.get('machine')})"
        for one in again
    }
    sampling = run.evaluation.get("sampling") or {}
    return {
        "Versions": _as_texts(versions),
        "Sampling at evaluation": _as_texts(sampling),
        "Resumed": resumed,
    }


def _as_texts(pairs: Mapping[str, Any]) -> dict[str, str]:
    texts = {}
    for key, value in pairs.items():
        if isinstance(value, dict):
            texts[key] = "\n".join(f"{inner}: {one}" for inner, one in value.items())
        else:
            texts[key] = json.dumps(value) if isinstance(value, list | bool | None) else str(value)
    return texts
