"""Where a run's time, work and memory go, stage by stage, beside the time of its matrix products alone.

    python benchmarks/main_job.py --run --output FILE -- --task toxicity    # trains, with a clock beside it
    python benchmarks/main_job.py RUN --output FILE                         # a finished run, from its files
    python benchmarks/main_job.py --grow                                    # does time grow as the work does?

A stage's floor are its matrix products (matrix_products.py says which) at the speed that this machine has in
products of the same sizes: one pass through the weights of all linear layers, and nothing else.

Where this machine has a GPU, the run is taken to be of it, also a finished one, and so is the floor.

With a clock beside it, a stage's time is exact and its memory the most that the process held (Linux), on a
GPU the most that its tensors took there. Files tell less: metrics.jsonl has the seconds of rounds and steps,
and the rest follows from when files were written. Checkpoints are a stage of their own, wherever they are
made.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from matrix_products import RunWork, Work, speed

from quark_fast import train
from quark_fast.arguments import load_config, parse
from quark_fast.config import Config
from quark_fast.runtime.machine import quiet_libraries, sampling_dtype, set_threads, versions
from quark_fast.runtime.memory import keep_freed_memory
from quark_fast.runtime.run_folder import METRICS, RunFolder
from quark_fast.training.progress import Progress
from quark_fast.training.trainer import Trainer

START, CHECKPOINTS, PROBE = "start and check", "checkpoints", "probing"
EVALUATION, EXPORT = "evaluating", "writing the model and the report"
KINDS = ("sampling", "learning", EVALUATION)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of a run, and of the floors


@dataclass
class Spent:
    """Time and memory of a stage; None: not known."""

    seconds: float = 0.0
    peak_mb: float | None = None


# ---------------------------------------------------------------- a run with a clock beside it


class Clock:
    """Listens to a run: how long each stage took, and the most memory that the process held in it."""

    def __init__(self, begun: float) -> None:
        self.stages: dict[str, Spent] = {}
        self.stage, self.last = START, begun

    def __call__(self, event: Progress) -> None:
        # Nothing is done yet where a stage begins: until then it was the one before.
        self.count(event.stage if event.done else self.stage)

    def count(self, stage: str) -> None:
        """Since the last call it was this stage."""
        now, spent = time.time(), self.stages.setdefault(stage, Spent())
        spent.seconds += now - self.last
        spent.peak_mb = max(spent.peak_mb or 0.0, peak_mb())
        self.stage, self.last = stage, now


class ClockedTrainer(Trainer):
    clock: Clock

    def _save(self) -> None:
        self.clock.count(self.clock.stage)
        super()._save()
        self.clock.count(CHECKPOINTS)


def peak_mb() -> float:
    """The most memory that this process held since the last call; on a GPU, of the GPU's, by its tensors."""
    if DEVICE.type == "cuda":
        most = torch.cuda.max_memory_allocated(DEVICE)
        torch.cuda.reset_peak_memory_stats(DEVICE)
        return most / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew, at what is held now
    return int(peak) / 1024


def process_start() -> float:
    """When this process began, Unix time."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the boot
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def clocked(config: Config, begun: float) -> tuple[Path, dict[str, Spent]]:
    """Train: (run folder, what its stages took)."""
    clock = Clock(begun)
    trainer = ClockedTrainer(config, listen=clock)
    trainer.clock = clock
    clock.count(START)
    return trainer.train().folder, clock.stages


# ---------------------------------------------------------------- a finished run


def from_files(folder: RunFolder) -> dict[str, Spent]:
    """What the stages took, as far as the files tell."""
    rounds = load_config(folder / "config.yaml").rounds
    stages: dict[str, Spent] = {}
    for row in folder.rows_of(METRICS):
        if row["kind"] in ("round", "step"):
            what = {"round": "sampling", "step": "learning"}[row["kind"]]
            stages.setdefault(f"round {row['round'] + 1}/{rounds}: {what}", Spent()).seconds += row["seconds"]
    starts = json.loads((folder / "versions.json").read_text())["starts"]
    if len(starts) == 1:  # a run that was resumed lay still in between
        known = math.fsum(stage.seconds for stage in stages.values())
        begun = datetime.fromisoformat(starts[0]["time"]).timestamp()
        names = (METRICS, "evaluation.jsonl", "finished.json")
        probed, evaluated, finished = ((folder / name).stat().st_mtime for name in names)
        stages[f"{PROBE}, {CHECKPOINTS}"] = Spent(probed - begun - known)
        stages[f"{EVALUATION}, all rows"] = Spent(evaluated - probed)
        stages[EXPORT] = Spent(finished - evaluated)
    return stages


# ---------------------------------------------------------------- the table


def table(folder: Path, spent: dict[str, Spent]) -> dict[str, Any]:
    """Every stage's time and memory beside its work and the floor under its time."""
    run = RunWork(RunFolder(folder), DEVICE.type == "cpu")
    set_threads(run.config.threads)
    dtype = sampling_dtype(run.config.precision, DEVICE)
    weights = [weight.to(DEVICE, dtype) for weight in run.weights]
    work = run.by_stage()
    kinds = sorted({(one.rows, one.passes) for stage in work.values() for one in stage.products})
    speeds = {kind: speed(weights, *kind) for kind in kinds}
    rows = []
    for stage in [*spent, *(name for name in work if name not in spent)]:
        took, done = spent.get(stage), work.get(stage, Work(0, 0))
        floor = math.fsum(one.flops / speeds[one.rows, one.passes] for one in done.products)
        rows.append(
            {
                "stage": stage,
                "seconds": took and round(took.seconds, 2),
                "prompt_tokens": done.prompt_tokens,
                "completion_tokens": done.completion_tokens,
                "tflop": round(math.fsum(one.flops for one in done.products) / 1e12, 3),
                "floor_s": round(floor, 2),
                "to_floor": round(took.seconds / floor, 2) if took and floor else None,
                "peak_mb": took and took.peak_mb and round(took.peak_mb),
            }
        )
    record = json.loads((folder / "versions.json").read_text())
    return versions(DEVICE) | {
        "run": {name: record.get(name) for name in ("command", "machine", "time", "minutes")},
        "products": [
            {"rows": n, "passes": passes, "dtype": str(dtype), "gflop_per_s": round(found / 1e9, 1)}
            for (n, passes), found in speeds.items()
        ],
        "stages": rows,
    }


def show(rows: list[dict[str, Any]]) -> None:
    lines = [
        list(rows[0]),
        *(["" if value is None else str(value) for value in row.values()] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


# ---------------------------------------------------------------- growth

SMALL: dict[str, Any] = {
    "task": "toxicity",
    "prompt_limit": 32,
    "held_out": "8",
    "rounds": 1,
    "initial_samples": 4,
    "steps": 4,
    "batch_size": 4,
    "micro_batch": 4,
    "max_new_tokens": 20,
    "eval_samples": 1,
    "eval_rows": "best",
}
# (setting, its values one after the other, the stages whose work grows with it)
GROWTH: list[tuple[str, list[int], list[str]]] = [
    ("initial_samples", [4, 8], ["sampling"]),
    ("steps", [4, 8], ["learning"]),
    ("max_new_tokens", [20, 40, 80, 160, 256], list(KINDS)),
]
MOST = 1.05  # of the time's growth, as a multiple of the work's: 2.1 where that doubles


def small_job(settings: dict[str, Any]) -> dict[str, float]:
    """The seconds that a short job samples, learns and evaluates. No completion ends early."""
    with tempfile.TemporaryDirectory() as parent:
        length = settings["max_new_tokens"]
        config = Config(**settings, min_new_tokens=length, output=str(Path(parent) / "run"))
        _, stages = clocked(config, time.time())
    return by_kind(stages)


def by_kind(stages: Mapping[str, Spent]) -> dict[str, float]:
    """The seconds of all stages that sample, that learn, and that evaluate."""
    return {
        kind: math.fsum(spent.seconds for name, spent in stages.items() if kind in name) for kind in KINDS
    }


def grow(small: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times as long a stage takes when one setting grows."""
    base, rows = small_job(small), []
    for setting, values, kinds in GROWTH:
        took = [base, *(small_job(small | {setting: value}) for value in values[1:])]
        for (a, before), (b, after) in itertools.pairwise(zip(values, took, strict=True)):
            rows += [
                {
                    "grown": f"{setting} {a} to {b}",
                    "stage": kind,
                    "seconds": round(before[kind], 2),
                    "then": round(after[kind], 2),
                    "ratio": round(after[kind] / before[kind], 3),
                    "at_most": round(MOST * b / a, 3),
                }
                for kind in kinds
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--run", action="store_true", help="train first; train's settings stand behind --")
    parser.add_argument("--grow", action="store_true", help="short jobs of growing size")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, settings = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if given.run + given.grow + (given.folder is not None) != 1:
        parser.error("give RUN, or --run -- SETTINGS, or --grow")
    command = {"command": shlex.join(["python", *sys.argv])}
    quiet_libraries()
    keep_freed_memory()
    if given.grow:
        rows = grow(SMALL)
        found = versions(DEVICE) | {"rows": rows}
    else:
        if given.run:
            sys.argv = [train.__file__, *settings]  # the run's own record shows its command
            folder, spent = clocked(parse(settings, "python -m quark_fast.train"), process_start())
        else:
            folder, spent = given.folder, from_files(RunFolder(given.folder))
        found = table(folder, spent)
        show(found["products"])
        rows = found["stages"]
    show(rows)
    if given.output:
        given.output.write_text(json.dumps(found | command, indent=1) + "\n")
    if given.grow and any(row["ratio"] > row["at_most"] for row in rows):
        sys.exit("a stage's time grows more than its work")


if __name__ == "__main__":
    main()
