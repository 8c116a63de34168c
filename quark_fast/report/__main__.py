"""``python -m quark_fast.report RUN``: write a run's report.html anew, from its files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quark_fast.arguments import Parser
from quark_fast.errors import UsageError
from quark_fast.runtime.console import Terminal
from quark_fast.terminal import command


def parser() -> Parser:
    made = Parser(prog="python -m quark_fast.report", description=__doc__)
    made.add_argument("run", metavar="RUN", help="run folder of quark_fast.train, finished or not")
    return made


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Write the page, and print what the folder lacks for it."""
    folder = Path(parser().parse_args(arguments).run)
    from quark_fast.report.files import read_run
    from quark_fast.report.page import write_report

    if not (folder / "config.yaml").exists():
        raise UsageError(f"{folder} is no run folder (no config.yaml); give the --output of a run")
    files = read_run(folder)
    for line in files.missing:
        notices.print(line)
    console.print(f"report: {write_report(folder, files)}")


if __name__ == "__main__":
    sys.exit(main())
