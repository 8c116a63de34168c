"""Ctrl-C and SIGTERM while a run trains: it stops where it can go on.

While it samples, scores or evaluates: at once, as the batches so far are on disk. While it learns: after the
step, with a checkpoint. While it exports: not at all, it is about to end. A second signal stops at once.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from quark_fast.errors import Interrupted


class Stop:
    """Whether the user asked to stop.

    Args:
        message: how the run goes on, for the error.
    """

    def __init__(self, message: Callable[[], str]) -> None:
        self.asked = self.at_once = False
        self.message = message

    @contextlib.contextmanager
    def allowed_at_once(self) -> Iterator[None]:
        """Around work that a resumed run repeats anyway: a signal stops it at once."""
        self.at_once = True
        try:
            if self.asked:  # while the checkpoint was written
                raise Interrupted(self.message())
            yield
        finally:
            self.at_once = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals; a second signal stops at once, too."""
        if self.asked or self.at_once:
            raise Interrupted(self.message())
        self.asked = True


@contextlib.contextmanager
def stop_signals(message: Callable[[], str]) -> Iterator[Stop]:
    """Around a run: Ctrl-C and SIGTERM ask it to stop where it can go on."""
    stop = Stop(message)
    try:
        before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may set handlers; in another one the program has its own
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
