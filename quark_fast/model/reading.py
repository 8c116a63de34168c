"""How a model is read: its arguments, its cache, and whether rows of different lengths may stand together.

What holds for a model, ``check_reading.py`` finds out when it is loaded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from quark_fast.model.cache import decoding_cache
from quark_fast.runtime.transfer import to_device


@dataclass(frozen=True)
class Reading:
    """What gives a model's own logits, those of each sequence alone.

    Attributes:
        padding: rows of different lengths may stand together, padded on their left. Else those of one length.
        cache: a token may be read with the cache of those before it. Else all of them are read again.
        many: with a cache, several tokens may be read at a time.
    """

    padding: bool = True
    cache: bool = True
    many: bool = True

    @property
    def rows(self) -> str:
        return "rows of all lengths together" if self.padding else "rows of one length together"

    def __str__(self) -> str:
        how = "with a cache" if self.cache else "without a cache (the whole text again for each token)"
        return f"{self.rows}, {how}"


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, L) ids aligned at their right end, and their attention mask. The padding id is never read."""
    width = max(map(len, rows))
    ids = to_device([[0] * (width - len(row)) + list(row) for row in rows], device)
    mask = to_device([[0] * (width - len(row)) + [1] * len(row) for row in rows], device)
    return ids, mask


def last_column(device: torch.device) -> Tensor:
    """(1,) the column whose logits a next token is drawn from.

    An index, not the slice [-1:]: a product with a slice copies the head's weights for every prompt.
    """
    return torch.full((1,), -1, device=device)


def positions_of(mask: Tensor) -> Tensor:
    """(N, L) the position of each token in its own row; 0 on padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def runs_of_one_length(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbours that are equally long."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] != lengths[start]:
            yield slice(start, end)
            start = end


@functools.cache
def _arguments(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The names that the function takes, and whether it takes any other."""
    parameters = inspect.signature(forward).parameters.values()
    named = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def cache_argument(model: Any) -> str:
    """What the model calls its cache: transformers 5.24 renamed it, and warns at the old name."""
    return "cache" if "cache" in _arguments(type(model).forward)[0] else "past_key_values"


def read(
    model: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    columns: Tensor | None = None,
    cache: Any = None,
) -> Any:
    """The model's output for ids after what ``cache`` holds.

    A model is given what its ``forward`` takes: some have no positions, or compute the logits of all columns.

    Args:
        ids: (N, L).
        mask: (N, past + L), 0 on padding; None where there is none.
        positions: (N, L); None: the model's own, from 0 or from the end of its cache.
        columns: of ids, of which the output is to have logits; None: all.
    """
    inputs: dict[str, Any] = {"use_cache": cache is not None}
    given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": columns}
    inputs |= {name: value for name, value in given.items() if value is not None}
    if cache is not None:
        inputs[cache_argument(model)] = cache
    named, any_other = _arguments(type(model).forward)
    output = model(ids, **{name: value for name, value in inputs.items() if any_other or name in named})
    if columns is not None and output.logits.shape[1] != len(columns):
        output.logits = output.logits[:, columns]
    return output


class Sent(NamedTuple):
    """What a reader is sent for the next logits: the tokens that were drawn, and which rows go on.

    Attributes:
        tokens: (N,) ids, of the rows that go on.
        rows: (N,) int64, their numbers among the rows so far; None: all of them go on.
    """

    tokens: Tensor
    rows: Tensor | None = None


Reader = Generator[Tensor, Sent, None]
# ``next_logits`` of a model, or what stands in for it, given the contexts and how many samples each has.
Read = Callable[[Sequence[Sequence[int]], int], Reader]


def next_logits(model: Any, contexts: Sequence[Sequence[int]], samples: int, reading: Reading) -> Reader:
    """(N samples, >= V) logits of the token after each context; sent these tokens, of those after them.

    Each context is read once for all its samples, which are neighbours.
    """
    ids, every = pad_left(contexts, model.device)
    mask: Tensor | None = every
    positions: Tensor | None = positions_of(every)
    if not reading.padding:
        assert len({*map(len, contexts)}) == 1, "contexts of one length"
        mask = positions = None
    last = last_column(model.device)
    cache = decoding_cache(model) if reading.cache else None
    logits = read(model, ids, mask, positions, columns=last, cache=cache).logits
    if samples > 1:  # from here on each sample has its own cache
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(samples)
        logits = logits[rows]
        ids, mask, positions = _of_rows(rows, cache, ids, mask, positions)
    while True:
        tokens, going_on = yield logits[:, -1]
        tokens = tokens.unsqueeze(1)
        if going_on is not None:
            ids, mask, positions = _of_rows(going_on, cache, ids, mask, positions)
        if mask is not None and positions is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1 if cache is not None else positions_of(mask)
        if cache is None:
            ids = tokens = torch.cat([ids, tokens], dim=1)
        logits = read(model, tokens, mask, positions, columns=last, cache=cache).logits


def _of_rows(
    rows: Tensor, cache: DynamicCache | None, ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What has been read, of these rows alone, which may repeat; the cache from now on holds them.

    By ``reorder_cache``, which selects rows in every kind of layer. ``batch_select_indices`` does not: layers
    of a state lack it, and those of a state and keys select the keys alone. Whether a model goes on rightly
    with other rows than before, ``check_reading.py`` tries out; if not, it is read without a cache.
    """
    if cache is not None:
        cache.reorder_cache(rows)  # type: ignore[arg-type]  # it means int64
    return ids[rows], None if mask is None else mask[rows], None if positions is None else positions[rows]
