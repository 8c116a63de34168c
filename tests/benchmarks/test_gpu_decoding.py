"""benchmarks/gpu_decoding.py meets a GPU rarely: here it runs at a tiny size on the CPU, without graphs."""

from __future__ import annotations

import json
from pathlib import Path

from warm import Process

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_decoding_runs_to_its_end(tmp_path: Path) -> None:
    options = ["--tiny", "--rows", "3", "--prompt", "5", "--tokens", "4", "--rounds", "2"]
    options += ["--output", str(tmp_path / "out.json")]
    folder = ROOT / "benchmarks"
    done = Process("gpu_decoding", *options, folder=folder, environment={"PYTHONPATH": str(ROOT)})
    assert done.wait() == 0, done.output + done.errors
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    ways = [(row["way"], row["streams"]) for row in found]
    assert ways == [("eager", 1), ("static", 1), ("generate", 1), ("eager", 2), ("static", 2)]
    assert all(row["right"] and row["floor_ms"] > 0 and row["first_s"] > 0 for row in found)
