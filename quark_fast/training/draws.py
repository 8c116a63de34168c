"""Which samples the steps of a round draw: every quantile has its share, in batches of like lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass
class Draws:
    """How often each sample of the pool was drawn, by its place in the pool."""

    counts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def grow(self, size: int) -> None:
        """Make room for samples added since."""
        self.counts = np.concatenate([self.counts, np.zeros(size - len(self.counts), np.int64)])

    def count(self, places: Ints) -> None:
        np.add.at(self.counts, places.ravel(), 1)


WINDOW = 8  # batches whose samples are sorted by length together: little padding, still mixed


def plan_batches(
    labels: npt.NDArray[np.int32],
    weights: Sequence[float],
    lengths: Ints,
    draws: Draws,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> Ints:
    """(steps, batch_size) places in the pool: what each step of a learning phase draws.

    Quantile k gets the share ``weights[k]`` of the draws. Within a quantile the samples drawn least
    often come first, ties at random: many samples seen once teach more than few seen often, and none is
    left out while another is repeated. A quantile without members gives its share to the others.

    Args:
        labels: quantile of every sample.
        lengths: prompt length of every sample, by which neighbours in a batch are chosen.
    """
    draws.grow(len(labels))
    needed = steps * batch_size
    shares = np.array([w * bool((labels == k).any()) for k, w in enumerate(weights)])
    if not shares.sum() > 0:
        shares = np.bincount(labels, minlength=len(weights)).astype(float)
    # Largest remainders, so that the counts add up exactly.
    exact = shares / shares.sum() * needed
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: needed - counts.sum()]] += 1
    chosen = []
    for k, count in enumerate(counts):
        members = np.flatnonzero(labels == k)
        if count == 0:
            continue
        order = members[np.lexsort((rng.random(len(members)), draws.counts[members]))]
        chosen.append(np.resize(order, count))
    places = rng.permutation(np.concatenate(chosen))
    batches = []
    for window in np.split(places, range(WINDOW * batch_size, needed, WINDOW * batch_size)):
        by_length = window[np.argsort(lengths[window], kind="stable")].reshape(-1, batch_size)
        batches.append(rng.permutation(by_length, axis=0))
    return np.concatenate(batches)
