"""The page: it stands alone (inline CSS and SVG, no script, no address), follows the reader's light or dark
theme, and escapes every text that it did not write itself.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from quark_fast.files.safe_text import clean
from quark_fast.report.columns import (
    columns_of,
    counted,
    fill,
    format_bounds,
    format_change,
    format_value,
    main_columns,
    scores_are_rewards,
)
from quark_fast.report.files import Run, read_run
from quark_fast.report.plots import (
    Palette,
    plot_dial,
    plot_exceedance,
    plot_histogram,
    plot_probe,
    plot_rewards,
    plot_samplings,
    plot_steps,
    plot_style,
    plot_thresholds,
)
from quark_fast.report.results import (
    after_names,
    base_name,
    base_row,
    change_of,
    first_row,
    headline,
    interval_of,
    level_of,
    main_row,
    mode_of,
    name_of,
    other_names,
    rows_of,
    scorer_name,
)
from quark_fast.report.rows import Row, lists_of, number_of, series_of
from quark_fast.report.tables import about, notes, tables, unscored_note
from quark_fast.report.texts import Example, pick_examples


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into the run folder, whole or not at all, and returns its path.

    Raises:
        FileNotFoundError: the folder is not there. Missing files in it are named in the report.
    """
    folder = Path(run_dir)
    page = render_html(read_run(folder))
    path = folder / "report.html"
    partial = folder / f".report.html.{os.getpid()}.tmp"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def comparison_page(evaluation: Row, samples: Iterable[Row], versions: Row) -> str:
    """The page of an evaluation that no run folder holds, as one HTML document.

    Args:
        samples: those of ``evaluator.Evaluated``.
    """
    rows = rows_of(evaluation)
    runs = {name_of(row).rpartition(": ")[0] for row in rows if math.isfinite(number_of(row, "guidance"))}
    if len(runs) > 1:  # no curve goes through the dials of several runs
        rows = [{k: v for k, v in row.items() if k not in ("guidance", "quantile")} for row in rows]
    shown = [row for row in samples if not row.get("out_of_domain")]
    return render_html(
        Run(
            name="evaluation",
            config="",
            versions=versions,
            steps=[],
            rounds=[],
            probes=[],
            completions=[],
            evaluation={**evaluation, "rows": rows},
            evaluation_rows=shown,
            missing=[],
        )
    )


def render_html(run: Run) -> str:
    """The report as one HTML document."""
    rewards, thresholds = (lists_of(run.rounds, name) for name in ("reward_by_quantile", "thresholds"))
    palette = Palette(max(rewards.shape[1], thresholds.shape[1] + 1))
    with plot_style(palette):
        sections = [
            _html_results(run, palette),
            _html_texts(run),
            _html_learning(run, palette),
            _html_reproduce(run),
        ]
    title = _safe(f"{run.name} · quark_fast")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No script, image or address could load even if a text slipped through unescaped.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{_css(palette)}</style>\n</head>\n<body>\n"
        f"<main>\n{_html_header(run)}\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _safe(value: object) -> str:
    return escape(clean(str(value)))


def _section(name: str, title: str, *parts: str) -> str:
    body = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>\n' if body else ""


def _html_plot(title: str, svg: str, caption: str, wide: bool = False) -> str:
    """`caption` is the report's own HTML."""
    if not svg:
        return ""
    return (
        f'<figure class="{"wide" if wide else "half"}"><h3>{title}</h3><div>{svg}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _grid(*figures: str) -> str:
    shown = "\n".join(figure for figure in figures if figure)
    return f'<div class="figures">{shown}</div>' if shown else ""


def _html_header(run: Run) -> str:
    evaluation, parts = run.evaluation, [f'<p class="kicker">quark_fast · {_safe(run.name)}</p>']
    trained = counted(len(run.steps), "step")
    sentence = headline(evaluation) or f"This run has no result yet: {trained} recorded."
    parts.append(f"<h1>{_safe(sentence)}</h1>")
    facts = [
        # A reward of the user's own leaves no more of the task than its prompts and sampling.
        ("task", None if scores_are_rewards(evaluation) else evaluation.get("task")),
        ("evaluated on", about(evaluation).partition(" on ")[2] or None),
        ("trained", trained if run.steps else None),
        ("samples scored", _scored(run)),
        ("scorer", scorer_name(evaluation)),
    ]
    shown = [f"<div><dt>{key}</dt><dd>{_safe(value)}</dd></div>" for key, value in facts if value]
    parts.append(f'<dl class="facts">{"".join(shown)}</dl>' if shown else "")
    if run.missing:
        items = "".join(f"<li>{_safe(item)}</li>" for item in run.missing)
        parts.append(f"<aside><strong>This run is not complete.</strong><ul>{items}</ul></aside>")
    return f"<header>{''.join(parts)}</header>{_html_tiles(evaluation)}"


def _scored(run: Run) -> str | None:
    if not run.rounds:
        return None
    samples, unscored = (int(np.nansum(series_of(run.rounds, k))) for k in ("samples", "unscored"))
    return f"{samples - unscored:,} in {counted(len(run.rounds), 'round')}" + (
        f", {unscored:,} more without a score" if unscored else ""
    )


def _html_tiles(evaluation: Row) -> str:
    """The three or four numbers to remember."""
    main, best = main_row(evaluation), first_row(evaluation, "best")
    before = base_row(evaluation)
    if main is None or before is None:
        return ""
    wanted = [(main, column) for column in main_columns(evaluation)]
    if best is not None and best is not main:
        wanted.insert(1, (best, wanted[0][1]))
    tiles = []
    for row, column in wanted:
        key = column.key
        old, new = interval_of(before, key).value, interval_of(row, key).value
        amount, bounds = format_change(change_of(row, key), column, evaluation)
        tiles.append(
            f'<div class="tile" style="--mode: var(--{mode_of(name_of(row))})">'
            f"<p>{_safe(fill(column.title, evaluation))}<br><b>{_safe(name_of(row))}</b></p>"
            f"<strong>{amount}</strong>"
            f"<p>{f'{bounds}<br>' if bounds else ''}"
            f"{format_value(old, column.style)} → {format_value(new, column.style)}</p></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _html_results(run: Run, palette: Palette) -> str:
    evaluation = run.evaluation
    if not rows_of(evaluation):
        return ""
    level, (first, fluency, *_) = level_of(evaluation), main_columns(evaluation)
    first_title, fluency_title = (_safe(fill(column.title, evaluation)) for column in (first, fluency))
    property_name = _safe(fill("{property}", evaluation))
    return _section(
        "results",
        "Before and after",
        _html_table(evaluation),
        *(f"<h3>{_safe(title)}</h3>{_html_table(one)}" for title, one in tables(evaluation)[1:]),
        _grid(
            _html_plot(
                "Each way of sampling",
                plot_samplings(run, palette),
                f"Points with {level} intervals; the dotted line is {_safe(base_name(evaluation))}.",
                wide=True,
            ),
            _html_plot(
                f"{first_title.capitalize()} by quantile",
                plot_dial(run, palette, "quantile", first.key),
                "One reward token in front, from the worst to the best: a monotone curve shows that the"
                f" conditioning works. Bars and band: {level} intervals.",
            ),
            _html_plot(
                f"What a quantile costs: {fluency_title}",
                plot_dial(run, palette, "quantile", fluency.key),
                "The same tokens. Those of quantiles that training drew nothing from lie on the line between"
                " their trained neighbours.",
            ),
            _html_plot(
                f"The guidance dial: {first_title}",
                plot_dial(run, palette, "guidance", first.key),
                f"log p = log p(worst) + w (log p(best) − log p(worst)). Bars and band: {level} intervals.",
            ),
            _html_plot(
                f"The guidance dial: {fluency_title}",
                plot_dial(run, palette, "guidance", fluency.key),
                f"What the same dial costs: {_safe(fill(fluency.meaning, evaluation))}",
            ),
            _html_plot(
                f"Where the {property_name} sits",
                plot_histogram(run, palette),
                f"Share of completions in each tenth of the {property_name} scale.",
            ),
            _html_plot(
                "The tail",
                plot_exceedance(run, palette),
                f"Share of completions with at least this {property_name}.",
            ),
        ),
    )


def _html_table(evaluation: Row) -> str:
    shown = columns_of(evaluation)
    head = "".join(f"<th>{_safe(fill(c.title, evaluation))}</th>" for c in shown)
    body = []
    for row in rows_of(evaluation):
        cells = []
        for column in shown:
            number, change = interval_of(row, column.key), change_of(row, column.key)
            lines = [
                f"<b>{format_value(number.value, column.style)}</b>",
                f"<small>{format_bounds(number.low, number.high, column.style)}</small>",
            ]
            if math.isfinite(change.relative):
                kind = "clear" if change.excludes_zero else "unclear"
                lines.append(f'<i class="{kind}">{format_change(change, column, evaluation)[0]}</i>')
            cells.append(f"<td>{''.join(lines)}</td>")
        mode = f'<span class="dot" style="--mode: var(--{mode_of(name_of(row))})"></span>'
        body.append(f"<tr><th>{mode}{_safe(name_of(row))}</th>{''.join(cells)}</tr>")
    meanings = "".join(
        f"<dt>{_safe(fill(column.title, evaluation))}</dt><dd>{_safe(fill(column.meaning, evaluation))}</dd>"
        for column in shown
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>sampling</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">Below each number its {level_of(evaluation)} bootstrap interval over '
        f"prompts, then the change relative to {_safe(base_name(evaluation))} on the same prompts; a change "
        f"whose interval leaves 0 out is set bold.{_safe(unscored_note(evaluation))}</p>"
        f'<p class="note">{"<br>".join(map(_safe, notes(evaluation)))}</p>'
        f"<details><summary>What each column measures</summary><dl>{meanings}</dl></details>"
    )


def _html_texts(run: Run) -> str:
    after, worst = after_names(run.evaluation), first_row(run.evaluation, "worst")
    after += [str(worst.get("name"))] if worst else []
    after = list(dict.fromkeys(after + other_names(run.evaluation)))
    lowest = scores_are_rewards(run.evaluation)
    examples = pick_examples(run.evaluation_rows, 10, after or None, lowest)
    return _section(
        "texts",
        "What it writes",
        _html_examples(examples, base_name(run.evaluation)) if examples else "",
        _html_exploration(run.completions),
    )


def _html_examples(examples: Sequence[Example], base: str) -> str:
    articles = []
    for example in examples:
        rows = "".join(
            _html_text_row(name, mode_of(name), text, score) for name, text, score in example.texts
        )
        articles.append(f"<article><h4>{_safe(example.prompt)} …</h4>{rows}</article>")
    return (
        f"<details><summary>{len(examples)} held-out prompts, before and after "
        "<em>may contain offensive language</em></summary>"
        f'<p class="note">Prompts spread over the quarter where {_safe(base)} scored worst. '
        "Before is its worst completion; after is the completion with the same number, not chosen. "
        "So the table above is the measure, and these texts are an illustration.</p>"
        f"{''.join(articles)}</details>"
    )


def _html_text_row(label: str, colour: str, text: str, score: float) -> str:
    width = min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0
    return (
        f'<div class="text" style="--mode: var(--{colour})"><span class="who">{_safe(label)}</span>'
        f'<span class="score"><i style="width: {100 * width:.0f}%"></i></span>'
        f'<span class="number">{format_value(score, "2 digits")}</span>'
        f"<p>{_safe(text).strip() or '(nothing)'}</p></div>"
    )


def _html_exploration(completions: Sequence[Row]) -> str:
    """The sample of median reward in each quantile of the last round."""
    scored = [row for row in completions if math.isfinite(number_of(row, "reward"))]
    if not scored:
        return ""
    last = max(number_of(row, "round") for row in scored)
    by_quantile: dict[int, list[Row]] = {}
    for row in scored:
        if number_of(row, "round") == last and math.isfinite(number_of(row, "quantile")):
            by_quantile.setdefault(int(row["quantile"]), []).append(row)
    articles = []
    for quantile, rows in sorted(by_quantile.items()):
        rows.sort(key=lambda row: number_of(row, "reward"))
        row = rows[len(rows) // 2]
        line = _html_text_row(
            f"quantile {quantile}",
            f"quantile-{quantile}",
            str(row.get("completion", "")),
            number_of(row, "reward"),
        )
        articles.append(f"<article><h4>{_safe(row.get('prompt', ''))} …</h4>{line}</article>")
    return (
        "<details><summary>Training samples, one of each quantile "
        "<em>may contain offensive language</em></summary>"
        f'<p class="note">From round {last:g}: the sample of median reward in each quantile; the '
        f"number is the reward.</p>{''.join(articles)}</details>"
    )


def _html_learning(run: Run, palette: Palette) -> str:
    return _section(
        "learning",
        "How it learned",
        _grid(
            _html_plot(
                "Reward",
                plot_rewards(run, palette),
                "Mean reward of each round's new samples, and of each quantile of the pool.",
            ),
            _html_plot(
                "Quantile boundaries",
                plot_thresholds(run, palette),
                "The reward at which one quantile of the pool ends and the next begins.",
            ),
            _html_plot(
                "Training",
                plot_steps(run, palette),
                "Faint: every step. Strong: exponential moving average over about a twentieth of "
                "the run. Upright lines: exploration rounds.",
                wide=True,
            ),
            _html_plot(
                "Probe: has it learned what the tokens mean?",
                plot_probe(run, palette),
                "Rank correlation, over held-out completions, of reward with log p(y | best) − "
                "log p(y | worst); bars are one standard error, 0 means nothing learned.",
                wide=True,
            ),
        ),
    )


def _html_reproduce(run: Run) -> str:
    command = run.versions.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    if not command and run.config:
        command = "python -m quark_fast.train --config config.yaml"
    versions = {**run.versions, "scorer": run.evaluation.get("scorer")}
    starts = versions.pop("starts", None)
    resumed = [one for one in starts[1:] if isinstance(one, dict)] if isinstance(starts, list) else []
    again = {
        str(one.get("time")): f"from step {one.get('step')}: {one.get('command')} ({one.get('machine')})"
        for one in resumed
    }
    sampling = run.evaluation.get("sampling") or {}
    return _section(
        "reproduce",
        "How to reproduce",
        f"<pre>{_safe(command)}</pre>" if command else "",
        '<div class="columns">',
        _html_pairs("Versions", {k: v for k, v in versions.items() if k != "command" and v}),
        _html_pairs("Sampling at evaluation", sampling),
        _html_pairs("Resumed", again),
        f'<div><h3>Config</h3><pre class="config">{_safe(run.config)}</pre></div>' if run.config else "",
        "</div>",
    )


def _html_pairs(title: str, pairs: Mapping[str, Any]) -> str:
    rows = []
    for key, value in pairs.items():
        shown = json.dumps(value) if isinstance(value, list | bool | None) else value
        if isinstance(value, dict):
            shown = "\n".join(f"{inner}: {one}" for inner, one in value.items())
        rows.append(f"<dt>{_safe(key)}</dt><dd>{_safe(shown)}</dd>")
    return f'<div><h3>{title}</h3><dl class="pairs">{"".join(rows)}</dl></div>' if rows else ""


def _css(palette: Palette) -> str:
    return f"""
:root {{ color-scheme: light dark; --paper: #faf9f6; --card: #ffffff; --warn: #8a5a00;
  {palette.css("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #17181b; --card: #1e2024; --warn: #e0b050;
  {palette.css("dark")} }} }}
{_CSS}"""


_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 65rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
h1, h2 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, Georgia, serif;
  font-weight: 600; line-height: 1.22; text-wrap: balance; letter-spacing: -0.01em; }
h1 { font-size: clamp(1.6rem, 3.4vw, 2.35rem); margin: 0.4rem 0 1.6rem; max-width: 27em; }
h2 { font-size: 1.6rem; margin: 4rem 0 1.25rem; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.5rem; }
h4 { font-size: 0.95rem; font-weight: 600; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
p { margin: 0; }
.kicker { color: var(--muted); font-size: 0.85rem; letter-spacing: 0.02em; }
.note, figcaption, small { color: var(--muted); font-size: 0.85rem; }
.note { max-width: 46rem; margin: 0.9rem 0; }
.facts { display: flex; flex-wrap: wrap; gap: 0.9rem 2rem; margin: 0 0 2rem; }
dt { color: var(--muted); font-size: 0.8rem; }
dd { margin: 0; font-size: 0.95rem; overflow-wrap: anywhere; white-space: pre-wrap; }
aside { border-left: 3px solid var(--warn); background: var(--card); padding: 0.9rem 1.2rem;
  margin: 0 0 2rem; font-size: 0.92rem; overflow-wrap: anywhere; }
aside ul { margin: 0.3rem 0 0; padding-left: 1.1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: 1rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-top: 3px solid var(--mode);
  border-radius: 4px; padding: 1rem 1.15rem; font-size: 0.85rem; color: var(--muted);
  font-variant-numeric: tabular-nums; }
.tile b { color: var(--mode); font-weight: 600; }
.tile strong { display: block; color: var(--ink); font-size: 2.2rem; line-height: 1.3;
  font-weight: 600; letter-spacing: -0.02em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 0.95rem; }
th, td { text-align: right; vertical-align: top; padding: 0.6rem 0 0.6rem 1.1rem;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; font-weight: 600; }
thead th { color: var(--muted); font-weight: 400; font-size: 0.82rem; vertical-align: bottom;
  white-space: normal; line-height: 1.3; }
thead th:first-child { font-weight: 400; }
td > * { display: block; line-height: 1.4; }
td > b { font-weight: 500; }
td small { font-size: 0.78rem; }
td i { font-style: normal; font-size: 0.85rem; }
i.clear { font-weight: 700; }
i.unclear { color: var(--muted); }
.dot { display: inline-block; width: 0.62em; height: 0.62em; border-radius: 50%;
  background: var(--mode); margin-right: 0.6em; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 1.25rem; margin-top: 1.75rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 4px;
  padding: 1.1rem 1.2rem 1rem; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure > div { overflow-x: auto; }
figcaption { margin-top: 0.5rem; line-height: 1.45; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
details { margin-top: 1rem; border: 1px solid var(--line); border-radius: 4px;
  background: var(--card); padding: 0.75rem 1.2rem; }
details[open] { padding-bottom: 1.2rem; }
summary { cursor: pointer; font-weight: 500; }
summary em { font-style: normal; font-weight: 400; font-size: 0.82rem; color: var(--warn);
  margin-left: 0.6em; }
details dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.35rem 1.4rem; }
details dd { font-size: 0.9rem; }
article { border-top: 1px solid var(--line); padding: 1.1rem 0; }
article:last-child { padding-bottom: 0; }
.text { display: grid; grid-template-columns: 7rem 3.5rem 2.2rem 1fr; gap: 0.9rem;
  padding: 0.28rem 0; font-size: 0.92rem; }
.text p { white-space: pre-wrap; overflow-wrap: anywhere; }
.who { color: var(--mode); font-weight: 600; font-size: 0.85rem; }
.score { height: 0.4rem; margin-top: 0.55rem; background: var(--line); border-radius: 2px; }
.score i { display: block; height: 100%; background: var(--mode); border-radius: 2px; }
.number { color: var(--muted); font-size: 0.85rem; font-variant-numeric: tabular-nums; }
pre { margin: 0 0 1.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; padding: 0.9rem 1.1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.columns { columns: 22rem 2; column-gap: 2.5rem; }
.columns > div { break-inside: avoid; margin-bottom: 1.5rem; }
.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.2rem; margin: 0; }
.pairs dt, .pairs dd { font-size: 0.88rem; }
@media (max-width: 46rem) {
  .figures { grid-template-columns: 1fr; }
  figure.wide svg { min-width: 40rem; }
  .text { grid-template-columns: 7rem 3.5rem 1fr; row-gap: 0.1rem; }
  .text p { grid-column: 1 / -1; }
}
@media print { main { padding: 0; max-width: none; } figure, .tile { break-inside: avoid; } }
"""
