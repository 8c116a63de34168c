"""``python -m quark_fast.report RUN``: write a run's report.html anew; compare several runs on a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quark_fast.arguments import Parser, settings_in
from quark_fast.errors import UsageError
from quark_fast.runtime.console import Terminal
from quark_fast.terminal import check_output, command


def parser() -> Parser:
    made = Parser(prog="python -m quark_fast.report", description=__doc__)
    made.add_argument(
        "runs", metavar="RUN", nargs="+", help="run folder of quark_fast.train, finished or not"
    )
    made.add_argument(
        "--output",
        metavar="FILE.html",
        type=Path,
        help="page of several runs: their curves over one another, the settings that differ, their tables and"
        " texts side by side where scorer, prompts and sampling are the same",
    )
    return made


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Write the page, and print what the folder lacks for it."""
    given = parser().parse_args(arguments)
    folders = [Path(run) for run in given.runs]
    for folder in folders:
        if not (folder / "config.yaml").exists():
            raise UsageError(f"{folder} is no run folder (no config.yaml); give the --output of a run")
    if len(folders) == 1:
        if given.output:
            raise UsageError(f"--output {given.output} is for several runs; one has its report in its folder")
        _write_anew(folders[0], console, notices)
    else:
        _compare(folders, given.output, console, notices)


def _write_anew(folder: Path, console: Terminal, notices: Terminal) -> None:
    from quark_fast.report.files import read_run
    from quark_fast.report.page import write_report

    files = read_run(folder)
    for line in files.missing:
        notices.print(line)
    console.print(f"report: {write_report(folder, files)}")


def _compare(folders: Sequence[Path], output: Path | None, console: Terminal, notices: Terminal) -> None:
    if output is None:
        raise UsageError("several runs are compared on a page of its own; name it by --output FILE.html")
    if output.suffix != ".html":
        raise UsageError(f"--output {output}: give a name in .html")
    check_output(f"--output {output}", output)
    from quark_fast.evaluation.side_by_side import Evaluator
    from quark_fast.evaluation.subjects import short_names
    from quark_fast.files.atomic import replacing
    from quark_fast.report.comparison import Compared, differing
    from quark_fast.report.files import read_run
    from quark_fast.report.page import comparison_page

    names = short_names([str(folder) for folder in folders])
    settings = differing([settings_in(folder / "config.yaml") for folder in folders])
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    why, table, samples = "", {}, []
    try:
        if without := [name for name, run in runs.items() if not run.evaluation]:
            raise UsageError(f"{' and '.join(without)}: not evaluated")
        evaluator = Evaluator([str(folder / "evaluation.json") for folder in folders])
        for remark in evaluator.remarks:
            notices.print(remark)
        made = evaluator.evaluate()
        table, samples = made.table, made.samples
    except UsageError as error:  # or evaluated by other scorers, prompts, sampling: shown apart
        why = str(error)
        notices.print(f"no common table: {why}")
    page = comparison_page(table, samples, {}, Compared(runs, settings, why))
    with replacing(output) as scratch:
        scratch.write_text(page, encoding="utf-8")
    console.print(f"report: {output}")


if __name__ == "__main__":
    sys.exit(main())
