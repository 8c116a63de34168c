"""Text from anywhere, cleaned before it reaches a terminal."""

from __future__ import annotations

import re
import unicodedata

_ESCAPE_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, clear screen
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: window title, links
    r"|\x1b[ -/]*[0-~]"
)


def clean(text: str) -> str:
    """The text without terminal escape sequences, control and invisible characters.

    Line ends and tabs stay. What goes could move the cursor, reverse the reading direction or, as
    a lone surrogate, not be written to a file at all.
    """
    visible = _ESCAPE_SEQUENCE.sub("", text)
    return "".join(
        character
        for character in visible
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
    )
