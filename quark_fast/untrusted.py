"""Text and files that nobody vetted: what may reach a terminal, and how much of a file is read."""

from __future__ import annotations

import gzip
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST_FILE = 1 << 30  # bytes of text, unpacked
DEEPEST = 100  # lists and objects in one another; Python's own limit shows only somewhere behind, as a crash

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


class TooLarge(ValueError):
    """A file holds more than was to be read of it."""


def read_bytes(path: Path, limit: int = LARGEST_FILE) -> bytes:
    """The file's content, unpacked if its name ends in .gz.

    Raises:
        TooLarge: it is longer than ``limit``; no more than that was unpacked.
        OSError, EOFError, zlib.error: it cannot be read, or is no whole gzip file.
    """
    parts: list[bytes] = []
    size = 0
    with path.open("rb") as stored:
        file: Any = gzip.GzipFile(fileobj=stored) if path.suffix.lower() == ".gz" else stored
        while part := file.read(1 << 20):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise TooLarge(f"it holds more than {limit:,} bytes")
    return b"".join(parts)


def too_deep(value: Any, deepest: int = DEEPEST) -> bool:
    """Whether lists and objects stand in one another more than ``deepest`` times."""
    level = _containers([value])
    for _ in range(deepest):
        level = [inner for outer in level for inner in _containers(outer)]
    return bool(level)


def _containers(values: Any) -> list[Any]:
    inside = values.values() if isinstance(values, Mapping) else values
    return [value for value in inside if isinstance(value, Mapping | list | tuple)]
