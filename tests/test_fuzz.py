"""The short form of fuzz.py: Hypothesis chooses the random numbers, and so finds the least that fails."""

from __future__ import annotations

import random

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SLOW = {
    "page": 2,
    "model": 8,
    "table": 15,
    "run_folder": 10,
    "reward_cache": 15,
    "checkpoint": 15,
    "settings": 25,
    "loss": 40,
}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_input_gives_a_right_answer_or_a_documented_error(name: str) -> None:
    target, _ = fuzz.TARGETS[name]
    allowed = {"right"} if name in fuzz.NEVER_REFUSED else {"right", "refused"}

    @settings(max_examples=SLOW.get(name, 50), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(chosen: random.Random) -> None:
        assert target(chosen) in allowed

    check()


@pytest.mark.parametrize("name", sorted(fuzz.TARGETS.keys() - fuzz.NEVER_REFUSED))
def test_targets_make_good_inputs_and_bad_ones(name: str) -> None:
    # Else the test above would pass if everything were refused.
    target, _ = fuzz.TARGETS[name]
    outcomes = set()
    for seed in range(200):
        outcomes.add(target(random.Random(seed)))
        if len(outcomes) == 2:
            return
    pytest.fail(f"200 inputs, and all of them {outcomes.pop()}")


# One input for each mistake that the long form found, by the seed that repeats it or as what it was.
@pytest.mark.parametrize(("name", "seed"), [("pool_file", 9), ("pool_file", 350), ("checkpoint", 385)])
def test_what_was_found_stays_mended(name: str, seed: int) -> None:
    target, _ = fuzz.TARGETS[name]
    assert target(random.Random(seed)) in ("right", "refused")
