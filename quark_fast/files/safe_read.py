"""Reading files from anywhere: no more of them than a limit."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST_FILE = 1 << 30  # bytes of text, unpacked
DEEPEST = 100  # lists and objects in one another; Python's own limit shows only somewhere after, as a crash


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
