"""Processes of their own without the five seconds of imports: forked off this one, which has them done.

CUDA does not outlive a fork: on a machine with a GPU these are new interpreters.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

START_METHOD = "spawn" if torch.cuda.is_available() else "fork"  # of torch.multiprocessing


class Process:
    """``python -m module arguments``, begun in a folder; what it prints is kept.

    Args:
        environment: what differs from this one's; a name with None is not set.
        launched: as launchers start theirs, in a session of its own, printing where this process does.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str | None] | None = None,
        launched: bool = False,
    ) -> None:
        self._out, self._err = os.memfd_create("out"), os.memfd_create("err")
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                if launched:
                    os.setsid()
                else:
                    os.dup2(self._out, 1)
                    os.dup2(self._err, 2)
                os.chdir(folder)
                for name, value in (environment or {}).items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
                status = _run(module, list(arguments))
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, -n where signal n ended it; None while it runs."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if ended else None
        return self._status

    def wait(self, timeout: float = 200) -> int:
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"not ended after {timeout:g} s: {self.errors}")
            time.sleep(0.01)
        return status

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        return _text(self._out)

    @property
    def errors(self) -> str:
        return _text(self._err)


def _text(file: int) -> str:
    """What a process has written so far; it shares the place in the file, which must stay."""
    return os.pread(file, os.fstat(file).st_size, 0).decode()


def _run(module: str, arguments: list[str]) -> int:
    """In the new process: all as a new interpreter has it, but for what is imported."""
    if START_METHOD == "spawn":
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # pytest makes errors of them
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.path.insert(0, os.getcwd())
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
