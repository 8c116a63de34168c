"""The pool's samples beside their rewards: prompts and completions as token ids, in RAM or in a folder.

Samples are kept in segments that are never written again once they are made, so that readers in other threads
need no lock. In a folder a segment is one safetensors file, written whole or not at all and read through a
memory map: samples then cost the disk, not RAM.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quark_fast.files import atomic

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Arrays = dict[str, npt.NDArray[Any]]

_METADATA = "quark_fast.samples"
_FILE = re.compile(r"samples-\d{12}-[0-9a-f]{8}\.safetensors")
_UNFINISHED = re.compile(r"\.samples-.*\.tmp")
SMALL = 1 << 16  # rows: segments in RAM are joined up to here
FLUSH_BYTES = 1 << 24  # of segments in RAM, with a folder: beyond, they are written


@dataclass(frozen=True)
class TokenRows:
    """(n,) rows of token ids end to end: row i is tokens[ends[i - 1]:ends[i]]."""

    tokens: Tokens
    ends: Ints

    @classmethod
    def of_lengths(cls, tokens: Tokens, lengths: Ints) -> TokenRows:
        """ValueError if the lengths do not add up to the tokens."""
        ends = np.cumsum(lengths, dtype=np.int64)
        if (np.asarray(lengths) < 0).any() or (ends[-1] if len(ends) else 0) != len(tokens):
            raise ValueError("the lengths of these rows do not add up to their tokens")
        return cls(tokens, ends)

    @classmethod
    def joined(cls, parts: Sequence[TokenRows]) -> TokenRows:
        starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
        ends = [start + part.ends for start, part in zip(starts, parts, strict=False)]
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)]),
            np.concatenate([np.empty(0, np.int64), *ends]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.ends, prepend=0)

    def spans(self, rows: Ints) -> tuple[Ints, Ints]:
        """(starts, ends) of these rows."""
        starts = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0)
        return starts, self.ends[rows]

    def copies(self, rows: Ints) -> list[Tokens]:
        starts, ends = self.spans(rows)
        tokens = self.tokens
        return [tokens[i:j].copy() for i, j in zip(starts.tolist(), ends.tolist(), strict=True)]

    def select(self, rows: Ints) -> TokenRows:
        starts, ends = self.spans(rows)
        lengths = ends - starts
        new_ends = np.cumsum(lengths, dtype=np.int64)
        where = np.repeat(starts - (new_ends - lengths), lengths) + np.arange(lengths.sum())
        return TokenRows(self.tokens[where], new_ends)


class Segment:
    """Samples that arrived one after another: ids first..first + n - 1, or ascending `ids` if some are gone.

    Nothing of it changes but `dead`, which writers keep: how many of its samples are no longer in the pool.
    """

    def __init__(
        self,
        first: int,
        prompts: TokenRows,
        completions: TokenRows,
        groups: Ints | None = None,
        ids: Ints | None = None,
        name: str | None = None,
    ) -> None:
        sizes = {len(column) for column in (prompts, completions, groups, ids) if column is not None}
        if len(sizes) > 1:
            raise ValueError(f"columns of one pool differ in length: {sorted(sizes)}")
        if ids is not None and ids[-1] - ids[0] == len(ids) - 1:
            ids = None
        self.first, self.prompts, self.completions = first, prompts, completions
        self.groups, self._ids = groups, ids
        self.name = name  # of its file; None: in RAM
        self.dead = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def ids(self) -> Ints:
        return np.arange(self.first, self.first + len(self)) if self._ids is None else self._ids

    @property
    def end(self) -> int:
        """Behind its last id."""
        return self.first + len(self) if self._ids is None else int(self._ids[-1]) + 1

    def rows_of(self, ids: Ints) -> Ints:
        return ids - self.first if self._ids is None else np.searchsorted(self._ids, ids)

    def count(self, ids: Ints) -> int:
        """How many of these ids between its first and its last are its own."""
        return len(ids) if self._ids is None else int(np.isin(ids, self._ids).sum())

    def select(self, ids: Ints) -> Segment:
        """These of its samples, in RAM; itself if these are all."""
        if len(ids) == len(self):
            return self
        rows = self.rows_of(ids)
        groups = None if self.groups is None else self.groups[rows]
        return Segment(
            int(ids[0]), self.prompts.select(rows), self.completions.select(rows), groups, np.array(ids)
        )

    def starting_at(self, first: int) -> Segment:
        """The same samples under ids that count up from there."""
        return Segment(first, self.prompts, self.completions, self.groups)

    @staticmethod
    def joined(parts: Sequence[Segment]) -> Segment:
        ids = np.concatenate([part.ids for part in parts])
        groups = [part.groups for part in parts if part.groups is not None]
        whole = Segment(
            int(ids[0]),
            TokenRows.joined([part.prompts for part in parts]),
            TokenRows.joined([part.completions for part in parts]),
            np.concatenate(groups) if groups else None,
            ids,
        )
        whole.dead = sum(part.dead for part in parts)
        return whole

    def arrays(self) -> Arrays:
        every: dict[str, npt.NDArray[Any] | None] = {
            "prompt_tokens": self.prompts.tokens,
            "prompt_ends": self.prompts.ends,
            "completion_tokens": self.completions.tokens,
            "completion_ends": self.completions.ends,
            "groups": self.groups,
            "ids": self._ids,
        }
        return {name: array for name, array in every.items() if array is not None}

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
        self.folder = folder
        self.segments: tuple[Segment, ...] = ()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def append(self, segment: Segment) -> None:
        """Take in samples whose ids are above all others, or (OSError: the disk is full) none of them."""
        if not len(segment):
            return
        # The logarithmic method: every sample is copied a few times in its life, however small the calls are.
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

    def open(self, names: Sequence[str], ids: Ints) -> None:
        """Take the samples with these ascending ids from files.

        ValueError if one is missing, damaged, or they do not hold these samples.
        """
        assert self.folder is not None
        segments, found = [], 0
        for name in names:
            segment = _read(self.folder, name)
            own = ids[np.searchsorted(ids, segment.first) : np.searchsorted(ids, segment.end)]
            segment.dead = len(segment) - len(own)
            found += segment.count(own)
            if len(own):
                segments.append(segment)
        ordered = all(a.end <= b.first for a, b in itertools.pairwise(segments))
        if found != len(ids) or not ordered:
            raise ValueError(f"the files in {self.folder} do not hold the samples of this state")
        self.segments = tuple(segments)

    def forget(self, ids: Ints, alive: Callable[[Ints], npt.NDArray[np.bool_]]) -> None:
        """Free the samples with these ids, where it is worth it; `alive` tells which of others remain."""
        segments = self.segments
        at, counts = np.unique(_places(segments, ids), return_counts=True)
        kept: list[Segment | None] = list(segments)
        for place, count in zip(at.tolist(), counts.tolist(), strict=True):
            segment = segments[place]
            segment.dead += count
            if segment.dead == len(segment):
                kept[place] = None
            elif segment.name is None and 2 * segment.dead > len(segment):  # amortised
                left = segment.ids
                kept[place] = segment.select(left[alive(left)])
        self.segments = tuple(segment for segment in kept if segment is not None)

    def compact(self, alive: Callable[[Ints], npt.NDArray[np.bool_]]) -> None:
        """Write the living samples anew where others lie between them or files are small; delete all else.

        A pool that was saved before finds its files no more.
        """
        assert self.folder is not None
        kept: list[Segment] = []
        waiting: list[Segment] = []

        def write() -> None:
            if waiting:
                kept.append(_write(self.folder, Segment.joined(waiting)))  # type: ignore[arg-type]
                waiting.clear()

        for segment in self.segments:
            large = segment.nbytes() > FLUSH_BYTES // 2
            if segment.dead == 0 and large and segment.name is not None:
                write()
                kept.append(segment)
                continue
            ids = segment.ids
            waiting.append(segment.select(ids[alive(ids)]))
            if _bytes(waiting) > FLUSH_BYTES:
                write()
        write()
        self.segments = tuple(kept)
        named = {segment.name for segment in kept}
        for path in self.folder.iterdir():
            if path.name not in named and (_FILE.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)):
                path.unlink()

    def look_up(self, ids: Ints) -> tuple[list[Tokens], list[Tokens]]:
        """(prompts, completions) of these samples, as copies."""
        prompts: list[Tokens] = [_EMPTY] * len(ids)
        completions: list[Tokens] = [_EMPTY] * len(ids)
        segments = self.segments
        places = _places(segments, ids)
        order = np.argsort(places, kind="stable")
        used, starts = np.unique(places[order], return_index=True)
        for place, where in zip(used.tolist(), np.split(order, starts[1:]), strict=False):
            rows = segments[place].rows_of(ids[where])
            for out, found in (
                (prompts, segments[place].prompts.copies(rows)),
                (completions, segments[place].completions.copies(rows)),
            ):
                for i, row in zip(where.tolist(), found, strict=True):
                    out[i] = row
        return prompts, completions


_EMPTY = np.empty(0, np.int32)


def parts_of(segments: tuple[Segment, ...], ids: Ints) -> Iterator[Segment]:
    """The samples with these ascending ids, a segment at a time."""
    for segment in segments:
        own = ids[np.searchsorted(ids, segment.first) : np.searchsorted(ids, segment.end)]
        if len(own):
            yield segment.select(own)


def _places(segments: tuple[Segment, ...], ids: Ints) -> Ints:
    """In which segment each id lies."""
    firsts = np.array([segment.first for segment in segments], np.int64)
    return np.searchsorted(firsts, ids, side="right") - 1


def _bytes(segments: Iterable[Segment]) -> int:
    return sum(segment.nbytes() for segment in segments)


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
    written = _read(folder, name)
    written.dead = segment.dead
    return written


def _read(folder: Path, name: str) -> Segment:
    """A memory map of the file: its header is checked against its size and its name, nothing else is read."""
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
    try:
        about = json.loads(metadata[_METADATA])
        segment = Segment(
            int(about["first"]),
            TokenRows(arrays["prompt_tokens"], arrays["prompt_ends"]),
            TokenRows(arrays["completion_tokens"], arrays["completion_ends"]),
            arrays.get("groups"),
            arrays.get("ids"),
            name,
        )
        if len(segment) != about["rows"]:
            raise ValueError(f"{len(segment)} samples instead of {about['rows']}")
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return segment
