"""An evaluation in the terminal and in Markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from quark_fast.files.safe_text import clean
from quark_fast.report.columns import (
    columns_of,
    counted,
    fill,
    find_column,
    format_value,
    headline_column,
    intervals_note,
    one_line,
)
from quark_fast.report.records import Record, cuts_of
from quark_fast.report.results import (
    Way,
    base_name,
    cell_of,
    has_intervals,
    headline,
    interval_of,
    judge_lines,
    name_of,
    rows_of,
    scorer_line,
    unscored_by_judges,
    way_of,
    without_reward,
)
from quark_fast.report.texts import has_control, has_scores, mask_profanity, pick_examples
from quark_fast.runtime.console import Terminal

# Middle tones, readable on a dark and on a light terminal.
_TERMINAL_COLOURS: dict[Way, str] = {
    "base": "#8a8d94",
    "none": "#b46f9b",
    "worst": "#d9712a",
    "middle": "#8f8a7e",
    "best": "#3b8fc7",
    "guided": "#1fa37d",
}


@dataclass(frozen=True)
class ResultsColumn:
    """A column of the terminal's table: its heading, and a cell of two lines for each row."""

    heading: str
    cells: list[Text]

    @property
    def width(self) -> int:
        lines = [self.heading, *(line for cell in self.cells for line in cell.plain.split("\n"))]
        return max(map(cell_len, lines))


@dataclass(frozen=True)
class ResultsTable:
    """An evaluation for the terminal or a log; columns that lines have no room for follow below."""

    title: str
    caption: str
    columns: list[ResultsColumn]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self._parts(options.max_width)
        for part in parts:
            # The caption is as wide as the table, and a scorer's hash should stay in one piece.
            table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, min_width=74)
            table.title_justify = table.caption_justify = "left"
            if part is parts[0]:
                table.title = Text(self.title, style="bold")
            if part is parts[-1]:
                table.caption = Text(self.caption, style="dim")
            names, *numbers = part
            room = options.max_width - sum(1 + one.width for one in numbers)
            # The only one that gives way; its heading does not fold.
            table.add_column(names.heading if room >= len(names.heading) else "row", overflow="fold")
            for one in numbers:
                fits = self._names_width + 1 + one.width <= options.max_width
                table.add_column(one.heading, justify="right", no_wrap=fits, overflow="fold")
            for cells in zip(*(one.cells for one in part), strict=True):
                table.add_row(*cells)
            yield table
            if part is not parts[-1]:
                yield ""

    def _parts(self, width: int) -> list[list[ResultsColumn]]:
        """The columns of each table, the names of the rows first in all."""
        names, *numbers = self.columns
        parts = [[names]]
        for one in numbers:
            used = self._names_width + sum(1 + other.width for other in parts[-1][1:])
            if len(parts[-1]) > 1 and used + 1 + one.width > width:
                parts.append([names])
            parts[-1].append(one)
        return parts

    @property
    def _names_width(self) -> int:
        """The least for the rows' names: their longest word, but a run's name is cut into lines of 8."""
        words = [word for cell in self.columns[0].cells for word in cell.plain.split()]
        return min(8, max(map(cell_len, words), default=0))


def results_table(evaluation: Record, title: str = "") -> ResultsTable:
    """The metrics of each way of sampling, intervals below, 78 columns wide as a rule.

    The full set of metrics, with a change for each, is in the HTML report.
    """
    rows = rows_of(evaluation)
    # Each row has two lines anyway.
    names = [Text(name_of(row).replace(": ", ":\n"), _TERMINAL_COLOURS[way_of(name_of(row))]) for row in rows]
    columns = [ResultsColumn("sampling", names)]
    for number, column in enumerate(columns_of(evaluation, more=False)):
        cells = [cell_of(evaluation, row, column) for row in rows]
        values = [_two_lines(cell.value, cell.bounds) for cell in cells]
        columns.append(ResultsColumn(fill(column.short, evaluation), values))
        if number == 0:
            changes = [
                _two_lines(cell.change, cell.change_bounds, "bold" if cell.is_clear else "") for cell in cells
            ]
            columns.append(ResultsColumn("change", changes))
    intervals = has_intervals(evaluation)
    caption = (
        ("Below each number: 95% bootstrap interval over prompts. " if intervals else "")
        + f"Change: of the first metric, against {base_name(evaluation)}"
        + ("; bold where its interval leaves 0 out." if intervals else ".")
        + "\n"
        + "\n".join(notes(evaluation, more=False))
    )
    return ResultsTable(title or about(evaluation), caption, columns)


def _two_lines(value: str, bounds: str, style: str = "") -> Text:
    return Text.assemble((value, style), "\n", (bounds, "dim"))


def about(evaluation: Record) -> str:
    prompts, samples = evaluation.get("prompts"), evaluation.get("samples_per_prompt")
    what = fill(headline_column(evaluation).title, evaluation).capitalize()
    if prompts is None or samples is None:
        return what
    source = evaluation.get("source")
    split = {"development": "development ", "test": "test "}.get(str(evaluation.get("split")), "")
    of = counted(prompts, f"{split}prompt" if split or source else "held-out prompt")
    where = f" of {clean(str(source))}" if source else ""
    return f"{what} on {of}{where} × {counted(samples, 'completion')}"


def notes(evaluation: Record, more: bool = True) -> list[str]:
    """What stands under a table: what intervals of few prompts are worth, and how it was measured.

    Without `more` it is the terminal's table, which may have no perplexity.
    """
    perplexity, sampling = evaluation.get("perplexity") or {}, evaluation.get("sampling") or {}
    found = []
    if few := intervals_note(evaluation.get("prompts")):
        found.append(few)
    if scorer := scorer_line(evaluation):
        found.append(scorer)
    found += judge_lines(evaluation)
    found += _unscored_lines(evaluation)
    ways = [f"{name.replace('_', ' ')} {sampling[name]}" for name in _SAMPLING if name in sampling]
    if ways:
        found.append(f"Sampling: {', '.join(ways)}.")
    if perplexity and find_column("perplexity") in columns_of(evaluation, more):
        found.append(f"Perplexity: by {perplexity.get('model')}, of the {perplexity.get('tokens')} tokens.")
    passages = evaluation.get("text_passages")
    has_texts = find_column("text_perplexity") in columns_of(evaluation, more)
    if has_texts and isinstance(passages, int) and passages == evaluation.get("prompts"):  # else all of them
        found.append(f"Perplexity of text: of {counted(passages, 'passage')}, one beside each prompt.")
    rows = [row for row in rows_of(evaluation) if "prefix" in row]
    fronts: dict[str, list[str]] = {}
    for row in rows:
        fronts.setdefault(str(row["prefix"]) or "nothing", []).append(
            name_of(row).rpartition(": ")[0] or name_of(row)
        )
    if fronts:
        each = [f"{text} ({', '.join(dict.fromkeys(names))})" for text, names in fronts.items()]
        shown = each if len(each) > 1 else list(fronts)
        found.append(
            f"Before each prompt, and before the reward token where there is one: {'; '.join(shown)}."
        )
    for name, count in (evaluation.get("trained_on") or {}).items():
        if isinstance(count, int):  # a file may hold anything
            found.append(
                f"{counted(count, 'of these prompts was', 'of these prompts were')} trained on by {name}."
            )
    for name, count, tokens in cuts_of(evaluation):
        were = counted(count, "of these prompts was", "of these prompts were")
        found.append(f"{were} cut to the last {counted(tokens, 'token')}{f' for {name}' if name else ''}.")
    return [clean(line) for line in found]


_SAMPLING = ("temperature", "top_p", "max_new_tokens", "seed", "dtype")


def _unscored_lines(evaluation: Record) -> list[str]:
    """Of how many completions, at most, the mean of the scorer and of each judge says nothing."""
    scorer = [] if without_reward(evaluation) else [("", "unscored")]  # else the headline says it
    found = []
    for who, metric in [*scorer, *((f" by {name}", key) for name, key in unscored_by_judges(evaluation))]:
        shares = [interval_of(row, metric).value for row in rows_of(evaluation)]
        if largest := max((share for share in shares if share > 0), default=0.0):
            share = format_value(largest, "percent")
            found.append(f"Unscored{who} and left out: at most {share} of a row.")
    return found


def as_markdown(text: str) -> str:
    """A text as Markdown shows it: no mark-up, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line(text))


def markdown_table(evaluation: Record, show: Callable[[str], str] = as_markdown) -> str:
    """The results as a Markdown table, "value [low, high]" in each cell, with the notes below.

    Args:
        show: makes Markdown of a text from anywhere.
    """
    main, *others = columns_of(evaluation)
    of_the = "the mean" if main.key == "mean" else fill(main.title, evaluation)
    titles = [fill(column.title, evaluation) for column in (main, *others)]
    titles = ["sampling", titles[0], f"change of {of_the}", *titles[1:]]
    lines = [
        "| " + " | ".join(map(show, titles)) + " |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
    ]
    for row in rows_of(evaluation):
        first, *rest = (cell_of(evaluation, row, column) for column in (main, *others))
        numbers = [(first.value, first.bounds), (first.change, first.change_bounds)]
        numbers += [(cell.value, cell.bounds) for cell in rest]
        cells = [f"{value} [{bounds}]" if bounds else value for value, bounds in numbers]
        lines.append("| " + " | ".join((show(name_of(row)), *cells)) + " |")
    lines += ["", *(f"{show(line)}  " for line in notes(evaluation))]
    return "\n".join(lines).strip() + "\n"


def markdown_page(evaluation: Record, show: Callable[[str], str] = as_markdown) -> str:
    """Every table of an evaluation with a title: its own, and that of the out-of-domain prompts."""
    return "\n".join(f"### {show(title)}\n\n{markdown_table(one, show)}" for title, one in tables(evaluation))


def tables(evaluation: Record) -> list[tuple[str, Record]]:
    """(title, table) of the evaluation, and of its out-of-domain prompts where it has some."""
    other = evaluation.get("out_of_domain")
    found = [(about(evaluation), evaluation)]
    return [*found, (f"Out of domain: {about(other)}", other)] if isinstance(other, dict) else found


def as_text(evaluation: Record) -> str:
    """Headline and tables as a terminal of 80 columns has them, without colours."""
    console = Terminal(file=io.StringIO(), width=80)
    with console.capture() as shown:
        console.print(Text(headline(evaluation)))
        for title, table in tables(evaluation):
            console.print(results_table(table, title))
    return shown.get().rstrip()


def before_after(
    evaluation_rows: Iterable[Record],
    mask: bool = True,
    after: Sequence[str] | None = None,
    lowest: bool = False,
) -> RenderableType:
    """Three held-out prompts with what was written before and after, for the terminal.

    Args:
        mask: hide the worst words (`mask_profanity`); control characters go either way.
        after, lowest: as for `pick_examples`; see `after_names` and `scores_are_rewards`.
    """
    examples = pick_examples(evaluation_rows, 3, after, lowest)
    if not examples:
        return Text("No before and after texts: no row of the base model.", "dim")
    show = mask_profanity if mask else clean
    parts: list[RenderableType] = []
    for example in examples:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, completion, score in example.texts:
            grid.add_row(
                Text(clean(name), style=_TERMINAL_COLOURS[way_of(name)]),
                Text(format_value(score, "2 digits"), style="dim"),
                Text(one_line(show(completion)) or "(nothing)"),
            )
        parts += [Text(one_line(show(example.prompt)) + " …", style="bold"), grid, Text("")]
    chosen = (
        "Prompts where the base model wrote some of its worst; the number is the score."
        if has_scores(examples)
        else "Prompts spread over all, as no completion has a score."
    )
    control = " The base model's next completion (again) is the control; no after text is chosen."
    parts.append(Text(f"{chosen}{control if has_control(examples) else ''}", style="dim"))
    return Group(*parts)
