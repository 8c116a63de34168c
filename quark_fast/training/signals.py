"""Ctrl-C and SIGTERM: a run stops where it can go on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from quark_fast.errors import Interrupted
from quark_fast.runtime.run_folder import (
    RunFolder,
)


class Stop:
    """Whether the user asked to stop."""

    def __init__(self, folder: RunFolder) -> None:
        self.asked = self.safe = False
        self.folder = folder

    @property
    def message(self) -> str:
        known = self.folder.has_checkpoint
        how = "go on from the last checkpoint" if known else "what was sampled is kept: go on"
        return f"stopped; {how} with --resume --output {self.folder.path}"

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that a resumed run repeats anyway: a signal need not wait for it."""
        self.safe = True
        try:
            if self.asked:  # while the checkpoint was written
                raise Interrupted(self.message)
            yield
        finally:
            self.safe = False


@contextlib.contextmanager
def stop_signals(folder: RunFolder) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop at the next safe place; a second Ctrl-C stops at once."""
    stop = Stop(folder)

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked or stop.safe:
            raise Interrupted(stop.message)
        stop.asked = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, ask) for number in numbers}
    except ValueError:  # not the main thread: signals are somebody else's
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
