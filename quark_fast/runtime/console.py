"""A console for text from anywhere."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from quark_fast.files.safe_text import clean


class _Outlived:
    """A file to print to, whose terminal or reader may go while the program works on: then nothing shows."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._open():
            return self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._open():
            self._file.flush()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            with contextlib.suppress(OSError):  # of a file that is none of the system's
                self._to_nowhere()

    def _to_nowhere(self) -> None:
        """Have the system take what is printed, or Python's last flush would fail, too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._file.fileno())
        finally:
            os.close(nowhere)


class Terminal(Console):
    """Prints every text as it stands: no markup in it is obeyed, and nothing in it steers the terminal.

    Prompts, completions, labels of classifiers and names of files come from anywhere.
    """

    def __init__(self, **options: Any) -> None:
        # No highlighting: rich's takes time with the square of a word's length.
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        return cast(IO[str], _Outlived(super().file))

    @file.setter
    def file(self, file: IO[str]) -> None:
        Console.file.fset(self, file)  # type: ignore[attr-defined]

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
