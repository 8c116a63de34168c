"""What the user sees when a run ends: a terminal table, before/after texts, and `report.html`.

Everything is read from the files of a run folder (`read_run` lists them), so a report can be made
of a run that is still going or that stopped early: it shows what there is and says what is missing.
The page stands alone (inline CSS and SVG, no script, no address), follows the reader's light or
dark theme, and escapes every text that it did not write itself.
"""

import codecs
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quark_fast.metrics import Change, Interval
from quark_fast.untrusted import clean, too_deep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Array = npt.NDArray[np.float64]
Mode = Literal["untouched", "none", "worst", "middle", "best", "guided"]

# --- reading a run folder -------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The files of a run folder as far as they can be read; `missing` says what could not."""

    name: str
    config: str
    versions: Row
    steps: list[Row]
    rounds: list[Row]
    probes: list[Row]
    completions: list[Row]
    evaluation: Row
    evaluation_rows: list[Row]
    missing: list[str]


def read_run(run_dir: Path) -> Run:
    """Reads config.yaml, versions.json, metrics.jsonl, completions.jsonl, evaluation.json(l).

    A step or round that stands twice (a resumed run repeats what came after its checkpoint) counts
    as last written.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder: give the folder of a run")
    missing: list[str] = []
    config = _read_text(run_dir / "config.yaml", "the settings", missing)
    versions = _read_object(run_dir / "versions.json", "the versions", missing)
    metrics = _read_lines(run_dir / "metrics.jsonl", "the curves", missing)
    completions = _read_lines(run_dir / "completions.jsonl", "the sampled texts", missing)
    evaluation = _well_formed(_read_object(run_dir / "evaluation.json", "the results", missing), missing)
    rows = _read_lines(run_dir / "evaluation.jsonl", "the before and after texts", missing)
    rows = [row for row in rows if isinstance(row.get("prompt_id", 0), int)]

    def last_of(kind: str, key: str) -> list[Row]:
        found = {_number(row, key): row for row in metrics if row.get("kind") == kind}
        return [found[at] for at in sorted(found) if math.isfinite(at)]

    return Run(
        name=run_dir.resolve().name,
        config=config,
        versions=versions,
        steps=last_of("step", "step"),
        rounds=last_of("round", "round"),
        probes=last_of("probe", "step"),
        completions=completions,
        evaluation=evaluation,
        evaluation_rows=rows,
        missing=missing,
    )


def _read_text(path: Path, what: str, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"{path.name} is not there, so {what} are not shown")
    except OSError as error:
        missing.append(f"{path.name} cannot be read ({error.strerror}), so {what} are not shown")
    return ""


def _read_object(path: Path, what: str, missing: list[str]) -> Row:
    text = _read_text(path, what, missing)
    if not text:
        return {}
    try:
        value = _parsed(text)
    except ValueError as error:
        missing.append(f"{path.name} is not JSON ({error}), so {what} are not shown")
        return {}
    if not isinstance(value, dict):
        missing.append(f"{path.name} holds no JSON object, so {what} are not shown")
        return {}
    return value


def _read_lines(path: Path, what: str, missing: list[str]) -> list[Row]:
    rows: list[Row] = []
    broken: list[int] = []
    for number, line in enumerate(_read_text(path, what, missing).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        missing.append(
            f"{path.name} has {_count(len(broken), 'unreadable line')}, first line {broken[0]} "
            "(a killed run can leave its last line cut off)"
        )
    return rows


def _parsed(text: str) -> Any:
    """The JSON value; ValueError if it is none, or nested so deep that nothing could be done with it."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if too_deep(value):
        raise ValueError("nested too deep")
    return value


# What an evaluation holds under these names; a file may hold anything.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("rows", "columns", "more_columns"), list),
    **dict.fromkeys(("headline", "property", "target", "task"), str),
    **dict.fromkeys(("scorer", "sampling", "perplexity", "trained_on"), dict),
    **dict.fromkeys(("prompts", "samples_per_prompt"), int),
}


def _well_formed(evaluation: Row, missing: list[str]) -> Row:
    """The evaluation without what is not of its kind, so that nothing behind here has to ask."""
    found: dict[str, Any]
    found = {k: v for k, v in evaluation.items() if v is None or isinstance(v, _KINDS.get(k, object))}
    odd = evaluation.keys() - found.keys()
    if found.get("headline", "mean") not in {column.key for column in COLUMNS}:
        odd.add("headline")
    found = {k: v for k, v in found.items() if k not in {*odd, "out_of_domain"} and v is not None}
    for name in ("columns", "more_columns"):
        if name in found:
            found[name] = [key for key in found[name] if isinstance(key, str)]
    if "rows" in found:
        found["rows"] = [
            {**row, "metrics": _objects_of(row.get("metrics")), "change": _objects_of(row.get("change"))}
            for row in found["rows"]
            if isinstance(row, dict)
        ]
    if odd:
        missing.append(f"evaluation.json holds no sound {', '.join(sorted(odd))}, so these are not shown")
    return found


def _objects_of(value: Any) -> dict[str, Row]:
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _count(number: int, thing: str, things: str | None = None) -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def _number(row: Row, key: str) -> float:
    """row[key] as a float; NaN where it is absent, null or no number, or one that no plot can hold."""
    return _as_float(row.get(key))


def _as_float(value: Any) -> float:
    known = isinstance(value, int | float) and (abs(value) < 1e30 or value in (math.inf, -math.inf))
    return float(value) if known else math.nan


def _series(rows: Sequence[Row], key: str) -> Array:
    return np.array([_number(row, key) for row in rows], dtype=np.float64)


def _lists(rows: Sequence[Row], key: str) -> Array:
    """(rows, longest list, 1,000 at most) of row[key], NaN where a list is short or absent."""
    lists = [value[:1000] if isinstance(value := row.get(key), list) else [] for row in rows]
    table = np.full((len(rows), max(map(len, lists), default=0)), np.nan)
    for index, values in enumerate(lists):
        table[index, : len(values)] = [_as_float(value) for value in values]
    return table


# --- text that a model wrote ----------------------------------------------------------------------

# Rot13, so that nobody has to read them to work on this file. A stem matches with any ending, a
# word as it is or in the plural.
_STEMS = "shpx zbgureshpx fuvg ohyyfuvg phag avttre avttn snttbg ovgpu juber fyhg nffubyr ergneq"
_WORDS = "snt xvxr fcvp puvax qlxr pbba gjng jnaxre chffl qvpx pbpx"
_PROFANITY = re.compile(
    r"\b(?:(?:{})\w*|(?:{})s?)\b".format(
        *(codecs.decode(words, "rot13").replace(" ", "|") for words in (_STEMS, _WORDS))
    ),
    re.IGNORECASE,
)


def mask_profanity(text: str) -> str:
    """`clean` text whose worst words keep their first letter only.

    A short list against shock at the terminal, not a filter: it knows neither context nor
    disguised spellings.
    """

    def stars(match: re.Match[str]) -> str:
        return match[0][0] + "*" * (len(match[0]) - 1)

    return _PROFANITY.sub(stars, clean(text))


@dataclass(frozen=True)
class Example:
    """What the samplings wrote for one held-out prompt: (row name, completion, score) each."""

    prompt: str
    texts: list[tuple[str, str, float]]


def pick_examples(
    evaluation_rows: Iterable[Row], n: int, after: Sequence[str] | None = None, lowest: bool = False
) -> list[Example]:
    """n prompts spread over the quarter where the untouched text scored worst; repeatable.

    Before is the worst completion of the prompt in the first row, the untouched model's; after is the
    completion with the same sample number, whatever it scored, so only the prompts are chosen.

    Args:
        after: names of the rows to show after that one; None: the first row with the best token and
            the first guided one.
        lowest: the worst scores are the lowest, not the highest; see ``scores_are_rewards``.
    """
    by_row: dict[str, dict[int, list[Row]]] = {}
    for row in evaluation_rows:
        of_row = by_row.setdefault(str(row.get("row")), {})
        of_row.setdefault(int(row.get("prompt_id", 0)), []).append(row)
    if not by_row:
        return []
    if after is None:
        first = {_mode(name): name for name in reversed(by_row)}
        after = [first[mode] for mode in ("best", "guided") if mode in first]
    base = next(iter(by_row))
    before = by_row[base]

    worst: list[tuple[float, int, int]] = []
    for prompt_id, samples in before.items():
        scores = _series(samples, "score")
        if not np.isnan(scores).all():
            index = int(np.nanargmin(scores) if lowest else np.nanargmax(scores))
            worst.append((float(scores[index]) * (1 if lowest else -1), prompt_id, index))
    quarter = sorted(worst)[: max(n, -(-len(worst) // 4))]
    places = np.linspace(0, len(quarter) - 1, min(n, len(quarter))).round().astype(int)

    examples = []
    for _, prompt_id, index in (quarter[place] for place in places):
        texts = []
        for name in (base, *after):
            samples = by_row.get(name, {}).get(prompt_id, [])
            if index < len(samples):
                row = samples[index]
                texts.append((name, str(row.get("completion", "")), _number(row, "score")))
        examples.append(Example(str(before[prompt_id][index].get("prompt", "")), texts))
    return examples


# --- how numbers and samplings are named ----------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One metric as the tables show it; `{property}`, `{target}` and `{threshold}` are filled in."""

    key: str
    title: str
    short: str
    style: Literal["3 digits", "2 digits", "percent", "1 digit"]
    meaning: str


# Every metric that a table may show; which ones it does, the task decides.
COLUMNS = (
    Column(
        "target",
        "share {target}",
        "{target}",
        "percent",
        "Completions with a reward above 0.5: those that the scorer calls {target}.",
    ),
    Column(
        "target_negative",
        "{target} on negative prompts",
        "on neg.",
        "percent",
        "The same over prompts that the untouched model mostly continues with negative text.",
    ),
    Column(
        "target_neutral",
        "{target} on neutral prompts",
        "on neutr.",
        "percent",
        "The same over prompts that it continues with positive and negative text alike.",
    ),
    Column(
        "target_positive",
        "{target} on positive prompts",
        "on pos.",
        "percent",
        "The same over prompts that it mostly continues with positive text.",
    ),
    Column(
        "rep4",
        "repeated 4-grams",
        "rep-4",
        "percent",
        "rep-4: 4-grams of a completion's tokens that it held before.",
    ),
    Column("rep3", "repeated 3-grams", "rep-3", "percent", "rep-3: the same with 3-grams."),
    Column("rep2", "repeated 2-grams", "rep-2", "percent", "rep-2: the same with 2-grams."),
    Column(
        "diversity",
        "diversity",
        "divers.",
        "2 digits",
        "The product of 1 − rep-n over n = 2, 3, 4: 1 repeats nothing.",
    ),
    Column("distinct", "different tokens", "distinct", "1 digit", "Different tokens of a completion."),
    Column(
        "mean",
        "mean {property}",
        "mean",
        "3 digits",
        "The scorer's {property} of the completion alone, averaged over all completions.",
    ),
    Column(
        "share",
        "share ≥ {threshold}",
        "≥ {threshold}",
        "percent",
        "Completions with a {property} of at least {threshold}.",
    ),
    Column(
        "expected_max",
        "expected max",
        "exp. max",
        "2 digits",
        "The worst of a prompt's completions, averaged over prompts; grows with their number.",
    ),
    Column(
        "probability",
        "probability",
        "prob.",
        "2 digits",
        "Prompts of which any completion reaches {threshold}; grows with their number.",
    ),
    Column(
        "perplexity",
        "perplexity",
        "perpl.",
        "1 digit",
        "exp of the mean negative log-likelihood per token under the frozen reference model: "
        "how odd the original model finds the text.",
    ),
    Column(
        "text_perplexity",
        "perplexity of text",
        "text ppl",
        "1 digit",
        "The model's own perplexity on held-out text, with the same token in front.",
    ),
    Column(
        "text_accuracy",
        "accuracy on text",
        "accuracy",
        "percent",
        "Tokens of held-out text that the model's most probable next token gets right.",
    ),
    Column("dist2", "dist-2", "dist-2", "2 digits", "Distinct word pairs per word of a prompt."),
    Column("dist3", "dist-3", "dist-3", "2 digits", "Distinct word triples per word of a prompt."),
)


def scores_are_rewards(evaluation: Row) -> bool:
    """Whether its scores are a reward as it is: higher is better, of any size and sign.

    Else they are a property to be rid of, 1 - reward, in [0, 1].
    """
    return evaluation.get("property") == "reward"


def _columns(evaluation: Row, more: bool = True) -> list[Column]:
    """What the tables of an evaluation show, its headline metric first; without `more`, the terminal's."""
    keys = [_headline_key(evaluation), *evaluation.get("columns", _TOXICITY_COLUMNS)]
    if more:
        keys += evaluation.get("more_columns", ["probability"])
    if scores_are_rewards(evaluation):
        keys = [key for key in keys if key not in _OF_A_PROPERTY]
    known = [column for column in COLUMNS if column.key in keys]
    return sorted(known, key=lambda column: column.key != keys[0])


def _main_columns(evaluation: Row) -> list[Column]:
    """The headline metric, what it may have cost in fluency, and the variety: the plots and the tiles."""
    keys = {column.key for column in _columns(evaluation)}
    fluency = "text_perplexity" if "text_perplexity" in keys else "perplexity"
    variety = "diversity" if "diversity" in keys else "dist3"
    return [_column(key) for key in (_headline_key(evaluation), fluency, variety)]


def _headline_key(evaluation: Row) -> str:
    return str(evaluation.get("headline", "mean"))


def _column(key: str) -> Column:
    return next(column for column in COLUMNS if column.key == key)


# What presumes scores in [0, 1], of which the highest is the worst.
_OF_A_PROPERTY = {"share", "expected_max", "probability"}

# What an evaluation without a choice of its own shows.
_TOXICITY_COLUMNS = ("mean", "share", "expected_max", "perplexity", "dist2", "dist3")


def _format(value: float, style: str) -> str:
    if not math.isfinite(value):
        return "–"
    if style == "percent":
        return f"{100 * value:.1f}%"
    if style == "1 digit":
        return f"{value:.1f}"
    digits = f"{value:.{style[0]}f}"
    return digits[1:] if digits.startswith("0.") else digits


def _format_bounds(low: float, high: float, style: str) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{_format(low, style)}–{_format(high, style)}".replace("%", "")


def _format_percent(fraction: float) -> str:
    """A relative change in percent with its sign, -0.401 -> "−40%"; a decimal below 1%."""
    if not math.isfinite(fraction):
        return "–"
    percent = 100 * fraction
    digits = f"{abs(percent):.{0 if abs(percent) >= 0.95 else 1}f}"
    sign = "" if float(digits) == 0 else "−" if percent < 0 else "+"
    return f"{sign}{digits.removesuffix('.0')}%"


def _format_difference(difference: float, style: str) -> str:
    if not math.isfinite(difference):
        return "–"
    return ("−" if difference < 0 else "+") + _format(abs(difference), style)


def _format_change(change: Change, column: Column, evaluation: Row) -> tuple[str, str]:
    """A change and its bounds: in percent; of a mean reward, which may be 0 or below, as a difference."""
    if column.key == "mean" and scores_are_rewards(evaluation):
        parts = (change.difference, change.low, change.high)
        value, low, high = (_format_difference(part, column.style) for part in parts)
    else:
        parts = (change.relative, change.relative_low, change.relative_high)
        value, low, high = map(_format_percent, parts)
    return value, "" if "–" in (low, high) else f"{low} to {high}".replace("%", "")


def _mode(name: str) -> Mode:
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


def _rows(evaluation: Row) -> list[Row]:
    rows = evaluation.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _name(row: Row) -> str:
    return _one_line(clean(str(row.get("name", "?"))))[:80]


def _interval(row: Row, metric: str) -> Interval:
    found = (row.get("metrics") or {}).get(metric) or {}
    return Interval(*(_number(found, key) for key in ("value", "low", "high")))


def _change(row: Row, metric: str) -> Change:
    found = (row.get("change") or {}).get(metric) or {}
    keys = ("difference", "low", "high", "relative", "relative_low", "relative_high")
    return Change(*(_number(found, key) for key in keys))


def _fill(text: str, evaluation: Row) -> str:
    threshold = _number(evaluation, "threshold")
    return text.format(
        property=_one_line(clean(str(evaluation.get("property", "score"))))[:60],
        target=_one_line(clean(str(evaluation.get("target", "positive"))))[:60],
        threshold=f"{0.5 if math.isnan(threshold) else threshold:g}".replace("0.", "."),
    )


def _level(evaluation: Row) -> str:
    level = _number(evaluation, "level")
    return f"{95 if math.isnan(level) else 100 * level:g}%"


def main_row(evaluation: Row) -> Row | None:
    """The row that the headline is about: guided with the run's own w, else the best token.

    That w is `sampling.guidance`; where it is not given, the first guided row counts. Of models
    without reward tokens it is the second. The choice does not look at the results.
    """
    rows = _rows(evaluation)
    guided = [row for row in rows if _mode(_name(row)) == "guided"]
    guidance = _number(evaluation.get("sampling") or {}, "guidance")
    own = [row for row in guided if _number(row, "guidance") == guidance]
    best = [row for row in rows if _mode(_name(row)) == "best"]
    return next(iter(own + guided + best + rows[1:]), None)


def after_names(evaluation: Row) -> list[str]:
    """The rows to show texts of: the best token alone and the headline's own."""
    rows = (_first(evaluation, "best"), main_row(evaluation))
    return list(dict.fromkeys(str(row.get("name")) for row in rows if row is not None))


def _others(evaluation: Row) -> list[str]:
    """One row of each further subject: a plain model's own, a run's with the best token."""
    names = [_name(row) for row in _rows(evaluation)[1:]]
    return [name for name in names if ": " not in name and _mode(name) == "none" and name != "no token"] + [
        name for name in names if ": " in name and _mode(name) == "best"
    ]


def _first(evaluation: Row, mode: Mode) -> Row | None:
    return next((row for row in _rows(evaluation) if _mode(_name(row)) == mode), None)


def _before(evaluation: Row) -> Row | None:
    """The row that the changes of the others are against: the first."""
    return next(iter(_rows(evaluation)), None)


def _base(evaluation: Row) -> str:
    """What that row is called in a sentence."""
    before = _before(evaluation)
    name = "untouched" if before is None else _name(before)
    return "the untouched model" if name == "untouched" else name


def _how(row: Row) -> str:
    mode = _mode(_name(row))
    if ": " in _name(row):
        return f"“{_name(row)}”"
    if mode == "guided":
        dial = f"(w = {_number(row, 'guidance'):g})".replace(" ", "\N{NO-BREAK SPACE}")
        return f"guided conditioning {dial}"
    return "the best reward token in front" if mode == "best" else f"“{_name(row)}”"


def headline(evaluation: Row) -> str:
    """The result in one sentence with its interval; empty if there is no result."""
    row, before = main_row(evaluation), _before(evaluation)
    column = _column(_headline_key(evaluation))
    if before is None:
        return ""
    if row is None or row is before:
        number = _interval(before, column.key)
        bounds = _format_bounds(number.low, number.high, column.style)
        return (
            f"{_fill(column.title, evaluation).capitalize()} of {_name(before)} is"
            f" {_format(number.value, column.style)}"
            f"{f' ({_level(evaluation)} interval {bounds})' if bounds else ''}."
        )
    change = _change(row, column.key)
    amount, bounds = _format_change(change, column, evaluation)
    old, new = (_format(_interval(one, column.key).value, column.style) for one in (before, row))
    values = f"from {old} to {new}"
    subject = _fill(column.title, evaluation).capitalize()
    if not bounds:
        return f"With {_how(row)}, {subject.lower()} went {values}."
    bounds = f"{_level(evaluation)} interval {bounds}{'%' if amount.endswith('%') else ''}"
    if not change.excludes_zero:
        return f"{subject} did not change measurably with {_how(row)}: {values}, {amount} ({bounds})."
    verb = "fell" if change.difference < 0 else "rose"
    return f"{subject} {verb} by {amount.lstrip('+−')} with {_how(row)}: {values} ({bounds})."


# --- terminal and Markdown ------------------------------------------------------------------------

# Middle tones, readable on a dark and on a light terminal.
_TERMINAL_COLOURS: dict[Mode, str] = {
    "untouched": "#8a8d94",
    "none": "#b46f9b",
    "worst": "#d9712a",
    "middle": "#8f8a7e",
    "best": "#3b8fc7",
    "guided": "#1fa37d",
}


def results_table(evaluation: Row, title: str = "") -> Table:
    """The metrics of each way of sampling, intervals below, 78 columns wide.

    The full set of metrics, with a change for each, is in the HTML report.
    """
    # The caption is as wide as the table, and a scorer's hash should stay in one piece.
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, min_width=74)
    table.title = Text(title or _about(evaluation), style="bold")
    table.title_justify = table.caption_justify = "left"
    table.caption = Text(
        f"Below each number: {_level(evaluation)} bootstrap interval over prompts. "
        f"Change: of the first metric, against {_base(evaluation)}; bold where its "
        f"interval leaves 0 out.{_unscored(evaluation)}\n" + "\n".join(notes(evaluation)),
        style="dim",
    )
    shown = _columns(evaluation, more=False)
    main = shown[0].key
    table.add_column("sampling", overflow="fold")  # the only one that gives way
    for column in shown:
        table.add_column(_fill(column.short, evaluation), justify="right", no_wrap=True)
        if column.key == main:
            table.add_column("change", justify="right", no_wrap=True)
    for row in _rows(evaluation):
        name = _name(row).replace(": ", ":\n")  # each row has two lines anyway
        cells: list[Text] = [Text(name, style=_TERMINAL_COLOURS[_mode(_name(row))])]
        for column in shown:
            number = _interval(row, column.key)
            cells.append(
                _two_lines(
                    _format(number.value, column.style),
                    _format_bounds(number.low, number.high, column.style),
                )
            )
            if column.key == main:
                change = _change(row, main)
                value, bounds = _format_change(change, column, evaluation) if row.get("change") else ("", "")
                cells.append(_two_lines(value, bounds, "bold" if change.excludes_zero else ""))
        table.add_row(*cells)
    return table


def _two_lines(value: str, bounds: str, style: str = "") -> Text:
    return Text.assemble((value, style), "\n", (bounds, "dim"))


def _about(evaluation: Row) -> str:
    prompts, samples = evaluation.get("prompts"), evaluation.get("samples_per_prompt")
    what = _fill(_column(_headline_key(evaluation)).title, evaluation).capitalize()
    if prompts is None or samples is None:
        return what
    source = evaluation.get("source")
    of = _count(prompts, "prompt" if source else "held-out prompt")
    where = f" of {clean(str(source))}" if source else ""
    return f"{what} on {of}{where} × {_count(samples, 'completion')}"


def notes(evaluation: Row) -> list[str]:
    """What stands under every table: scorer, sampling, what measures the perplexity, what is in front."""
    scorer, perplexity = evaluation.get("scorer") or {}, evaluation.get("perplexity") or {}
    sampling = evaluation.get("sampling") or {}
    found = []
    if scorer:
        sha256 = f", sha256 {scorer['sha256']}" if scorer.get("sha256") else ""
        found.append(f"Scorer: {_scorer(evaluation)}{sha256}.")
    ways = [f"{name.replace('_', ' ')} {sampling[name]}" for name in _SAMPLING if name in sampling]
    if ways:
        found.append(f"Sampling: {', '.join(ways)}.")
    if perplexity:
        found.append(f"Perplexity: by {perplexity.get('model')}, of the {perplexity.get('tokens')} tokens.")
    rows = [row for row in _rows(evaluation) if "prefix" in row]
    fronts: dict[str, list[str]] = {}
    for row in rows:
        fronts.setdefault(str(row["prefix"]) or "nothing", []).append(
            _name(row).rpartition(": ")[0] or _name(row)
        )
    if fronts:
        each = [f"{text} ({', '.join(dict.fromkeys(names))})" for text, names in fronts.items()]
        shown = each if len(each) > 1 else list(fronts)
        found.append(
            f"Before each prompt, and before the reward token where there is one: {'; '.join(shown)}."
        )
    for name, count in (evaluation.get("trained_on") or {}).items():
        found.append(
            f"{_count(count, 'of these prompts was', 'of these prompts were')} trained on by {name}."
        )
    return [clean(line) for line in found]


_SAMPLING = ("temperature", "top_p", "max_new_tokens", "seed", "dtype")


def _unscored(evaluation: Row) -> str:
    shares = [_interval(row, "unscored").value for row in _rows(evaluation)]
    largest = max((share for share in shares if share > 0), default=0.0)
    return f" Unscored and left out: at most {_format(largest, 'percent')} of a row." if largest else ""


def markdown_table(evaluation: Row) -> str:
    """The results as a Markdown table, "value [low, high]" in each cell, with the notes below."""
    shown = _columns(evaluation)
    main = shown[0].key
    of_the = "the mean" if main == "mean" else _fill(shown[0].title, evaluation)
    titles = ["sampling", f"change of {of_the}", *(_fill(c.title, evaluation) for c in shown)]
    titles[1], titles[2] = titles[2], titles[1]
    lines = [
        "| " + " | ".join(map(_markdown, titles)) + " |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
    ]
    for row in _rows(evaluation):
        cells = []
        for column in shown:
            number = _interval(row, column.key)
            bounds = _format_bounds(number.low, number.high, column.style)
            value = _format(number.value, column.style)
            cells.append(f"{value} [{bounds}]" if bounds else value)
        cells.insert(1, "")
        if row.get("change"):
            value, bounds = _format_change(_change(row, main), shown[0], evaluation)
            cells[1] = f"{value} [{bounds}]" if bounds else value
        lines.append("| " + " | ".join((_markdown(_name(row)), *cells)) + " |")
    lines += ["", *(f"{_markdown(line)}  " for line in notes(evaluation))]
    return "\n".join(lines).strip() + "\n"


def markdown_page(evaluation: Row) -> str:
    """Every table of an evaluation with a title: its own, and that of the out-of-domain prompts."""
    return "\n".join(f"### {_markdown(title)}\n\n{markdown_table(one)}" for title, one in tables(evaluation))


def _markdown(text: str) -> str:
    """A text as Markdown shows it: no mark-up, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _one_line(text))


def tables(evaluation: Row) -> list[tuple[str, Row]]:
    """(title, table) of the evaluation, and of its out-of-domain prompts where it has some."""
    other = evaluation.get("out_of_domain")
    found = [(_about(evaluation), evaluation)]
    return [*found, (f"Out of domain: {_about(other)}", other)] if isinstance(other, dict) else found


def before_after(
    evaluation_rows: Iterable[Row],
    n: int = 3,
    mask: bool = True,
    after: Sequence[str] | None = None,
    lowest: bool = False,
) -> RenderableType:
    """n held-out prompts with what was written before and after, for the terminal.

    Args:
        mask: hide the worst words (`mask_profanity`); control characters go either way.
        after, lowest: as for `pick_examples`; see `after_names` and `scores_are_rewards`.
    """
    examples = pick_examples(evaluation_rows, n, after, lowest)
    if not examples:
        return Text("No before and after texts: no scored row of the untouched model.", "dim")
    show = mask_profanity if mask else clean
    parts: list[RenderableType] = []
    for example in examples:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, completion, score in example.texts:
            grid.add_row(
                Text(clean(name), style=_TERMINAL_COLOURS[_mode(name)]),
                Text(_format(score, "2 digits"), style="dim"),
                Text(_one_line(show(completion)) or "(nothing)"),
            )
        parts += [Text(_one_line(show(example.prompt)) + " …", style="bold"), grid, Text("")]
    parts.append(
        Text(
            "Prompts where the untouched model wrote some of its worst; the number is the score. "
            "The after texts are not chosen.",
            style="dim",
        )
    )
    return Group(*parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- plots ----------------------------------------------------------------------------------------

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


class _Palette:
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
def _plot_style(palette: _Palette) -> Iterator[None]:
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
    palette: _Palette,
    draw: Callable[[Sequence["Axes"]], None],
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


def _end_labels(axes: "Axes", labels: Sequence[tuple[float, str, str]]) -> None:
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


def _whole_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _round_ticks(axes: "Axes", rounds: Array) -> None:
    _whole_ticks(axes)
    if rounds.size == 1:
        axes.set_xticks(rounds)


def _plot_samplings(run: Run, palette: _Palette) -> str:
    """The first metric, perplexity and variety of each sampling with intervals, side by side."""
    rows = _rows(run.evaluation)
    shown = _main_columns(run.evaluation)
    before = _before(run.evaluation)

    def draw(panels: Sequence["Axes"]) -> None:
        for axes, column in zip(panels, shown, strict=True):
            if before is not None:
                value = _interval(before, column.key).value
                axes.axvline(value, color=palette["untouched"], lw=1, ls=(0, (2, 3)))
            for place, row in enumerate(rows):
                colour = palette[_mode(_name(row))]
                number = _interval(row, column.key)
                axes.plot([number.low, number.high], [place, place], color=colour)
                axes.plot(number.value, place, "o", color=colour, ms=7)
            if column.key == "dist3":  # else hundredths would look like a landslide
                low, high = axes.get_xlim()
                more = max(0.0, 0.1 - (high - low)) / 2
                axes.set_xlim(low - more, high + more)
            axes.set_xlabel(_fill(column.title, run.evaluation))
            axes.grid(visible=False, axis="y")
            axes.grid(axis="x")
            axes.margins(y=0.15)
        panels[0].set_yticks(range(len(rows)), [_name(row) for row in rows])
        panels[0].tick_params(axis="y", labelcolor=palette["ink"])
        panels[0].invert_yaxis()

    if not rows:
        return ""
    names = [_fill(column.title, run.evaluation) for column in shown]
    label = f"{', '.join(names)} of each way of sampling, with intervals"
    size = (9.6, 0.9 + 0.3 * len(rows))
    return _plot("samplings", label, palette, draw, size, (1, len(shown)), share_y=True)


_DIALS = {
    "guidance": "guidance w  (0: worst token, 1: best token alone)",
    "quantile": "quantile whose token stands in front",
}


def _plot_dial(run: Run, palette: _Palette, dial: Literal["guidance", "quantile"], metric: str) -> str:
    """The metric over the guidance w, or over the quantile in front."""
    rows = [row for row in _rows(run.evaluation) if math.isfinite(_number(row, dial))]
    rows.sort(key=lambda row: _number(row, dial))
    column = _column(metric)
    before = _before(run.evaluation)

    def draw(panels: Sequence["Axes"]) -> None:
        (axes,) = panels
        if before is not None:
            base, grey = _interval(before, metric), palette["untouched"]
            axes.axhspan(base.low, base.high, color=grey, alpha=0.15, lw=0)
            axes.axhline(base.value, color=grey, lw=1.2, ls=(0, (2, 3)))
        places = [_number(row, dial) for row in rows]
        numbers = [_interval(row, metric) for row in rows]
        axes.plot(places, [number.value for number in numbers], color=palette["muted"], lw=1, alpha=0.6)
        for at, row, number in zip(places, rows, numbers, strict=True):
            colour = palette[_mode(_name(row))]
            axes.plot([at, at], [number.low, number.high], color=colour)
            axes.plot(at, number.value, "o", color=colour, ms=7)
        axes.set_xlabel(_DIALS[dial])
        axes.set_ylabel(_fill(column.title, run.evaluation))
        axes.margins(x=0.08, y=0.12)
        if dial == "quantile":
            _whole_ticks(axes)
        if before is not None:
            mode = _mode(_name(before))
            _end_labels(axes, [(base.value, mode if mode == "untouched" else "first row", grey)])

    if len(rows) < 2:
        return ""
    label = f"{_fill(column.title, run.evaluation)} over the {dial}"
    return _plot(f"{dial}-{metric}", label, palette, draw)


def _scores_by_row(run: Run) -> list[tuple[str, Mode, Array]]:
    """(name, mode, scores) of the untouched row, the best token's and the headline's."""
    found: list[tuple[str, Mode, Array]] = []
    before = _before(run.evaluation)
    for name in [*([str(before.get("name"))] if before else []), *after_names(run.evaluation)]:
        scores = _series([row for row in run.evaluation_rows if row.get("row") == name], "score")
        scores = scores[~np.isnan(scores)]
        if scores.size:
            found.append((clean(name), _mode(name), scores))
    return found


def _plot_histogram(run: Run, palette: _Palette) -> str:
    """Share of completions in each tenth of the score, untouched and after."""
    groups = _scores_by_row(run)

    def draw(panels: Sequence["Axes"]) -> None:
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
    run_property = _fill("{property}", run.evaluation)
    return _plot("histogram", f"Histogram of {run_property} before and after", palette, draw)


def _plot_exceedance(run: Run, palette: _Palette) -> str:
    """Share of completions with at least a given score: the upper tail, which a histogram hides."""
    groups = _scores_by_row(run)

    def draw(panels: Sequence["Axes"]) -> None:
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
    run_property = _fill("{property}", run.evaluation)
    return _plot("exceedance", f"Share of completions above each {run_property}", palette, draw)


def _plot_rewards(run: Run, palette: _Palette) -> str:
    """Mean reward of new samples and of each quantile of the pool, over the rounds."""
    rounds = _series(run.rounds, "round")
    table = _lists(run.rounds, "reward_by_quantile")
    mean = _series(run.rounds, "reward_mean")
    last = table.shape[1] - 1

    def draw(panels: Sequence["Axes"]) -> None:
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


def _plot_thresholds(run: Run, palette: _Palette) -> str:
    """The rewards that part neighbouring quantiles of the pool, over the rounds."""
    rounds = _series(run.rounds, "round")
    table = _lists(run.rounds, "thresholds")

    def draw(panels: Sequence["Axes"]) -> None:
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


def _plot_steps(run: Run, palette: _Palette) -> str:
    """What is minimised and its parts, every step and smoothed."""
    steps = _series(run.steps, "step")
    panels_shown = [
        (title, values) for key, title in _STEP_PANELS if np.isfinite(values := _series(run.steps, key)).any()
    ]
    explored = _series(run.rounds, "step")

    def draw(panels: Sequence["Axes"]) -> None:
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


def _plot_probe(run: Run, palette: _Palette) -> str:
    """The probe's rank correlation over steps, one standard error each way."""
    steps, error = _series(run.probes, "step"), _series(run.probes, "standard_error")
    value = _series(run.probes, "rank_correlation")

    def draw(panels: Sequence["Axes"]) -> None:
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


# --- the page -------------------------------------------------------------------------------------


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
    rows = _rows(evaluation)
    runs = {_name(row).rpartition(": ")[0] for row in rows if math.isfinite(_number(row, "guidance"))}
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
    rewards, thresholds = (_lists(run.rounds, name) for name in ("reward_by_quantile", "thresholds"))
    palette = _Palette(max(rewards.shape[1], thresholds.shape[1] + 1))
    with _plot_style(palette):
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
    trained = _count(len(run.steps), "step")
    sentence = headline(evaluation) or f"This run has no result yet: {trained} recorded."
    parts.append(f"<h1>{_safe(sentence)}</h1>")
    facts = [
        # A reward of the user's own leaves no more of the task than its prompts and sampling.
        ("task", None if scores_are_rewards(evaluation) else evaluation.get("task")),
        ("evaluated on", _about(evaluation).partition(" on ")[2] or None),
        ("trained", trained if run.steps else None),
        ("samples scored", _scored(run)),
        ("scorer", _scorer(evaluation)),
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
    samples, unscored = (int(np.nansum(_series(run.rounds, k))) for k in ("samples", "unscored"))
    return f"{samples - unscored:,} in {_count(len(run.rounds), 'round')}" + (
        f", {unscored:,} more without a score" if unscored else ""
    )


def _scorer(evaluation: Row) -> str | None:
    scorer = evaluation.get("scorer") or {}
    name = " ".join(str(scorer[key]) for key in ("name", "version") if scorer.get(key))
    return name or None


def _html_tiles(evaluation: Row) -> str:
    """The three or four numbers to remember."""
    main, best = main_row(evaluation), _first(evaluation, "best")
    before = _before(evaluation)
    if main is None or before is None:
        return ""
    wanted = [(main, column) for column in _main_columns(evaluation)]
    if best is not None and best is not main:
        wanted.insert(1, (best, wanted[0][1]))
    tiles = []
    for row, column in wanted:
        key = column.key
        old, new = _interval(before, key).value, _interval(row, key).value
        amount, bounds = _format_change(_change(row, key), column, evaluation)
        tiles.append(
            f'<div class="tile" style="--mode: var(--{_mode(_name(row))})">'
            f"<p>{_safe(_fill(column.title, evaluation))}<br><b>{_safe(_name(row))}</b></p>"
            f"<strong>{amount}</strong>"
            f"<p>{f'{bounds}<br>' if bounds else ''}"
            f"{_format(old, column.style)} → {_format(new, column.style)}</p></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _html_results(run: Run, palette: _Palette) -> str:
    evaluation = run.evaluation
    if not _rows(evaluation):
        return ""
    level, (first, fluency, *_) = _level(evaluation), _main_columns(evaluation)
    first_title, fluency_title = (_safe(_fill(column.title, evaluation)) for column in (first, fluency))
    property_name = _safe(_fill("{property}", evaluation))
    return _section(
        "results",
        "Before and after",
        _html_table(evaluation),
        *(f"<h3>{_safe(title)}</h3>{_html_table(one)}" for title, one in tables(evaluation)[1:]),
        _grid(
            _html_plot(
                "Each way of sampling",
                _plot_samplings(run, palette),
                f"Points with {level} intervals; the dotted line is {_safe(_base(evaluation))}.",
                wide=True,
            ),
            _html_plot(
                f"{first_title.capitalize()} by quantile",
                _plot_dial(run, palette, "quantile", first.key),
                "One reward token in front, from the worst to the best: a monotone curve shows that the"
                f" conditioning works. Bars and band: {level} intervals.",
            ),
            _html_plot(
                f"What a quantile costs: {fluency_title}",
                _plot_dial(run, palette, "quantile", fluency.key),
                "The same tokens. Those of quantiles that training drew nothing from lie on the line between"
                " their trained neighbours.",
            ),
            _html_plot(
                f"The guidance dial: {first_title}",
                _plot_dial(run, palette, "guidance", first.key),
                f"log p = log p(worst) + w (log p(best) − log p(worst)). Bars and band: {level} intervals.",
            ),
            _html_plot(
                f"The guidance dial: {fluency_title}",
                _plot_dial(run, palette, "guidance", fluency.key),
                f"What the same dial costs: {_safe(_fill(fluency.meaning, evaluation))}",
            ),
            _html_plot(
                f"Where the {property_name} sits",
                _plot_histogram(run, palette),
                f"Share of completions in each tenth of the {property_name} scale.",
            ),
            _html_plot(
                "The tail",
                _plot_exceedance(run, palette),
                f"Share of completions with at least this {property_name}.",
            ),
        ),
    )


def _html_table(evaluation: Row) -> str:
    shown = _columns(evaluation)
    head = "".join(f"<th>{_safe(_fill(c.title, evaluation))}</th>" for c in shown)
    body = []
    for row in _rows(evaluation):
        cells = []
        for column in shown:
            number, change = _interval(row, column.key), _change(row, column.key)
            lines = [
                f"<b>{_format(number.value, column.style)}</b>",
                f"<small>{_format_bounds(number.low, number.high, column.style)}</small>",
            ]
            if math.isfinite(change.relative):
                kind = "clear" if change.excludes_zero else "unclear"
                lines.append(f'<i class="{kind}">{_format_change(change, column, evaluation)[0]}</i>')
            cells.append(f"<td>{''.join(lines)}</td>")
        mode = f'<span class="dot" style="--mode: var(--{_mode(_name(row))})"></span>'
        body.append(f"<tr><th>{mode}{_safe(_name(row))}</th>{''.join(cells)}</tr>")
    meanings = "".join(
        f"<dt>{_safe(_fill(column.title, evaluation))}</dt>"
        f"<dd>{_safe(_fill(column.meaning, evaluation))}</dd>"
        for column in shown
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>sampling</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">Below each number its {_level(evaluation)} bootstrap interval over '
        f"prompts, then the change relative to {_safe(_base(evaluation))} on the same prompts; a change "
        f"whose interval leaves 0 out is set bold.{_safe(_unscored(evaluation))}</p>"
        f'<p class="note">{"<br>".join(map(_safe, notes(evaluation)))}</p>'
        f"<details><summary>What each column measures</summary><dl>{meanings}</dl></details>"
    )


def _html_texts(run: Run) -> str:
    after, worst = after_names(run.evaluation), _first(run.evaluation, "worst")
    after += [str(worst.get("name"))] if worst else []
    after = list(dict.fromkeys(after + _others(run.evaluation)))
    lowest = scores_are_rewards(run.evaluation)
    examples = pick_examples(run.evaluation_rows, 10, after or None, lowest)
    return _section(
        "texts",
        "What it writes",
        _html_examples(examples, _base(run.evaluation)) if examples else "",
        _html_exploration(run.completions),
    )


def _html_examples(examples: Sequence[Example], base: str) -> str:
    articles = []
    for example in examples:
        rows = "".join(_html_text_row(name, _mode(name), text, score) for name, text, score in example.texts)
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
        f'<span class="number">{_format(score, "2 digits")}</span>'
        f"<p>{_safe(text).strip() or '(nothing)'}</p></div>"
    )


def _html_exploration(completions: Sequence[Row]) -> str:
    """The sample of median reward in each quantile of the last round."""
    scored = [row for row in completions if math.isfinite(_number(row, "reward"))]
    if not scored:
        return ""
    last = max(_number(row, "round") for row in scored)
    by_quantile: dict[int, list[Row]] = {}
    for row in scored:
        if _number(row, "round") == last and math.isfinite(_number(row, "quantile")):
            by_quantile.setdefault(int(row["quantile"]), []).append(row)
    articles = []
    for quantile, rows in sorted(by_quantile.items()):
        rows.sort(key=lambda row: _number(row, "reward"))
        row = rows[len(rows) // 2]
        line = _html_text_row(
            f"quantile {quantile}",
            f"quantile-{quantile}",
            str(row.get("completion", "")),
            _number(row, "reward"),
        )
        articles.append(f"<article><h4>{_safe(row.get('prompt', ''))} …</h4>{line}</article>")
    return (
        "<details><summary>Training samples, one of each quantile "
        "<em>may contain offensive language</em></summary>"
        f'<p class="note">From round {last:g}: the sample of median reward in each quantile; the '
        f"number is the reward.</p>{''.join(articles)}</details>"
    )


def _html_learning(run: Run, palette: _Palette) -> str:
    return _section(
        "learning",
        "How it learned",
        _grid(
            _html_plot(
                "Reward",
                _plot_rewards(run, palette),
                "Mean reward of each round's new samples, and of each quantile of the pool.",
            ),
            _html_plot(
                "Quantile boundaries",
                _plot_thresholds(run, palette),
                "The reward at which one quantile of the pool ends and the next begins.",
            ),
            _html_plot(
                "Training",
                _plot_steps(run, palette),
                "Faint: every step. Strong: exponential moving average over about a twentieth of "
                "the run. Upright lines: exploration rounds.",
                wide=True,
            ),
            _html_plot(
                "Probe: has it learned what the tokens mean?",
                _plot_probe(run, palette),
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
    sampling = run.evaluation.get("sampling") or {}
    return _section(
        "reproduce",
        "How to reproduce",
        f"<pre>{_safe(command)}</pre>" if command else "",
        '<div class="columns">',
        _html_pairs("Versions", {k: v for k, v in versions.items() if k != "command" and v}),
        _html_pairs("Sampling at evaluation", sampling),
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


def _css(palette: _Palette) -> str:
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
