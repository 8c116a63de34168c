"""Quantiles over several processes: the boundaries of the union of all ranks' pools, never a sketch."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from quark_fast import _C

Ints = npt.NDArray[np.int64]
Unsigned = npt.NDArray[np.unsignedinteger]
CANDIDATES = 255  # between them lie the 2^8 values of the next 8 bits


def union_boundaries(
    core: _C.QuantilePool32, settings: dict[str, Any], group: dist.ProcessGroup | None
) -> tuple[Unsigned, Unsigned, Unsigned]:
    """The K - 1 boundaries of the union of all ranks' pools, in the core's order.

    Radix bisection: all ranks count their samples up to 255 candidates for the next 8 bits of each boundary,
    and add the counts up: 4 all-reduces for float32 keys, 8 for float64, of at most 2 KB per boundary. This
    is done twice: for the keys, then for the ties among equal keys; with ties="same" then for the next better
    reward, which is the boundary where a whole block of equal rewards falls into the worse quantile.

    Returns:
        keys and ties of the last positions on this rank that belong to the best j quantiles, and the
        keys of the union's thresholds.
    """
    union = _Union(core, settings, group)
    rule = [settings[name] for name in ("quantiles", "ties", "remainder", "dtype")]
    if len(np.unique(union.gather(np.array([zlib.crc32(repr(rule).encode())], np.int64)))) > 1:
        raise ValueError(f"the ranks' pools differ in quantiles, ties, remainder or dtype; here {rule}")

    k, same = settings["quantiles"], settings["ties"] == "same"
    n = int(union.total(np.array([len(core)])).item())
    remainder = getattr(_C.Remainder, settings["remainder"])
    cuts = np.array([_C.quantile_cut(n, j, k, remainder) for j in range(1, k)], np.int64)
    if k == 1 or n == 0 or (cuts[0] == 0 and not same):
        none = np.zeros(0, union.word)
        return none, none, none
    return _around_blocks(union, cuts, n) if same else _between_samples(union, cuts)


def _around_blocks(union: _Union, cuts: Ints, n: int) -> tuple[Unsigned, Unsigned, Unsigned]:
    """Boundaries before or after the whole block of equal rewards that each cut goes through."""
    one = union.word(1)
    keys, ties = union.smallest(np.maximum(cuts, 1), "key")
    # Keys of rewards begin at 1, so key - 1 does not wrap around.
    better = union.count_up_to(keys - one, ties)
    reaches = _C.block_reaches(n, cuts, better, union.count_up_to(keys, ties) - better)
    next_better = np.where(better > 0, union.smallest(np.maximum(better, 1), "key")[0], union.word(0))
    keys = np.where(reaches, keys, next_better)
    return keys, ties, keys


def _between_samples(union: _Union, cuts: Ints) -> tuple[Unsigned, Unsigned, Unsigned]:
    """Boundaries after exactly as many samples as the cuts; among equal ones the first ranks' come first."""
    one, core = union.word(1), union.core
    keys, ties = union.smallest(cuts, "key", "tie")
    first = ties == 0
    before = keys - first.astype(union.word), np.where(first, union.largest, ties - one)
    nothing_before = first & (keys == 0)
    up_to = core.count_up_to(keys, ties)
    under = np.where(nothing_before, 0, core.count_up_to(*before))
    here = union.gather(up_to - under)
    rank = dist.get_rank(union.group)
    missing = cuts - union.total(under) - here[:rank].sum(0)
    excluded = (here[rank] > 0) & (missing <= 0)
    return np.where(excluded, before[0], keys), np.where(excluded, before[1], ties), keys


class _Union:
    """All ranks' pools: counts of their samples, by sums over the ranks."""

    def __init__(
        self, core: _C.QuantilePool32, settings: dict[str, Any], group: dist.ProcessGroup | None
    ) -> None:
        self.core, self.group = core, group
        self.word = np.dtype(f"u{np.dtype(settings['dtype']).itemsize}").type  # of a key and of a tie
        self.bits = 8 * self.word().itemsize
        self.largest = self.word(np.iinfo(self.word).max)
        on_gpu = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def total(self, counts: Ints) -> Ints:
        """The sum over ranks."""
        tensor = torch.from_numpy(counts).to(self.device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.cpu().numpy()

    def gather(self, counts: Ints) -> Ints:
        """(ranks, ...)"""
        tensor = torch.from_numpy(counts).to(self.device)
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, tensor, group=self.group)
        return torch.stack(gathered).cpu().numpy()

    def count_up_to(self, keys: Unsigned, ties: Unsigned) -> Ints:
        """How many samples of the union lie at or before each position."""
        return self.total(self.core.count_up_to(keys, ties))

    def smallest(self, ranks: Ints, *fields: str) -> tuple[Unsigned, Unsigned]:
        """(keys, ties) of the first positions with so many samples up to them: 8 bits at a time."""
        found = {"key": np.zeros(len(ranks), self.word), "tie": np.full(len(ranks), self.largest)}
        for field in fields:
            found[field][:] = 0
            for shift in range(self.bits - 8, -8, -8):
                rest = self.word((1 << shift) - 1)
                digits = np.arange(CANDIDATES, dtype=self.word) << self.word(shift)
                candidates = {name: np.repeat(values, CANDIDATES) for name, values in found.items()}
                candidates[field] |= np.tile(digits, len(ranks)) | rest
                counts = self.count_up_to(candidates["key"], candidates["tie"])
                digit = (counts.reshape(len(ranks), CANDIDATES) < ranks[:, None]).sum(1)
                found[field] |= digit.astype(self.word) << self.word(shift)
        return found["key"], found["tie"]
