"""Batches on disk as they are made: a run that is killed goes on after the last one and makes none twice.

A checkpoint is made between stages. What a stage makes until the next one (samples with their rewards, rows
of the evaluation) is appended here, batch by batch, and goes when a checkpoint or a result holds it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from quark_fast.errors import UsageError
from quark_fast.files.atomic import flush, replacing

T = TypeVar("T")
SPENT = "spent.json"


class Kept(Generic[T]):
    """The batches of one stage by number. Without a file, as made here, nothing is kept.

    Args:
        file: this process's own lines.
        known: what any process kept before.
        encode: of a batch, to JSON.
        kept: called after each batch.
    """

    def __init__(
        self,
        file: Path | None = None,
        known: Mapping[int, T] | None = None,
        encode: Callable[[T], Any] = lambda value: value,
        kept: Callable[[], None] = lambda: None,
    ) -> None:
        self._file, self._known, self._encode, self._kept = file, known or {}, encode, kept

    def __contains__(self, number: object) -> bool:
        return number in self._known

    def __getitem__(self, number: int) -> T:
        return self._known[number]

    def keep(self, number: int, batch: T) -> None:
        """Append the batch and have it on disk; another stage's file is not touched."""
        if self._file is None:
            return
        line = json.dumps([number, self._encode(batch)]) + "\n"
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._kept()


class Journal:
    """The stages of a run that are under way, in a folder of one file for each stage and process.

    Args:
        folder: made with the first stage.
        process: number of this process.
        here: whether this process sees the folder; else it keeps nothing.
    Attributes:
        spent: what the run has spent by now, by name; None: it is not noted.
    """

    def __init__(self, folder: Path, process: int = 0, here: bool = True) -> None:
        self.folder, self.process, self.here = folder, process, here
        self.spent: Callable[[], dict[str, float]] | None = None

    @property
    def identity(self) -> dict[str, Any] | None:
        """What ``begin`` was given; None: it was not yet."""
        path = self.folder / "about.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def begin(self, identity: dict[str, Any]) -> None:
        """Note what everything that will be kept was made with."""
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / "about.json") as scratch:
            scratch.write_text(json.dumps(identity), encoding="utf-8")

    @property
    def spent_before(self) -> dict[str, float]:
        """What ``spent`` last noted, in this process or one before it."""
        path = self.folder / SPENT
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {str(name): float(value) for name, value in found.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{path} is damaged ({error}); delete it, and the run's minutes and memory begin anew"
            ) from error

    def note_spent(self) -> None:
        """With every batch: the work is not done again, so its time and memory are part of the run."""
        if self.spent is not None and self.process == 0:
            with replacing(self.folder / SPENT) as scratch:
                scratch.write_text(json.dumps(self.spent()), encoding="utf-8")

    def stage(
        self,
        name: str,
        settings: Any = None,
        encode: Callable[[T], Any] = lambda value: value,
        decode: Callable[[Any], T] = lambda value: value,
    ) -> Kept[T]:
        """What was kept of a stage, and where more of it goes.

        Args:
            settings: what the batches follow from, where that may change at a resume: other settings are
                another stage. JSON, but for columns of the prompts, which may be anything.
            encode, decode: of a batch, to JSON and back.
        Raises:
            UsageError: a file holds something else.
        """
        if not self.here:
            return Kept()
        self.folder.mkdir(exist_ok=True)
        mark = hashlib.sha256(json.dumps(settings, default=spelled).encode()).hexdigest()[:16]
        known: dict[int, T] = {}
        for path in sorted(self.folder.glob(f"{name}.{mark}.*.jsonl")):
            known |= _whole_lines(path, decode)
        own = self.folder / f"{name}.{mark}.{self.process}.jsonl"
        _cut_half_line(own)
        return Kept(own, known, encode, self.note_spent)

    def forget(self, *names: str) -> None:
        """These stages are over."""
        for path in (path for name in names for path in self.folder.glob(f"{name}.*.jsonl")):
            path.unlink(missing_ok=True)


def spelled(value: Any) -> Any:
    """What JSON has no word for, as every process spells it.

    In each a set of texts has another order, and an object without a text of its own another address.
    """
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return re.sub(" at 0x[0-9a-fA-F]+", "", str(value))


def _whole_lines(path: Path, decode: Callable[[Any], T]) -> dict[int, T]:
    """A process may have been killed in the middle of its last line."""
    found: dict[int, T] = {}
    try:
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            number, batch = json.loads(line)
            found[operator.index(number)] = decode(batch)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UsageError(
            f"{path} is damaged ({reason}); delete it, and its batches are made again"
        ) from error
    return found


def _cut_half_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
            flush(path)
