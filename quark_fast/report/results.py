"""What an evaluation found: its rows by their ways of sampling, and the result in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from quark_fast.files.safe_text import clean
from quark_fast.metrics import FEWEST_PROMPTS, Change, Interval, judge_measure, unscored_by
from quark_fast.report.columns import (
    Column,
    columns_of,
    counted,
    fill,
    find_column,
    format_bounds,
    format_change,
    format_value,
    headline_column,
    judge_columns,
    main_columns,
    numbered_judges,
    one_line,
    part_in_training,
    shortened,
)
from quark_fast.report.records import Record, judges_of, number_of

BASE = "base model"  # its row, in evaluation.json, too
AGAIN = ", again"  # after the name of a row, another completion of it for the same prompt
Way = Literal["base", "none", "worst", "middle", "best", "guided"]


def way_of(name: str) -> Way:
    """Which of the six ways of sampling a row's name stands for; it decides the colour.

    Beside other models' a row is named "run: way".
    """
    own_name = name.rpartition(": ")[2]
    starts: dict[str, Way] = {
        BASE: "base",
        "guided w=": "guided",
        "best token": "best",
        "quantile ": "middle",
        "worst token": "worst",
    }
    return next((way for start, way in starts.items() if own_name.startswith(start)), "none")


def rows_of(evaluation: Record) -> list[Record]:
    rows = evaluation.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def name_of(row: Record) -> str:
    """As it is shown: of "run: way" each is shortened alone, since the way decides what the row is."""
    return ": ".join(map(shortened, str(row.get("name", "?")).rsplit(": ", 1)))


def interval_of(row: Record, metric: str) -> Interval:
    found = (row.get("metrics") or {}).get(metric) or {}
    return Interval(*(number_of(found, key) for key in ("value", "low", "high")))


def change_of(row: Record, metric: str) -> Change:
    found = (row.get("change") or {}).get(metric) or {}
    keys = ("difference", "low", "high", "relative", "relative_low", "relative_high")
    return Change(*(number_of(found, key) for key in keys))


@dataclass(frozen=True)
class Cell:
    """A metric of a row as texts: the value, its change against the first row, and their intervals.

    Empty where there is none, "–" where it is not known.
    """

    value: str
    bounds: str
    change: str
    change_bounds: str
    is_clear: bool  # the change's interval leaves 0 out


def cell_of(evaluation: Record, row: Record, column: Column) -> Cell:
    number, change = interval_of(row, column.key), change_of(row, column.key)
    amount, bounds = format_change(change, column, evaluation) if row.get("change") else ("", "")
    return Cell(
        format_value(number.value, column.style),
        format_bounds(number.low, number.high, column.style),
        amount,
        bounds,
        change.excludes_zero,
    )


def has_intervals(evaluation: Record) -> bool:
    """Whether any number of the table has one: a few prompts give none."""
    intervals = (interval_of(row, c.key) for row in rows_of(evaluation) for c in columns_of(evaluation))
    return any(math.isfinite(one.low) for one in intervals)


def main_row(evaluation: Record) -> Record | None:
    """The row that the headline is about: guided with the run's own w, else the best token.

    That w is `sampling.guidance`, and w = 1 is the best token; where it is not given, the first guided row
    counts. Of models without reward tokens it is the second. The choice does not look at the results.
    """
    rows = rows_of(evaluation)
    guided = [row for row in rows if way_of(name_of(row)) == "guided"]
    guidance = number_of(evaluation.get("sampling") or {}, "guidance")
    own = [row for row in guided if number_of(row, "guidance") == guidance]
    best = [row for row in rows if way_of(name_of(row)) == "best"]
    first = best if guidance == 1 else own + guided + best
    return next(iter(first + rows[1:]), None)


def after_names(evaluation: Record) -> list[str]:
    """The rows to show texts of: the best token alone and the headline's own."""
    rows = (first_row(evaluation, "best"), main_row(evaluation))
    return list(dict.fromkeys(str(row.get("name")) for row in rows if row is not None))


def other_names(evaluation: Record) -> list[str]:
    """One row of each further subject: a plain model's own, a run's with the best token."""
    names = [str(row.get("name")) for row in rows_of(evaluation)[1:]]
    return [name for name in names if ": " not in name and way_of(name) == "none" and name != "no token"] + [
        name for name in names if ": " in name and way_of(name) == "best"
    ]


def first_row(evaluation: Record, way: Way) -> Record | None:
    return next((row for row in rows_of(evaluation) if way_of(name_of(row)) == way), None)


def base_row(evaluation: Record) -> Record | None:
    """The row that the changes of the others are against: the first."""
    return next(iter(rows_of(evaluation)), None)


def base_name(evaluation: Record) -> str:
    """What that row is called in a sentence."""
    before = base_row(evaluation)
    label = BASE if before is None else name_of(before)
    return "the base model" if label == BASE else label


def _how(row: Record) -> str:
    name = name_of(row)
    if way_of(name) == "guided" and ": " not in name:
        dial = f"(w = {number_of(row, 'guidance'):g})".replace(" ", "\N{NO-BREAK SPACE}")
        return f"guided conditioning {dial}"
    alone = way_of(name) == "best" and ": " not in name
    return "the best reward token in front" if alone else f"“{name}”"


def headline(evaluation: Record) -> str:
    """The result with its interval and price, what it takes, what judges find; empty without a result."""
    return " ".join(headline_parts(evaluation))


def headline_parts(evaluation: Record) -> list[str]:
    """The same, the result apart from what is said of it."""
    parts = (
        _what_is_missing(evaluation),
        _too_few(evaluation.get("prompts")),
        _result(evaluation),
        _what_it_costs(evaluation),
        _what_it_takes(evaluation),
        _by_judges(evaluation),
    )
    return [part for part in parts if part]


def _too_few(prompts: Any) -> str:
    if not isinstance(prompts, int) or prompts >= FEWEST_PROMPTS:
        return ""
    return f"{counted(prompts, 'prompt tells', 'prompts tell')} no change from chance."


def without_reward(evaluation: Record) -> bool:
    """Whether no reward scored its completions."""
    return scorer_name(evaluation) == "none"


def unscored_rows(evaluation: Record) -> list[Record]:
    """The rows of which the scorer gave no completion a number; none where there is no reward."""
    if without_reward(evaluation):
        return []
    return [row for row in rows_of(evaluation) if interval_of(row, "unscored").value == 1]


def _what_is_missing(evaluation: Record) -> str:
    """What a table lacks that no reward scored, or rows of it."""
    judged = "judges alone say" if judges_of(evaluation) else "nothing here says"
    if without_reward(evaluation):
        return f"No reward was given, so {judged} how good the completions are."
    if not (unscored := unscored_rows(evaluation)):
        return ""
    scorer = scorer_name(evaluation) or "the scorer"
    gave = f"{scorer} gave none of the completions a score (None or NaN for each)"
    if len(unscored) == len(rows_of(evaluation)):
        return f"Nothing was scored: {gave}, so {judged} how good they are."
    names = ", ".join(f"“{name_of(row)}”" for row in unscored)
    return f"Not everything was scored: in {names} {gave}."


def _by_judges(evaluation: Record) -> str:
    """What scorers beside the reward find of the same row."""
    row = main_row(evaluation)
    if row is None or not row.get("change"):
        return ""
    found, by_key = [], {judge_measure(str(judge.get("name"))): judge for judge in judges_of(evaluation)}
    for column in judge_columns(evaluation):
        cell = cell_of(evaluation, row, column)
        if cell.value != "–":
            bounds = f", 95% interval {cell.change_bounds}" if cell.change_bounds else ""
            what, _, judge = column.title.rpartition(" by ")
            part = part_in_training(evaluation, by_key[column.key])
            who = f"By {judge}, which {part}, {what} with {_how(row)}"
            found.append(f"{who} is {cell.value} ({cell.change}{bounds}).")
    return " ".join(found)


def _what_it_costs(evaluation: Record) -> str:
    """The perplexity of the same row, and of ordinary text: a fall can be bought with either."""
    row, (first, fluency, *_) = main_row(evaluation), main_columns(evaluation)
    if row is None or row is base_row(evaluation):
        return ""
    costs: list[str] = []
    for column in dict.fromkeys((fluency, find_column("text_perplexity"))):
        cell = cell_of(evaluation, row, column)
        if column.key != first.key and "–" not in (cell.value, cell.change) and cell.change:
            bounds = f", 95% interval {cell.change_bounds}" if cell.change_bounds else ""
            it = "it" if costs or _result(evaluation) else _how(row)
            title = fill(column.title, evaluation)
            costs.append(f"{title} with {it} is {cell.value} ({cell.change}{bounds})")
    said = ", ".join(costs)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _what_it_takes(evaluation: Record) -> str:
    """What each result needs: guidance a generate that has it, the best token alone any engine."""
    row, best = main_row(evaluation), first_row(evaluation, "best")
    if row is None or best is None or way_of(name_of(row)) != "guided" or ": " in name_of(row):
        return ""
    alone = cell_of(evaluation, best, headline_column(evaluation))
    if best in unscored_rows(evaluation):
        return ""
    bounds = f", 95% interval {alone.change_bounds}" if alone.change_bounds else ""
    change = f" ({alone.change}{bounds})" if alone.change else ""
    w = f"{number_of(row, 'guidance'):g}"
    return (
        f"That takes guidance (--guidance {w} of quark_fast.generate, guidance={w} of the exported model's"
        f" own generate); without it, by the best token alone, it is {alone.value}{change}."
    )


def _result(evaluation: Record) -> str:
    """The headline's row in one sentence."""
    row, before = main_row(evaluation), base_row(evaluation)
    if before is None:
        return ""
    column = headline_column(evaluation)
    subject = fill(column.title, evaluation).capitalize()
    old = cell_of(evaluation, before, column)
    if any(one in unscored_rows(evaluation) for one in (before, row)):  # which _what_is_missing says
        return ""
    if row is None or row is before:
        interval = f" (95% interval {old.bounds})" if old.bounds else ""
        return f"{subject} of {name_of(before)} is {old.value}{interval}."
    new = cell_of(evaluation, row, column)
    values = f"from {old.value} to {new.value}"
    if not new.change_bounds:
        return f"With {_how(row)}, {subject.lower()} went {values}."
    bounds = f"95% interval {new.change_bounds}{'%' if new.change.endswith('%') else ''}"
    if not new.is_clear:
        return f"{subject} did not change measurably with {_how(row)}: {values}, {new.change} ({bounds})."
    verb = "fell" if change_of(row, column.key).difference < 0 else "rose"
    return f"{subject} {verb} by {new.change.lstrip('+−')} with {_how(row)}: {values} ({bounds})."


def kept_round(kept: Record) -> str:
    """Which round's weights were kept, and why; empty where rounds were not compared."""
    return one_line(clean(str(kept.get("why") or "")))


def scorer_line(evaluation: Record) -> str:
    """Name, version and hash, by which tables may or may not be compared; empty where none is known."""
    sha256 = (evaluation.get("scorer") or {}).get("sha256")
    name = scorer_name(evaluation)
    return f"Scorer: {name}{f', sha256 {sha256}' if sha256 else ''}." if name else ""


def judge_lines(evaluation: Record) -> list[str]:
    """What each judge measures, its name, version and hash."""
    found = []
    for called, judge in numbered_judges(evaluation):
        name = " ".join(str(judge[key]) for key in ("name", "version") if judge.get(key))
        what = f"{judge['property']} by " if judge.get("property") else ""
        sha256 = str(judge.get("sha256"))[:12]
        part = part_in_training(evaluation, judge)
        found.append(f"{called.capitalize()}: {what}{name}, sha256 {sha256}; it {part}.")
    return found


def unscored_by_judges(evaluation: Record) -> list[tuple[str, str]]:
    """What each judge is called, and the metric that counts the completions that it gave no number."""
    judges = numbered_judges(evaluation)
    return [(called, unscored_by(judge_measure(str(judge.get("name"))))) for called, judge in judges]


def scorer_name(evaluation: Record) -> str | None:
    scorer = evaluation.get("scorer") or {}
    name = " ".join(str(scorer[key]) for key in ("name", "version") if scorer.get(key))
    return name or None
