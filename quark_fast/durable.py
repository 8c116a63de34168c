"""Files that are whole or not there at all, even if the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Have the file's or folder's content on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write the file under, which takes its own name when the block ends without error."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        flush(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    flush(path.parent)  # makes the new name last
