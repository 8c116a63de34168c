"""``python -m quark_fast.train``: settings in, a run folder and a table out."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from quark_fast.arguments import parse
from quark_fast.config import Config
from quark_fast.terminal import Terminal, exit_status

LOG_EVERY_S = 60.0  # a stage that takes minutes is not silent in a log, which has no bar


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

    def __call__(self, event: object) -> None:
        from quark_fast.training.progress import Progress as Event

        assert isinstance(event, Event)
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


def run(arguments: Sequence[str]) -> None:
    """Train, then show the table and three before/after texts; of several processes the first shows."""

    def parsed() -> Config:
        return parse(arguments, "python -m quark_fast.train")

    # Help and bad flags show before torch is imported, unless there are others to agree with.
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    config = None if several else parsed()
    from quark_fast.runtime.distributed import Processes

    processes = Processes.join()
    if config is None:
        config = processes.everywhere(parsed)[processes.index]
    console = Terminal(quiet=not processes.main)
    from quark_fast.report.columns import scores_are_rewards
    from quark_fast.report.files import read_run
    from quark_fast.report.results import after_names, headline
    from quark_fast.report.tables import before_after, results_table
    from quark_fast.runtime.machine import quiet_libraries
    from quark_fast.runtime.memory import keep_freed_memory
    from quark_fast.training.trainer import Trainer

    quiet_libraries()
    keep_freed_memory()
    display = Display(console)
    trainer = Trainer(config, listen=display)
    console.print("; ".join(trainer.checked.lines))
    if trainer.about_prompts:
        console.print("; ".join(trainer.about_prompts))
    console.print(
        f"{len(trainer.train_rows)} training and"
        f" {len(trainer.held_out.rows)} held-out prompts, none longer than {trainer.longest_prompt:,} tokens,"
        f" reward {trainer.reward.name},"
        f" {trainer.config.precision} on {trainer.device}, run folder {trainer.folder.path}"
    )
    with display.shown():
        folder = trainer.train()
    if not processes.main:
        return
    finished = read_run(folder)
    console.print(headline(finished.evaluation))
    console.print(results_table(finished.evaluation))
    texts = before_after(
        finished.evaluation_rows,
        mask=not config.show_offensive,
        after=after_names(finished.evaluation),
        lowest=scores_are_rewards(finished.evaluation),
    )
    console.print(texts)
    console.print(f"report:   {folder / 'report.html'}")
    console.print(f'generate: python -m quark_fast.generate {folder} "The man said"')


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input (one line on standard error), 130 stopped and resumable."""
    logging.basicConfig(level=logging.WARNING)
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
