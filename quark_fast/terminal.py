"""What the commands share: how one prints, and how one ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from quark_fast.errors import OtherProcessFailed, UsageError
from quark_fast.files.safe_text import clean


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


def exit_status(command: Callable[[], None]) -> int:
    """Run a command: 0 done, 2 bad input (one line on standard error), 130 stopped by Ctrl-C."""
    try:
        command()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OtherProcessFailed:
        # A launcher ends all processes when the first does: that is to be the one that tells why.
        time.sleep(2)
        return 2
    except KeyboardInterrupt as stop:  # the trainer's own says how to go on
        print(clean(str(stop)) or "stopped", file=sys.stderr)
        return 130
    return 0
