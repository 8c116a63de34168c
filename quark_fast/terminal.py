"""What the commands share: how one prints, shows its progress, and ends."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from quark_fast.errors import OtherProcessFailed, UsageError
from quark_fast.files.safe_text import clean
from quark_fast.runtime.waiting import wait_briefly
from quark_fast.training.progress import Progress as Event

LOG_EVERY_S = 60.0  # a stage that takes minutes is not silent in a log, which has no bar


class Terminal(Console):
    """Prints every text as it stands: no markup in it is obeyed, and nothing in it steers the terminal.

    Prompts, completions, labels of classifiers and names of files come from anywhere.
    """

    def __init__(self, **options: Any) -> None:
        # No highlighting: rich's takes time with the square of a word's length.
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        # A terminal's width says nothing about a log, where a path in two pieces is not found again.
        if not self.is_terminal and all(isinstance(shown, str) for shown in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(clean(text), **options)

    # Whoever brings a Text has cleaned it, as a rule; this is for whoever has not.
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else clean(text), style, control)


class Display:
    """The live display: one bar for the stage, one line of its latest numbers, a line a finished stage.

    In a log file: a line a finished stage, and one a minute on the way there.
    """

    def __init__(self, console: Terminal) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.numbers = Text("")
        self.live = Live(Group(self.bar, self.numbers), console=console, refresh_per_second=4)
        self.stage, self.begun, self.logged = "", 0.0, 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Live while the work goes on; what ends it early has a line of its own."""
        try:
            with self.live:
                yield
        except BaseException:
            if not self.console.is_terminal:  # rich ends its last line on a terminal alone
                self.console.line()
            raise

    def __call__(self, event: Event) -> None:
        if event.note:
            self.console.print(event.note, markup=False)
        if event.stage != self.stage:
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            self.bar.add_task(event.stage, total=event.total)
            self.stage = event.stage
            self.begun = self.logged = time.monotonic()
        self.bar.update(self.bar.task_ids[0], completed=event.done)
        shown = event.shown_numbers
        self.numbers.plain = "  " + shown
        if event.done >= event.total:
            # What a log file keeps of the stage.
            self.console.print(f"{event.stage}: {shown}  ({time.monotonic() - self.begun:.0f} s)")
        elif not self.console.is_terminal and time.monotonic() - self.logged >= LOG_EVERY_S:
            self.logged = time.monotonic()
            self.console.print(f"{event.stage}: {event.done} of {event.total}  {shown}")


def exit_status(command: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 bad input (one line on standard error), 130 stopped by Ctrl-C."""
    try:
        command()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OtherProcessFailed:
        # A launcher ends all processes when the first one ends: give that one time to print its error.
        time.sleep(2)
        return 2
    except KeyboardInterrupt as stop:  # the trainer's own says how to go on
        print(clean(str(stop)) or "stopped", file=sys.stderr)
        return 130
    return 0


def command(run: Callable[[Sequence[str], Terminal], None]) -> Callable[..., int]:
    """A command: ``main(arguments)``, by default those of the command line, returns its exit status."""

    @functools.wraps(run)
    def main(arguments: Sequence[str] | None = None) -> int:
        wait_briefly()
        given = sys.argv[1:] if arguments is None else arguments
        return exit_status(lambda: run(given, Terminal()))

    return main
