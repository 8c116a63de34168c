"""accelerate's launcher, whose processes are forked off it: they have their imports done.

    python -m launcher options -m module arguments

as ``python -m accelerate.commands.launch`` takes them; everything but the start of an interpreter is its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from warm import Process


def fork(handler: SubprocessHandler, command: tuple[str, ...], environment: dict[str, str]) -> Any:
    """In place of ``_popen``: what it would start, in a session of its own, writing where this one does."""
    python, unbuffered, as_module, module, *arguments = command
    assert (python, unbuffered, as_module) == (sys.executable, "-u", "-m"), command
    gone = dict.fromkeys(os.environ.keys() - environment.keys())
    return Process(module, *arguments, folder=Path.cwd(), environment=gone | environment, launched=True)


if __name__ == "__main__":
    SubprocessHandler._popen = fork  # type: ignore[method-assign]
    main()
