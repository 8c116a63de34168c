"""``python -m quark_fast.report RUN``: write a run's report.html anew, from its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from quark_fast.arguments import Parser
from quark_fast.errors import UsageError
from quark_fast.terminal import Terminal, exit_status


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m quark_fast.report", description=__doc__)
    made.add_argument("run", metavar="RUN", help="run folder of quark_fast.train, finished or not")
    return made


def run(arguments: argparse.Namespace, console: Terminal) -> None:
    """Write the page, and say what the folder lacks for it."""
    from quark_fast.report.files import read_run
    from quark_fast.report.page import write_report

    folder = Path(arguments.run)
    if not (folder / "config.yaml").exists():
        raise UsageError(f"{folder} is no run folder (no config.yaml); give the --output of a run")
    for line in read_run(folder).missing:
        console.print(line)
    console.print(f"report: {write_report(folder)}")


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(parser().parse_args(arguments), Terminal()))


if __name__ == "__main__":
    sys.exit(main())
