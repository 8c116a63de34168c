"""Token ids of many prompts or completions, end to end in one array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quark_fast import _C

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
IdRow = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor
IdRows = Sequence[IdRow] | npt.NDArray[np.integer] | torch.Tensor


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

    def copies(self, rows: Ints) -> list[Tokens]:
        starts = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0).tolist()
        return [self.tokens[i:j].copy() for i, j in zip(starts, self.ends[rows].tolist(), strict=True)]


def pack(name: str, rows: IdRows, kept: npt.NDArray[np.bool_]) -> TokenRows:
    """Those of the rows that are kept. `name` is what a message calls them."""
    if len(rows) != len(kept):
        raise ValueError(f"{len(kept)} rewards but {len(rows)} {name}")
    if isinstance(rows, torch.Tensor):
        rows = rows.numpy(force=True)
    if isinstance(rows, list) and kept.all():
        chosen: Any = rows
    elif isinstance(rows, np.ndarray) and rows.ndim > 1:
        chosen = rows[kept]
    else:
        chosen = [row for row, keep in zip(rows, kept.tolist(), strict=True) if keep]
    packed = _C.pack_rows(chosen) if isinstance(chosen, list) else None  # much faster than row by row
    return TokenRows(*packed) if packed is not None else _pack_any(name, chosen)


def _pack_any(name: str, rows: Any) -> TokenRows:
    """Rows of any integer type: arrays, tensors, lists of numpy's integers."""
    try:
        if isinstance(rows, np.ndarray):
            lengths, tokens = np.full(len(rows), rows.shape[1]), rows.reshape(-1, *rows.shape[2:])
        else:
            lengths = np.array([len(row) for row in rows], np.int64)
            filled = [np.asarray(row) for row in rows if len(row)]
            tokens = np.concatenate(filled) if filled else np.empty(0, np.int32)
    except (TypeError, ValueError) as error:  # what numpy says of rows that are no rows of numbers
        raise TypeError(f"{name} must be rows of integer token ids: {error}") from error
    if tokens.dtype.kind not in "iu" or tokens.shape != (lengths.sum(),):
        raise TypeError(f"{name} must be rows of integer token ids, got {tokens.dtype}")
    low, high = (tokens.min(), tokens.max()) if len(tokens) else (0, 0)
    if low < 0 or high >= 2**31:
        raise ValueError(f"{name} hold token ids from {low} to {high}; 0 to 2^31 - 1 are possible")
    return TokenRows.of_lengths(tokens.astype(np.int32), lengths)
