"""Ctrl-C and SIGTERM while a run trains: it stops where it can go on.

While it samples, scores or evaluates: at once, as the batches so far are on disk. While it learns: after the
step, with a checkpoint. While it exports: not at all, it is about to end. A second signal stops at once.
"""

from __future__ import annotations

import contextlib
import os
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
        self.message, self.process = message, os.getpid()

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
        if os.getpid() != self.process:  # a child, forked by a reward or a callback: it ends as it would
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # Noted in any case: a reward's bare except may swallow the error.
        at_once, self.asked = self.asked or self.at_once, True
        if at_once:
            raise Interrupted(self.message())


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
            # None: it was set by a program in C around Python, which cannot have it back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
