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
Places = npt.NDArray[np.unsignedinteger]


def union_boundaries(
    core: _C.QuantilePool32, settings: dict[str, Any], group: dist.ProcessGroup | None
) -> tuple[Places, Places, Places]:
    """The K - 1 boundaries of the union of all ranks' pools, in the core's order.

    Radix bisection: all ranks count their samples up to 255 candidates for the next 8 bits of each boundary,
    and add the counts up: 4 all-reduces for float32 keys, 8 for float64, of at most 2 KB per boundary. Twice:
    for the ties among equal keys, or with ties="same" for the next better reward, which is the boundary where
    a block of equal rewards belongs behind it.

    Returns:
        keys and ties of the last places on this rank that belong to the best j quantiles, and the
        keys of the union's thresholds.
    """
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def total(counts: Ints) -> Ints:
        tensor = torch.from_numpy(counts).to(device)
        dist.all_reduce(tensor, group=group)
        return tensor.cpu().numpy()

    def gather(counts: Ints) -> Ints:
        """(ranks, ...)"""
        tensor = torch.from_numpy(counts).to(device)
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor, group=group)
        return torch.stack(gathered).cpu().numpy()

    rule = [settings[name] for name in ("quantiles", "ties", "remainder", "dtype")]
    if len(np.unique(gather(np.array([zlib.crc32(repr(rule).encode())], np.int64)))) > 1:
        raise ValueError(f"the ranks' pools differ in quantiles, ties, remainder or dtype; here {rule}")

    k, same = settings["quantiles"], settings["ties"] == "same"
    n = int(total(np.array([len(core)])).item())
    remainder = getattr(_C.Remainder, settings["remainder"])
    cuts = np.array([_C.quantile_cut(n, j, k, remainder) for j in range(1, k)], np.int64)
    word = np.dtype(f"u{np.dtype(settings['dtype']).itemsize}").type
    bits, largest = 8 * word().itemsize, np.iinfo(word).max
    if k == 1 or n == 0 or (cuts[0] == 0 and not same):
        none = np.zeros(0, word)
        return none, none, none

    def smallest(ranks: Ints, *fields: str) -> tuple[Places, Places]:
        """The smallest place with so many samples at or before it: 8 bits of each field at a time."""
        place = {"key": np.zeros(k - 1, word), "tie": np.full(k - 1, largest, word)}
        for field in fields:
            place[field][:] = 0
            for shift in range(bits - 8, -8, -8):
                rest = word((1 << shift) - 1)
                digits = np.arange(255, dtype=word) << word(shift)
                candidates = {name: np.repeat(values, 255) for name, values in place.items()}
                candidates[field] |= np.tile(digits, k - 1) | rest
                counts = total(core.count_up_to(candidates["key"], candidates["tie"]))
                digit = (counts.reshape(k - 1, 255) < ranks[:, None]).sum(1)
                place[field] |= digit.astype(word) << word(shift)
        return place["key"], place["tie"]

    if same:
        keys, ties = smallest(np.maximum(cuts, 1), "key")
        # No reward has the key 0, so there is one before each.
        better = total(core.count_up_to(keys - word(1), ties))
        reaches = _C.block_reaches(n, cuts, better, total(core.count_up_to(keys, ties)) - better)
        next_better = np.where(better > 0, smallest(np.maximum(better, 1), "key")[0], word(0))
        keys = np.where(reaches, keys, next_better)
        return keys, ties, keys
    keys, ties = smallest(cuts, "key", "tie")

    # Ranks may each have a sample at this very place: the first ranks' belong to the best j.
    first = ties == 0
    before = keys - first.astype(word), np.where(first, word(largest), ties - word(1))
    nothing_before = first & (keys == 0)
    up_to = core.count_up_to(keys, ties)
    under = np.where(nothing_before, 0, core.count_up_to(*before))
    here = gather(up_to - under)
    rank = dist.get_rank(group)
    missing = cuts - total(under) - here[:rank].sum(0)
    excluded = (here[rank] > 0) & (missing <= 0)
    return np.where(excluded, before[0], keys), np.where(excluded, before[1], ties), keys
