"""The seeds of everything random in a run: one stream for each purpose, and none shared by two."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Purpose = Literal[
    "batch",  # within a stream of samples, (index of the batch)
    "check of the reward",
    "round",  # sampling, (round, conditioning)
    "tokens to explore by",  # (round)
    "draws",  # which samples a round's steps take, (round)
    "probe",
    "evaluation",
    "prompt classes",
    "reward tokens",
    "adapters",
]
# A purpose's number is part of its seeds: new ones go to the end.
_NUMBERS = {name: number for number, name in enumerate(get_args(Purpose))}


def seed_for(seed: int, purpose: Purpose, *numbers: int) -> int:
    """A seed in 0 .. 2^63 - 1 of the run's ``seed`` for one purpose, and within it for some numbers >= 0.

    numpy's ``SeedSequence``, whose spawn key is (purpose, numbers): the streams of different keys are
    independent, also those of neighbouring seeds.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(_NUMBERS[purpose], *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
