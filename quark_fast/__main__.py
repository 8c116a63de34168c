"""``quark-fast COMMAND ...``, or ``python -m quark_fast COMMAND ...``: which commands there are; runs one."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from quark_fast import __version__
from quark_fast.errors import EXIT_STATUS

COMMANDS = {
    "train": "unlearn a property: settings in, a run folder with report and model out",
    "generate": "text of a finished run, before and after",
    "evaluate": "runs, models and earlier tables side by side",
    "ablate": "a small grid of runs, one table and one plot",
    "report": "a run's report.html again, from its files; several runs on one page",
    "completion": "a script by which a shell completes all this",
}


def usage() -> str:
    lines = [f"  {name:<11}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quark-fast COMMAND ..., or python -m quark_fast.COMMAND ...; each has --help",
            "",
            *lines,
            "",
            "  --version",
            "",
            EXIT_STATUS,
        ]
    )


def _module(name: str) -> ModuleType:
    """The command of that name, imported when it is asked for."""
    if name == "train":
        from quark_fast import train

        return train
    if name == "generate":
        from quark_fast import generate

        return generate
    if name == "evaluate":
        from quark_fast import evaluate

        return evaluate
    if name == "ablate":
        from quark_fast import ablate

        return ablate
    if name == "completion":
        from quark_fast import completion

        return completion
    from quark_fast.report import __main__ as report

    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; its exit status."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help", "--version"):
        print(f"quark_fast {__version__}" if name == "--version" else usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: no command {name!r}{hint}\n\n{usage()}" if name else usage(), file=sys.stderr)
        return 2
    module = _module(name)
    # As python -m sets them: a run's record has the command that made it, and a reward is imported from the
    # folder that it was begun in.
    sys.argv = [str(module.__file__), *rest]
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    status: int = module.main()
    return status


if __name__ == "__main__":
    sys.exit(main())
