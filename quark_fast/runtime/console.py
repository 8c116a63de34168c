"""A console for text from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

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
