"""``quark-fast completion bash|zsh|tcsh``: the script by which a shell completes commands and flags."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from quark_fast import ablate, evaluate, generate
from quark_fast.arguments import Parser, settings_parser
from quark_fast.config import TASK_DEFAULTS
from quark_fast.errors import UsageError
from quark_fast.report import __main__ as report
from quark_fast.runtime.console import Terminal
from quark_fast.terminal import command

SHELLS = ("bash", "zsh", "tcsh")


def parser() -> Parser:
    made = Parser(prog="quark-fast completion", description=__doc__)
    made.add_argument("shell", choices=SHELLS)
    return made


def all_commands() -> argparse.ArgumentParser:
    """One parser of every command, whose values are choices or files."""
    import shtab

    settings = settings_parser("quark-fast train")
    parents: dict[str, list[Parser]] = {
        "train": [settings],
        "generate": [generate.parser()],
        "evaluate": [evaluate.parser()],
        "ablate": [settings, ablate.parser()],
        "report": [report.parser()],
        "completion": [parser()],
    }
    every = argparse.ArgumentParser("quark-fast", add_help=False)
    every.add_argument("--version", action="store_true")
    commands = every.add_subparsers()
    for name, of_command in parents.items():
        about = of_command[-1].description  # without one shtab leaves the command out
        made = commands.add_parser(
            name, parents=of_command, help=about, add_help=False, conflict_handler="resolve"
        )
        for action in made._actions:
            # HfArgumentParser spells each flag in two ways.
            action.option_strings = [flag for flag in action.option_strings if "_" not in flag]
            if action.dest == "task":
                action.choices = list(TASK_DEFAULTS)
            elif action.nargs != 0 and action.choices is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return every


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Print the script of the shell asked for."""
    shell = parser().parse_args(arguments).shell
    if importlib.util.find_spec("shtab") is None:
        raise UsageError("completion needs its package: pip install shtab")
    import shtab

    try:
        print(shtab.complete(all_commands(), shell), flush=True)
    except BrokenPipeError:  # whoever reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
