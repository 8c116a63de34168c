"""How CPU threads wait for each other. Torch-free: it has to be decided before torch is loaded."""

from __future__ import annotations

import os

# Turns of GNU OpenMP's waiting loop, some microseconds, before a thread sleeps.
SPINS = "2000"


def wait_briefly() -> None:
    """Have OpenMP's threads sleep soon where they wait, unless the environment says how they are to.

    By default they spin for milliseconds at the end of every parallel loop. Where another program takes a
    core, a thread that spins takes the time of the one that it waits for.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
