"""Quantiles within groups of samples, by numpy's sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quark_fast import _C

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]


class GroupQuantiles:
    """The quantiles of the samples of one moment; answers the same questions as the core.

    Args:
        ids, rewards, groups: (n,) of all samples, ids ascending; samples of one number are a group.
        settings: of the pool: quantiles, ties, remainder.
        tie_key: decides ties="random".
    """

    def __init__(
        self, ids: Ints, rewards: Floats, groups: Ints, settings: dict[str, Any], tie_key: int
    ) -> None:
        self._ids, self._rewards, self._quantiles = ids, rewards, settings["quantiles"]
        self._labels = _labels_within_groups(groups, rewards, ids, settings, tie_key)

    def labels(self) -> npt.NDArray[np.int32]:
        return self._labels.copy()

    def labels_into(self, out: npt.NDArray[Any]) -> int:
        if self._quantiles - 1 > np.iinfo(out.dtype).max:
            raise ValueError(f"{self._quantiles} quantiles do not fit in labels of {8 * out.itemsize} bits")
        out[: len(self._labels)] = self._labels
        return len(self._labels)

    def look_up(self, ids: Ints) -> tuple[Floats, Ints]:
        rows = np.searchsorted(self._ids, ids)
        return self._rewards[rows], self._labels[rows].astype(np.int64)

    def sample(
        self, count: int, quantiles: list[int], replace: bool, stratified: bool, key: int
    ) -> tuple[Ints, Floats, Ints]:
        labels, k = self._labels, self._quantiles
        chosen = quantiles or list(range(k))
        if not all(0 <= quantile < k for quantile in chosen):
            raise ValueError(f"quantiles are 0 (worst) to {k - 1} (best), got {chosen}")
        if stratified:
            strata = [np.flatnonzero(labels == quantile) for quantile in sorted(set(chosen))]
        else:
            strata = [np.flatnonzero(np.isin(labels, chosen))]
        strata = [rows for rows in strata if len(rows)]
        if count and not strata:
            raise ValueError("nothing to draw from: the pool or these quantiles are empty")
        random = np.random.Generator(np.random.PCG64(key))
        turns = (random.integers(max(len(strata), 1)) + np.arange(count)) % max(len(strata), 1)
        drawn = np.empty(count, np.int64)
        for turn, rows in enumerate(strata):
            at = np.flatnonzero(turns == turn)
            if not replace and len(at) > len(rows):
                raise ValueError(
                    f"cannot draw {len(at)} without replacement from {len(rows)} samples; "
                    "ask for fewer or use replace=True"
                )
            drawn[at] = random.choice(rows, len(at), replace)
        ids = self._ids[drawn]
        return ids, *self.look_up(ids)


def _labels_within_groups(
    groups: Ints, rewards: Floats, ids: Ints, settings: dict[str, Any], tie_key: int
) -> npt.NDArray[np.int32]:
    """The rule of RolloutPool within each group: count the cuts that lie behind each sample."""
    n, k = len(ids), settings["quantiles"]
    tie = ids.astype(np.uint64)
    if settings["ties"] == "random":  # ids hashed as SplitMix64 does; overflow is the point
        tie += np.uint64(tie_key)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            tie = (tie ^ (tie >> np.uint64(shift))) * np.uint64(factor)
    order = np.lexsort((tie, -rewards, groups))
    sorted_groups, sorted_rewards = groups[order], rewards[order]
    new_group = np.ones(n, bool)
    new_group[1:] = sorted_groups[1:] != sorted_groups[:-1]
    starts = np.flatnonzero(new_group)
    group = np.cumsum(new_group) - 1
    size = np.diff(starts, append=n)[group]
    position = np.arange(n) - starts[group]
    new_reward = new_group.copy()
    new_reward[1:] |= sorted_rewards[1:] != sorted_rewards[:-1]
    blocks = np.flatnonzero(new_reward)
    block = np.cumsum(new_reward) - 1
    better, equal = position[blocks][block], np.diff(blocks, append=n)[block]
    labels = np.zeros(n, np.int32)
    for j in range(1, k):
        cut = -(-j * size // k) if settings["remainder"] == "spread" else j * (size // k)
        if settings["ties"] == "same":
            labels[order] += _C.block_reaches(size, cut, better, equal)
        else:
            labels[order] += position < cut
    return labels
