"""Who hears of a run while it works."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from quark_fast.errors import UsageError
from quark_fast.runtime.console import Terminal
from quark_fast.training.display import Display
from quark_fast.training.progress import Progress, StageClock
from quark_fast.training.run_log import RunLog

Listener = Callable[[Progress], None]
Listen = Listener | Sequence[Listener] | Literal["auto"] | None


def several(name: str, given: Any) -> list[Any]:
    """One function, or several, as a list.

    Raises:
        UsageError: it is something else.
    """
    apart = isinstance(given, Sequence) and not isinstance(given, str)
    made = list(given) if apart else [] if given is None else [given]
    # A class, such as a TrainerCallback, can be called, but would only be made.
    if strange := [one for one in made if not callable(one) or isinstance(one, type)]:
        raise UsageError(f"{name}: {strange[0]!r:.80} is no function; give one, or a list of them")
    return made


def tell(what: str, function: Callable[[Any], Any], given: Any) -> None:
    """Call a function of the program's, whose files are not the run folder's.

    Raises:
        UsageError: it raised an OSError; ``what`` says what the function is.
    """
    try:
        function(given)
    except OSError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise UsageError(f"the {what} {name} raised {type(error).__name__}: {error}") from error


class Listeners:
    """Several listeners as one: the run's log, and those that the program gave.

    Args:
        listen: "auto": a display, where somebody looks at it; None: none; one listener, or several.
        log: of rank 0, None on the others, which show nothing by themselves either.
        mask: hide the worst words in the display.
    """

    def __init__(self, listen: Listen, log: RunLog | None, mask: bool) -> None:
        self.log, self.display, console = log, None, Terminal(stderr=True)
        self.clock, self.start_seconds = StageClock(), 0.0
        if listen == "auto" and log is not None and Display.usual_on(console):
            self.display = Display(console, mask)
        self.each: list[Listener] = [one for one in (log, self.display) if one is not None]
        if listen != "auto":
            self.each += several("listen", () if listen is None else listen)

    def ready(self, since: float) -> float:
        """The start is over that began at ``since``; its seconds.

        They are reported when the work begins, which may be long after: in another cell of a notebook, say.
        """
        self.start_seconds = time.monotonic() - since
        return self.start_seconds

    @contextlib.contextmanager
    def hearing(self, about: Iterable[str]) -> Iterator[None]:
        """Around the run; ``about`` is what it is made of."""
        with contextlib.ExitStack() as stack:
            if self.log is not None:
                stack.enter_context(self.log.kept(about))
            if self.display is not None:
                stack.enter_context(self.display.shown())
            # Else the first stage would seem to have taken the time of loading and trying out, too.
            self(Progress("start and check", 1, 1, seconds=self.start_seconds))
            yield

    def __call__(self, event: Progress) -> None:
        # Measured once, so that the log and the terminal have the same.
        seconds = self.clock.seconds(event)
        if event.finished:
            event = dataclasses.replace(event, seconds=seconds)
        for one in self.each:
            if one is self.log:
                one(event)
            else:
                tell("listener", one, event)
