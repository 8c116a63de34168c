"""No two purposes share a seed, whatever the run's own."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from quark_fast.runtime.seeds import Purpose, seed_for


def test_streams_of_all_purposes_rounds_and_batches_are_disjoint() -> None:
    seeds = [
        seed_for(seed_for(run, purpose, *numbers), "batch", place)
        for run in range(4)
        for purpose in get_args(Purpose)
        for numbers in [(), *((n,) for n in range(12)), *itertools.product(range(12), range(5))]
        for place in range(3)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_trailing_zeros_make_another_seed() -> None:
    # As plain entropy, numpy takes [0], [0, 0] and [0, 0, 0] for the same.
    assert len({seed_for(0, "round"), seed_for(0, "round", 0), seed_for(0, "round", 0, 0)}) == 3


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_seed_is_the_same_in_every_process_and_version(seed: int) -> None:
    known = {0: 337988958638385868, 1: 872859370886827409, 2**63 - 1: 2987504270077924904}
    assert seed_for(seed, "evaluation") == known[seed]
