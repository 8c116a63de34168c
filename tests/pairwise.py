"""Fewer cases than all combinations of several parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis in which every two values of two axes meet.

    A mistake in what two parameters do together is seen by one of them; all combinations repeat each such
    pair many times over.
    """
    every = list(product(*(range(len(axis)) for axis in axes)))
    pairs = {row: frozenset(combinations(enumerate(row), 2)) for row in every}
    left = frozenset().union(*pairs.values())
    chosen = []
    used: Counter[tuple[int, int]] = Counter()
    while left:
        # Of the rows with the most new pairs the one whose values have been seen least.
        row = max(every, key=lambda row: (len(pairs[row] & left), -sum(used[at] for at in enumerate(row))))
        left -= pairs[row]
        used.update(enumerate(row))
        chosen.append(tuple(axis[place] for axis, place in zip(axes, row, strict=True)))
    return chosen
