"""What another program on one of the cores costs a run, by how long OpenMP's threads wait for each other.

    python benchmarks/busy_machine.py --output FILE

A small job of training, in a process of its own, with all cores free and with one of them taken by a loop
that does nothing else. Every way of waiting in turn: what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from main_job import KINDS, SMALL, by_kind, from_files, show

from quark_fast.runtime.machine import versions
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.runtime.waiting import SPINS

# Turns of the waiting loop before a thread sleeps: GNU OpenMP's own, that of our commands, none.
WAYS = {"spin for milliseconds": "300000", "sleep soon, the commands' own": SPINS, "sleep at once": "0"}
JOB: dict[str, Any] = SMALL | {"held_out": "16", "eval_samples": 4, "initial_samples": 8, "batch_size": 16}
MOST = 2.5  # times as long with one of two cores taken


@contextlib.contextmanager
def taken(core: bool) -> Iterator[None]:
    """A core that another program takes, if asked for."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if core else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def job(spins: str) -> dict[str, float]:
    """The seconds that a small job samples, learns and evaluates."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        settings = [
            part for name, value in JOB.items() for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        command = [sys.executable, "-m", "quark_fast.train", *settings, "--output", str(folder), "--quiet"]
        subprocess.run(command, check=True, env=os.environ | {"GOMP_SPINCOUNT": spins})
        return by_kind(from_files(RunFolder(folder)))


def measured(repeats: int) -> list[dict[str, Any]]:
    """Of each way of waiting and stage: the median seconds with all cores free and with one taken."""
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for way, spins in WAYS.items():
            for busy in (False, True):
                with taken(busy):
                    found.setdefault((way, busy), []).append(job(spins))
    return [row_of(way, stage, found[way, False], found[way, True]) for way in WAYS for stage in KINDS]


def row_of(
    way: str, stage: str, free: list[dict[str, float]], busy: list[dict[str, float]]
) -> dict[str, Any]:
    quiet, slow = (statistics.median(one[stage] for one in every) for every in (free, busy))
    return {
        "threads": way,
        "stage": stage,
        "seconds": round(quiet, 2),
        "one core taken": round(slow, 2),
        "times": round(slow / quiet, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="jobs of each kind (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    given = parser.parse_args()
    rows = measured(given.repeats)
    show(rows)
    found = versions(torch.device("cpu")) | {"command": shlex.join(["python", *sys.argv]), "rows": rows}
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    own = [row["times"] for row in rows if WAYS[row["threads"]] == SPINS]
    if max(own) > MOST:
        sys.exit(f"a stage of the commands takes {max(own)} times as long, more than {MOST}")


if __name__ == "__main__":
    main()
