"""What the commands share: how one prints, what it may write, and how it ends."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from quark_fast.errors import OtherProcessFailed, OutOfResources, UsageError
from quark_fast.files.atomic import disk_error
from quark_fast.files.safe_text import clean
from quark_fast.runtime.console import Terminal
from quark_fast.runtime.waiting import wait_briefly

T = TypeVar("T")


def exit_status(command: Callable[[], None]) -> int:
    """Run a command; its exit status (``errors.EXIT_STATUS``). An error is one line on standard error."""
    try:
        with _stopped_by_sigterm():
            command()
    except OSError as error:
        if (what := disk_error(error)) is None:
            raise
        print(f"error: {f'{clean(str(error.filename))}: ' if error.filename else ''}{what}", file=sys.stderr)
        return OutOfResources.exit_status
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OtherProcessFailed as error:
        # A launcher ends all processes when the first one ends: give that one time to print its error.
        time.sleep(2)
        return getattr(error.__cause__, "exit_status", UsageError.exit_status)
    except KeyboardInterrupt as stop:  # the trainer's own says how to go on
        print(clean(str(stop)) or "stopped", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM stops a command as Ctrl-C does, if the program that calls has no handler of its own."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or (
        threading.current_thread() is not threading.main_thread()  # no other one may set handlers
    ):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def command(run: Callable[[Sequence[str], Terminal, Terminal], None]) -> Callable[..., int]:
    """A command: ``main(arguments)``, by default those of the command line, returns its exit status.

    Args:
        run: called with the arguments, a console for results, which is standard output, and one for progress
            and notices, which is standard error; with ``--quiet`` that one shows nothing.
    """

    @functools.wraps(run)
    def main(arguments: Sequence[str] | None = None) -> int:
        wait_briefly()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a result must not end in a letter that it cannot spell
                stream.reconfigure(errors="replace")
        given = sys.argv[1:] if arguments is None else arguments
        notices = Terminal(stderr=True)
        notices.quiet = "--quiet" in itertools.takewhile(lambda argument: argument != "--", given)
        return exit_status(lambda: run(given, Terminal(), notices))

    return main


def agreed(work: Callable[[], T], *consoles: Terminal) -> T:
    """``work()``, which reads the command line; of processes that a launcher started, the first one speaks.

    The others' consoles are quiet from then on. Help and bad flags show before torch is imported, unless
    there are other processes to agree with.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        return work()
    from quark_fast.runtime.distributed import Processes

    processes = Processes.join()

    def heard() -> T | SystemExit:
        with contextlib.nullcontext() if processes.main else contextlib.redirect_stdout(io.StringIO()):
            try:
                return work()
            except SystemExit as end:  # help was asked for
                return end

    found = processes.together(heard)
    if isinstance(found, SystemExit):
        raise found
    if not processes.main:
        for console in consoles:
            console.quiet = True
    return found


# What a run folder may hold: none of it is written over.
_RUN_FILES = {
    *("config.yaml", "versions.json", "finished.json", "report.html", "evaluation.json", "evaluation.jsonl"),
    *("metrics.jsonl", "completions.jsonl", "held_out.jsonl", "prompts.jsonl", "run.log"),
}


def check_output(flag: str, path: Path, read: Container[Path] = ()) -> None:
    """Raise UsageError for a file that cannot be written, or that must not be lost: one of a run's own.

    Args:
        flag: and its value, as the error begins.
        read: tables and prompts, resolved, which are read and so not written over either.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{flag}: no such folder")
    # It is written under another name beside, which then takes this one: a device would be replaced.
    ordinary = not path.exists() or (path.is_file() and os.access(path, os.W_OK))
    if not ordinary or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag}: this is no file, or cannot be written; name another file")
    if path.resolve() in read:
        raise UsageError(f"{flag}: this is a table, or prompts, to be read; name another file")
    if (path.parent / "config.yaml").exists() and path.name in _RUN_FILES:
        raise UsageError(f"{flag}: this is the run's own {path.name}; name another file")
