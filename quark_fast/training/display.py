"""A run's progress as a person sees it: on a terminal, in a notebook, or as the lines of a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from quark_fast.files.safe_text import clean
from quark_fast.report.columns import one_line
from quark_fast.report.texts import mask_profanity
from quark_fast.runtime.console import Terminal
from quark_fast.training.progress import Progress as Event
from quark_fast.training.progress import StageClock, Texts

LOG_EVERY_S = 60.0  # a stage that takes minutes is not silent in a log, which has no bar
TEXTS_EVERY_S = 4.0  # long enough to read a pair


class Display:
    """The live display: one bar for the stage, one line of its latest numbers, a line a finished stage.

    Below them stand texts before and after, a new pair every few seconds while the run samples. In a log
    file: no texts, a line a finished stage, and one a minute on the way there.

    Args:
        mask: hide the worst words of the texts.
    """

    def __init__(self, console: Terminal, mask: bool = True) -> None:
        self.console, self.show = console, mask_profanity if mask else clean
        self.bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.numbers, self.texts = Text(""), Text("", no_wrap=True, overflow="ellipsis")
        self.live = Live(Group(self.bar, self.numbers, self.texts), console=console, refresh_per_second=4)
        self.stage, self.logged, self.changed = "", 0.0, -TEXTS_EVERY_S
        self.clock = StageClock()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Live while the work goes on; a log has no bar."""
        with self.live if self.usual_on(self.console) else contextlib.nullcontext():
            yield

    def __call__(self, event: Event) -> None:
        seconds = self.clock.seconds(event)
        if event.note and not event.finished:
            self.console.print(event.note, markup=False)
        if event.stage != self.stage:
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            self.bar.add_task(event.stage, total=event.total)
            self.stage = event.stage
            self.logged = time.monotonic()
        self.bar.update(self.bar.task_ids[0], completed=event.done)
        shown = event.shown_numbers
        self.numbers.plain = "  " + shown
        if event.texts and time.monotonic() - self.changed >= TEXTS_EVERY_S:
            self.changed = time.monotonic()
            self.texts.plain = self._lines(event.texts)
        if event.finished:
            # What a log file keeps of the stage; "1 of 1" would say no more than that it is over.
            what = shown or (f"{event.done} of {event.total}" if event.total > 1 else "")
            self.console.print(f"{event.stage}{what and f': {what}'}  ({seconds:.0f} s)")
            if event.note:
                self.console.print(event.note, markup=False)
        elif not self.console.is_terminal and time.monotonic() - self.logged >= LOG_EVERY_S:
            self.logged = time.monotonic()
            self.console.print(f"{event.stage}: {event.done} of {event.total}  {shown}")

    def _lines(self, texts: Texts) -> str:
        """A prompt and its texts, a line each, which the terminal cuts at its edge."""
        parts = [("", f"{texts.prompt} …"), ("base model  ", texts.before), ("now         ", texts.after)]
        return "\n".join(f"  {name}{one_line(self.show(text))}" for name, text in parts if text)

    @staticmethod
    def usual_on(console: Terminal) -> bool:
        """Whether somebody looks at it: a terminal, or a notebook."""
        return console.is_terminal or console.is_jupyter
