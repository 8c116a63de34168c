"""The pool's samples beside their rewards: prompts, completions and rounds, in RAM or in a folder.

Samples are kept in segments that are never written again once they are made, so that readers in other threads
need no lock. In a folder a segment is one safetensors file, written whole or not at all and read through a
memory map: samples then cost the disk, not RAM.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quark_fast.files import atomic
from quark_fast.pool.tokens import Ints, TokenRows, Tokens

Arrays = dict[str, npt.NDArray[Any]]

_METADATA = "quark_fast.samples"
_FILE = re.compile(r"samples-\d{12}-[0-9a-f]{8}\.safetensors")
SMALL = 1 << 16  # rows: segments in RAM are joined up to here
FLUSH_BYTES = 1 << 24  # of segments in RAM, with a folder: beyond, they are written


@dataclass(frozen=True)
class Segment:
    """Samples that arrived one after another: ids first..first + n - 1."""

    first: int
    prompts: TokenRows
    completions: TokenRows
    name: str | None = None  # of its file; None: in RAM

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(
                f"columns of one pool differ in length: {len(self.prompts)} prompts, "
                f"{len(self.completions)} completions"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @staticmethod
    def joined(parts: Sequence[Segment]) -> Segment:
        return Segment(
            parts[0].first if parts else 0,
            TokenRows.joined([part.prompts for part in parts]),
            TokenRows.joined([part.completions for part in parts]),
        )

    def arrays(self) -> Arrays:
        return {
            "prompt_tokens": self.prompts.tokens,
            "prompt_ends": self.prompts.ends,
            "completion_tokens": self.completions.tokens,
            "completion_ends": self.completions.ends,
        }

    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


class SampleStore:
    """Samples by id.

    Args:
        folder: where segments are written once FLUSH_BYTES of them have come together (or flush() is called);
            None: all stay in RAM. A folder belongs to one pool: ranks take one each.

    Writers take turns (the pool sees to it); readers beside them see the segments of before or after.
    """

    def __init__(self, folder: Path | None) -> None:
        # As it is now: a later os.chdir() would have samples looked for, and written, elsewhere.
        self.folder = None if folder is None else folder.absolute()
        self.segments: tuple[Segment, ...] = ()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, segment: Segment) -> None:
        """Take in samples whose ids follow all others, or (OSError: the disk is full) none of them."""
        if not len(segment):
            return
        # Small segments are merged so that sizes double: a sample is copied log2(SMALL) times at most.
        kept, joining, size = list(self.segments), [segment], len(segment)
        while kept and kept[-1].name is None and size < SMALL and len(kept[-1]) < min(2 * size, SMALL):
            joining.append(kept.pop())
            size += len(joining[-1])
        segments = (*kept, Segment.joined(joining[::-1]) if len(joining) > 1 else segment)
        if self.folder is not None and _bytes(s for s in segments if s.name is None) > FLUSH_BYTES:
            segments = self._written(segments)
        self.segments = segments

    def flush(self) -> list[str]:
        """Have all samples on disk; returns the names of their files."""
        self.segments = self._written(self.segments)
        return [str(segment.name) for segment in self.segments]

    def _written(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        assert self.folder is not None
        ram = [segment for segment in segments if segment.name is None]
        if not ram:
            return segments
        written = _write(self.folder, Segment.joined(ram))
        return (*segments[: len(segments) - len(ram)], written)  # those in RAM are the newest

    def open(self, names: Sequence[str], samples: int) -> None:
        """Take so many samples from files. ValueError if one is missing, damaged, or does not hold them.

        Each file is read once from end to end, for its checksum.
        """
        assert self.folder is not None
        for name in names:
            _check(self.folder, name)
        segments = tuple(_read(self.folder, name) for name in names)
        firsts = np.cumsum([0, *(len(segment) for segment in segments)]).tolist()
        if [*(segment.first for segment in segments), samples] != firsts:
            raise ValueError(f"the files in {self.folder} do not hold the samples of this state")
        self.segments = segments

    def look_up(self, ids: Ints) -> tuple[list[Tokens], list[Tokens]]:
        """(prompts, completions) of these samples, as copies."""
        prompts, completions = ([np.empty(0, np.int32)] * len(ids) for _ in range(2))
        segments = self.segments
        firsts = np.array([segment.first for segment in segments], np.int64)
        segment_of = np.searchsorted(firsts, ids, side="right") - 1
        for at in np.unique(segment_of).tolist():
            wanted, segment = np.flatnonzero(segment_of == at), segments[at]
            rows = ids[wanted] - segment.first
            for out, column in ((prompts, segment.prompts), (completions, segment.completions)):
                for i, row in zip(wanted.tolist(), column.copies(rows), strict=True):
                    out[i] = row
        return prompts, completions


def _bytes(segments: Iterable[Segment]) -> int:
    return sum(segment.nbytes() for segment in segments)


class Rounds:
    """The round of every sample, as the ids where it changes and the rounds from there on."""

    def __init__(self, starts: Sequence[int] | Ints = (), rounds: Sequence[int] | Ints = ()) -> None:
        # Replaced, never written to: readers in other threads need no lock.
        self.changes = np.array(starts, np.int64), np.array(rounds, np.int64)

    def of(self, ids: Ints) -> Ints:
        starts, rounds = self.changes
        return rounds[np.searchsorted(starts, ids, side="right") - 1]

    def append(self, first_id: int, round: int) -> None:
        """All samples from there on are of this round."""
        starts, rounds = self.changes
        if not len(rounds) or rounds[-1] != round:
            self.changes = np.append(starts, first_id), np.append(rounds, round)


# --- files -----------------------------------------------------------------------------------


def checksum(text: str, arrays: Arrays) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return f"{crc:08x}"


def _write(folder: Path, segment: Segment) -> Segment:
    """The segment as it is read back from its new file, whose name tells its content apart."""
    arrays = segment.arrays()
    about = json.dumps({"first": segment.first, "rows": len(segment)})
    name = f"samples-{segment.first:012d}-{checksum(about, arrays)}.safetensors"
    with atomic.replacing(folder / name) as scratch:
        save_file(arrays, scratch, {_METADATA: about, "name": name})
    return _read(folder, name)


def _mapped(folder: Path, name: str) -> tuple[str, Arrays]:
    """What the file says of itself, and a memory map of its arrays."""
    path = folder / name
    if not _FILE.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file of samples")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("name") != name:
                raise ValueError(f"{path} is a safetensors file, but not these samples of a RolloutPool")
            arrays = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the saved pool has samples in it") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a file of samples: {error}") from error
    return metadata.get(_METADATA, ""), arrays


def _check(folder: Path, name: str) -> None:
    """ValueError if the file's content is not that of the checksum in its name.

    By a map of its own: the pages that are read here are no part of the process's memory afterwards.
    """
    text, arrays = _mapped(folder, name)
    if not name.endswith(f"-{checksum(text, arrays)}.safetensors"):
        raise ValueError(f"{folder / name} is damaged: its checksum does not fit its content")


def _read(folder: Path, name: str) -> Segment:
    """A memory map of the file: its header is checked against its size and its name, nothing else is read."""
    path = folder / name
    text, arrays = _mapped(folder, name)
    try:
        about = json.loads(text)
        segment = Segment(
            int(about["first"]),
            TokenRows(arrays["prompt_tokens"], arrays["prompt_ends"]),
            TokenRows(arrays["completion_tokens"], arrays["completion_ends"]),
            name,
        )
        if len(segment) != about["rows"]:
            raise ValueError(f"{len(segment)} samples instead of {about['rows']}")
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return segment
