"""What an evaluation says: its rows by their ways of sampling, and the result in one sentence."""

from __future__ import annotations

import math
from typing import Literal

from quark_fast.files.safe_text import clean
from quark_fast.metrics import Change, Interval
from quark_fast.report.columns import (
    fill,
    find_column,
    format_bounds,
    format_change,
    format_value,
    headline_key,
    one_line,
)
from quark_fast.report.rows import Row, number_of

Mode = Literal["untouched", "none", "worst", "middle", "best", "guided"]


def mode_of(name: str) -> Mode:
    """Which of the six ways of sampling a row's name stands for; it decides the colour.

    Beside other models' a row is named "run: way".
    """
    way = name.rpartition(": ")[2]
    starts: dict[str, Mode] = {
        "untouched": "untouched",
        "guided w=": "guided",
        "best token": "best",
        "quantile ": "middle",
        "worst token": "worst",
    }
    return next((mode for start, mode in starts.items() if way.startswith(start)), "none")


def rows_of(evaluation: Row) -> list[Row]:
    rows = evaluation.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def name_of(row: Row) -> str:
    return one_line(clean(str(row.get("name", "?"))))[:80]


def interval_of(row: Row, metric: str) -> Interval:
    found = (row.get("metrics") or {}).get(metric) or {}
    return Interval(*(number_of(found, key) for key in ("value", "low", "high")))


def change_of(row: Row, metric: str) -> Change:
    found = (row.get("change") or {}).get(metric) or {}
    keys = ("difference", "low", "high", "relative", "relative_low", "relative_high")
    return Change(*(number_of(found, key) for key in keys))


def level_of(evaluation: Row) -> str:
    level = number_of(evaluation, "level")
    return f"{95 if math.isnan(level) else 100 * level:g}%"


def main_row(evaluation: Row) -> Row | None:
    """The row that the headline is about: guided with the run's own w, else the best token.

    That w is `sampling.guidance`; where it is not given, the first guided row counts. Of models
    without reward tokens it is the second. The choice does not look at the results.
    """
    rows = rows_of(evaluation)
    guided = [row for row in rows if mode_of(name_of(row)) == "guided"]
    guidance = number_of(evaluation.get("sampling") or {}, "guidance")
    own = [row for row in guided if number_of(row, "guidance") == guidance]
    best = [row for row in rows if mode_of(name_of(row)) == "best"]
    return next(iter(own + guided + best + rows[1:]), None)


def after_names(evaluation: Row) -> list[str]:
    """The rows to show texts of: the best token alone and the headline's own."""
    rows = (first_row(evaluation, "best"), main_row(evaluation))
    return list(dict.fromkeys(str(row.get("name")) for row in rows if row is not None))


def other_names(evaluation: Row) -> list[str]:
    """One row of each further subject: a plain model's own, a run's with the best token."""
    names = [name_of(row) for row in rows_of(evaluation)[1:]]
    return [name for name in names if ": " not in name and mode_of(name) == "none" and name != "no token"] + [
        name for name in names if ": " in name and mode_of(name) == "best"
    ]


def first_row(evaluation: Row, mode: Mode) -> Row | None:
    return next((row for row in rows_of(evaluation) if mode_of(name_of(row)) == mode), None)


def base_row(evaluation: Row) -> Row | None:
    """The row that the changes of the others are against: the first."""
    return next(iter(rows_of(evaluation)), None)


def base_name(evaluation: Row) -> str:
    """What that row is called in a sentence."""
    before = base_row(evaluation)
    name = "untouched" if before is None else name_of(before)
    return "the untouched model" if name == "untouched" else name


def _how(row: Row) -> str:
    mode = mode_of(name_of(row))
    if ": " in name_of(row):
        return f"“{name_of(row)}”"
    if mode == "guided":
        dial = f"(w = {number_of(row, 'guidance'):g})".replace(" ", "\N{NO-BREAK SPACE}")
        return f"guided conditioning {dial}"
    return "the best reward token in front" if mode == "best" else f"“{name_of(row)}”"


def headline(evaluation: Row) -> str:
    """The result with its interval, and what it takes to have it; empty if there is no result."""
    return " ".join(part for part in (_result(evaluation), _what_it_takes(evaluation)) if part)


def _what_it_takes(evaluation: Row) -> str:
    """The guided row is not what the exported model does by itself: both by name, with what each needs."""
    row, best = main_row(evaluation), first_row(evaluation, "best")
    if row is None or best is None or mode_of(name_of(row)) != "guided" or ": " in name_of(row):
        return ""
    column = find_column(headline_key(evaluation))
    amount, _ = format_change(change_of(best, column.key), column, evaluation)
    value = format_value(interval_of(best, column.key).value, column.style)
    return (
        f"That takes quark_fast.generate (--guidance {number_of(row, 'guidance'):g}); the exported model by"
        f" itself, which is the best token, is at {value}{f' ({amount})' if amount else ''}."
    )


def _result(evaluation: Row) -> str:
    """The headline's row in one sentence."""
    row, before = main_row(evaluation), base_row(evaluation)
    column = find_column(headline_key(evaluation))
    if before is None:
        return ""
    if row is None or row is before:
        number = interval_of(before, column.key)
        bounds = format_bounds(number.low, number.high, column.style)
        return (
            f"{fill(column.title, evaluation).capitalize()} of {name_of(before)} is"
            f" {format_value(number.value, column.style)}"
            f"{f' ({level_of(evaluation)} interval {bounds})' if bounds else ''}."
        )
    change = change_of(row, column.key)
    amount, bounds = format_change(change, column, evaluation)
    old, new = (format_value(interval_of(one, column.key).value, column.style) for one in (before, row))
    values = f"from {old} to {new}"
    subject = fill(column.title, evaluation).capitalize()
    if not bounds:
        return f"With {_how(row)}, {subject.lower()} went {values}."
    bounds = f"{level_of(evaluation)} interval {bounds}{'%' if amount.endswith('%') else ''}"
    if not change.excludes_zero:
        return f"{subject} did not change measurably with {_how(row)}: {values}, {amount} ({bounds})."
    verb = "fell" if change.difference < 0 else "rose"
    return f"{subject} {verb} by {amount.lstrip('+−')} with {_how(row)}: {values} ({bounds})."


def scorer_line(evaluation: Row) -> str:
    """Name, version and hash, by which tables may or may not be compared; empty where none is known."""
    sha256 = (evaluation.get("scorer") or {}).get("sha256")
    name = scorer_name(evaluation)
    return f"Scorer: {name}{f', sha256 {sha256}' if sha256 else ''}." if name else ""


def scorer_name(evaluation: Row) -> str | None:
    scorer = evaluation.get("scorer") or {}
    name = " ".join(str(scorer[key]) for key in ("name", "version") if scorer.get(key))
    return name or None
