"""benchmarks/gpu.py meets a GPU rarely and briefly: here Triton interprets it, so that every path has run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Process

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("mode", ["measure", "tune"])
def test_the_gpu_benchmark_runs_to_its_end(tmp_path: Path, mode: str) -> None:
    options = ["--interpret", "--rounds", "1", "--output", str(tmp_path / "out.json")]
    options += ["--tune"] * (mode == "tune")
    done = Process("gpu", *options, folder=ROOT / "benchmarks", environment={"PYTHONPATH": str(ROOT)})
    assert done.wait() == 0, done.output + done.errors
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["triton"]
    if mode == "tune":
        assert {row["kernel"] for row in results["rows"]} == {"row", "sums", "gradient", "split"}
        return
    assert results["wrong"] == []
    assert not [row for row in results["rows"] if "failed" in row]
    from_logits = {"eager-authors", "eager-lean", "compile", "ours-fresh", "ours-inplace", "ours-one-pass"}
    assert {row["row"] for row in results["rows"]} == from_logits | {"ours-whole", "ours-linear"}


WITHOUT_EXTENSION = """
import sys
sys.modules["quark_fast._C"] = None
import torch
from quark_fast import quark_loss
logits = torch.zeros(1, 3, requires_grad=True)
out = quark_loss(logits, torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), impl="triton")
out.loss.backward()
print(logits.grad[0, 0].item() < 0)
"""


def test_triton_needs_no_c_extension() -> None:
    """A machine that is lent for minutes has torch and Triton, and no time to build."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_EXTENSION],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr
