"""``run.log``: what a run showed, with times, for whoever looks at it later."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from quark_fast.errors import UsageError
from quark_fast.files.safe_text import clean
from quark_fast.training.progress import Progress


class RunLog(logging.Handler):
    """Notes, finished stages, warnings of this package and how the run ended: a line each, local time first.

    A stage's line ends with the seconds that it took. Where the run ended by an error of other code, such as
    a reward, the traceback of that follows, indented. A resumed run appends to it. Each line is in the file
    when the call returns, so a kill loses none.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.path = path

    @contextlib.contextmanager
    def kept(self, about: Iterable[str]) -> Iterator[None]:
        """Around the run: ``about`` is what it is made of; warnings go to the file, too, and its end."""
        package = logging.getLogger("quark_fast")
        package.addHandler(self)
        try:
            for line in about:
                self.write(line)
            yield
            self.write("finished")
        except BaseException as error:
            with contextlib.suppress(OSError):  # of a full disk, which the run itself has reported
                self.write(f"ended: {str(error) or type(error).__name__}")
                self._write_traceback(error)
            raise
        finally:
            package.removeHandler(self)

    def _write_traceback(self, error: BaseException) -> None:
        """Of an error that is no ``UsageError``, or of the one that a ``UsageError`` tells in one line."""
        foreign = error.__cause__ if isinstance(error, UsageError) else error
        if isinstance(foreign, Exception):
            lines = "".join(traceback.format_exception(foreign)).splitlines()
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"    {clean(line)}\n" for line in lines)

    def write(self, text: str) -> None:
        line = f"{datetime.now().isoformat(' ', 'seconds')} {' '.join(clean(text).split())}\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def emit(self, record: logging.LogRecord) -> None:
        self.write(f"{record.levelname.lower()}: {record.getMessage()}")
        # Python shows a warning that no handler took; this handler must not be the reason that it does not.
        logger: logging.Logger | None = logging.getLogger(record.name)
        others = 0
        while logger is not None:
            others += sum(handler is not self for handler in logger.handlers)
            logger = logger.parent if logger.propagate else None
        if not others and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def __call__(self, event: Progress) -> None:
        if event.finished:
            took = "" if event.seconds is None else f" ({event.seconds:.0f} s)"
            self.write(f"{event.stage}: {event.shown_numbers or 'done'}{took}")
        if event.note:
            self.write(event.note)
