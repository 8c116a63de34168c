"""``python -m quark_fast.train``: settings in, a run folder and a table out."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from quark_fast.arguments import parse
from quark_fast.config import Config
from quark_fast.errors import NotUploaded
from quark_fast.runtime.console import Terminal
from quark_fast.terminal import agreed, command


@command
def main(arguments: Sequence[str], console: Terminal, notices: Terminal) -> None:
    """Train, then show the table and three before/after texts; of several processes the first shows."""
    logging.basicConfig(level=logging.WARNING)

    config = agreed(lambda: parse(arguments, "python -m quark_fast.train"), console, notices)
    from quark_fast.runtime.machine import quiet_libraries
    from quark_fast.runtime.memory import keep_freed_memory
    from quark_fast.training.display import Display
    from quark_fast.training.trainer import Trainer

    quiet_libraries()
    keep_freed_memory()
    display = Display(notices, mask=not config.show_offensive)
    trainer = Trainer(config, listen=display)
    for line in trainer.about:
        notices.print(line)
    not_uploaded = None
    with display.shown():
        try:
            trainer.train()
        except NotUploaded as error:  # the run is finished: first its results
            not_uploaded = error
    if console.quiet:
        return
    _show(trainer.folder.path, config, console, notices)
    if not_uploaded is not None:
        raise not_uploaded


def _show(folder: Path, config: Config, console: Terminal, notices: Terminal) -> None:
    """What came of a finished run, and where it is."""
    from quark_fast.report.columns import duration, scores_are_rewards
    from quark_fast.report.files import read_run
    from quark_fast.report.results import after_names, headline, kept_round
    from quark_fast.report.tables import before_after, results_table

    finished, typed = read_run(folder), shlex.quote(str(folder))
    if kept := kept_round(finished.kept):
        console.print(kept)
    if finished.evaluation:
        console.print(headline(finished.evaluation))
        console.print(results_table(finished.evaluation))
        texts = before_after(
            finished.evaluation_rows,
            mask=not config.show_offensive,
            after=after_names(finished.evaluation),
            lowest=scores_are_rewards(finished.evaluation),
        )
        console.print(texts)
    else:
        notices.print(f"not evaluated (--no-eval): python -m quark_fast.evaluate {typed} does so")
    record = finished.versions
    notices.print(f"took {duration(record['minutes'])} and {record['memory_gb']} GB of memory at most")
    notices.print(f"report:   {folder / 'report.html'}")
    notices.print(f'generate: python -m quark_fast.generate {typed} "The man said"')


if __name__ == "__main__":
    sys.exit(main())
