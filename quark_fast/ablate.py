"""``python -m quark_fast.ablate``: a small grid of runs around a base, one table and one plot."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from quark_fast.arguments import HELP, Parser, parse
from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.runtime.console import Terminal
from quark_fast.terminal import agreed, command

PROGRAM = "python -m quark_fast.ablate"


def parser() -> Parser:
    made = Parser(
        prog=PROGRAM,
        description="Ablations: each axis varies one thing around a base, which is the settings given.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    made.add_argument(
        *HELP,
        nargs="?",
        const=True,
        choices=["all"],
        metavar="all",
        help="show this, and the points of the grid; with all the settings of a base",
    )
    made.add_argument(
        "--grid", metavar="AXES", help="axes, with commas between; default: all that the base can have"
    )
    made.add_argument("--seeds", default="0", help="seeds, with commas between (default: 0)")
    made.add_argument("--dry-run", action="store_true", help="list the points and run nothing")
    return made


def _axes(grid: str | None, base: Config) -> tuple[list[str], list[str]]:
    """(the axes that were asked for, or all that the base can have; a line for each that it cannot).

    And a line for each point that would be a copy of another.
    """
    from quark_fast.ablation.axes import AXES, copies, left_out

    if grid:
        asked = list(dict.fromkeys(axis.strip() for axis in grid.split(",")))
        return asked, [f"left out: {line}" for line in copies(base, asked)]
    without = left_out(base)
    if len(without) == len(AXES):
        raise UsageError(f"this base can have no axis: {'; '.join(without.values())}")
    lines = [f"left out: {axis}, since {why}" for axis, why in without.items()]
    axes = [axis for axis in AXES if axis not in without]
    return axes, [*lines, *(f"left out: {line}" for line in copies(base, axes))]


def listing(base: Config, axes: Sequence[str], seeds: Sequence[int]) -> str:
    """The points by axis with their settings, and the number of runs."""
    from quark_fast.ablation.axes import distinct_settings, points_of

    points = points_of(base, axes)
    lines = []
    for axis in axes:
        lines.append(f"{axis}:")
        for point in (point for point in points if point.axis == axis):
            lines.append(f"  {point.value:24}{_as_flags(point.settings) or 'the base'}")
    count = len(distinct_settings(points))
    lines.append(f"{count} runs a seed (shared points run once), {count * len(seeds)} in all")
    return "\n".join(lines)


def _as_flags(settings: Mapping[str, Any]) -> str:
    return "  ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in settings.items()
    )


class _Asked(NamedTuple):
    """What the command line asks for; ``without``: a line for each axis or point that is left out."""

    show: str
    base: Config
    axes: list[str]
    seeds: list[int]
    without: list[str]


def _asked(arguments: Sequence[str]) -> _Asked:
    from quark_fast.ablation.axes import DEFAULTS

    own, settings = parser().parse_known_args(arguments)
    if own.help == "all":
        parse([*settings, "--help", "all"], PROGRAM, DEFAULTS)
    seeds = _seeds(own.seeds)
    base = parse(settings, PROGRAM, DEFAULTS)
    axes, without = _axes(own.grid, base)
    unusual = {"--no-eval": not base.eval, "--from": base.from_run, "--push-to-hub": base.push_to_hub}
    if any(unusual.values()):
        flag = next(flag for flag, given in unusual.items() if given)
        raise UsageError(
            f"a grid trains runs from the base model and compares their evaluations; leave out {flag}"
        )
    if base.resume:
        raise UsageError("a grid goes on by itself; leave out --resume")
    if base.seed:
        raise UsageError(f"seed = {base.seed}; a grid has --seeds {base.seed}")
    return _Asked("help" if own.help else "points" if own.dry_run else "", base, axes, seeds, without)


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Run or list the grid, then show its table; of several processes the first shows."""
    from quark_fast.ablation.axes import DEFAULTS

    show, base, axes, seeds, without = agreed(lambda: _asked(arguments), console, notices)
    if show == "help":
        console.print(parser().format_help())
        console.print(
            "Every other option is a setting of the base (--help all); defaults other than those of training:"
            f" {_as_flags(DEFAULTS)}\n"
        )
    if show:
        console.print("\n".join([listing(base, axes, seeds), *without]), soft_wrap=True)
        return
    for line in without:
        notices.print(line)
    folder = _run(base, axes, seeds, notices)
    if not console.quiet:
        _show(folder, console, notices)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise UsageError(f"--seeds {text!r}: give whole numbers with commas between")
    return list(dict.fromkeys(map(int, parts)))


def _run(base: Config, axes: Sequence[str], seeds: Sequence[int], notices: Terminal) -> Path:
    """Run what is not finished of the grid; its folder."""
    from quark_fast.ablation.grid import run_grid
    from quark_fast.runtime.machine import quiet_libraries
    from quark_fast.runtime.memory import keep_freed_memory
    from quark_fast.training.display import Display

    quiet_libraries()
    keep_freed_memory()
    display = Display(notices, mask=not base.show_offensive)
    with display.shown():
        return run_grid(base, axes, seeds, note=notices.print, listen=display)


def _show(folder: Path, console: Terminal, notices: Terminal) -> None:
    """The grid's table without its last columns, and where its files are."""
    from quark_fast.ablation.table import short_table
    from quark_fast.report.columns import intervals_note
    from quark_fast.report.results import scorer_line

    results = json.loads((folder / "ablations.json").read_text(encoding="utf-8"))
    head, *lines = short_table(results)
    whole = (
        "Change: against the base model. Difference: from the grid's base where none is named. In brackets"
        " 95% bootstrap intervals. All columns, and what they are: ablations.md."
    )
    shown = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    lines_below = (whole, intervals_note(results["prompts"]), scorer_line(results))
    shown.caption, shown.caption_justify = "\n".join(filter(None, lines_below)), "left"
    for title in head:
        shown.add_column(title, overflow="fold")  # a number in two lines is still that number
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    notices.print(f"{folder / 'ablations.md'}, {folder / 'ablations.svg'}, {folder / 'ablations.json'}")


if __name__ == "__main__":
    sys.exit(main())
