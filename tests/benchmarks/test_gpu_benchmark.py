"""benchmarks/gpu.py meets a GPU rarely and briefly: here Triton interprets it, so that every path has run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from warm import Process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library_losses(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("library_losses")


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("mode", ["measure", "tune", "edges"])
def test_the_gpu_benchmark_runs_to_its_end(tmp_path: Path, mode: str, library_losses: ModuleType) -> None:
    options = ["--interpret", "--rounds", "1", "--output", str(tmp_path / "out.json")]
    options += [f"--{mode}"] * (mode != "measure")
    done = Process("gpu", *options, folder=ROOT / "benchmarks", environment={"PYTHONPATH": str(ROOT)})
    assert done.wait() == 0, done.output + done.errors
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["triton"]
    if mode == "tune":
        assert {row["kernel"] for row in results["rows"]} == {"row", "sums", "gradient", "split"}
        return
    assert results["wrong"] == []
    if mode == "edges":
        assert "edges: all right" in done.output
        return
    rows = results["rows"]
    assert not [row for row in rows if "failed" in row]
    timed = {row["row"] for row in rows if "us" in row}
    ours = {"eager-authors", "eager-lean", "compile", "ours-fresh", "ours-inplace", "ours-one-pass"}
    ours |= {"ours-whole", "ours-linear", "ours-step", "authors"}
    assert timed >= ours | {"torch-linear"}
    # Every other library is there, or the table says why not.
    left_out = {row["row"]: row["left_out"] for row in rows if "left_out" in row}
    assert timed | left_out.keys() == ours | {*library_losses.FROM_LOGITS, *library_losses.FROM_HIDDEN}
    assert left_out["quack"] == left_out["quack-linear"] == "it runs on a GPU alone"
    assert {row["row"]: row["lacks"] for row in rows if "us" in row}["torch-linear"] == ["KL", "H"]
    assert "no KL, no H" in done.output
    # The authors' loop and ours compute the same: from the same weights, the same loss and gradient.
    (step,) = [row for row in rows if row["row"] == "ours-step"]
    assert step["right"] and 0 < step["error"] < 1e-4


WITHOUT_EXTENSION = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "quark_fast"]:
    del sys.modules[name]
sys.modules["quark_fast._C"] = None
import torch
from quark_fast import quark_loss
logits = torch.zeros(1, 3, requires_grad=True)
out = quark_loss(logits, torch.zeros(1, 3), torch.zeros(1, dtype=torch.long), impl="triton")
out.loss.backward()
print(logits.grad[0, 0].item() < 0)
"""


def test_triton_needs_no_c_extension(tmp_path: Path) -> None:
    """A machine that is lent for minutes has torch and Triton, and no time to build."""
    (tmp_path / "without_extension.py").write_text(WITHOUT_EXTENSION)
    done = Process("without_extension", folder=tmp_path, environment={"TRITON_INTERPRET": "1"})
    assert done.wait() == 0, done.errors
    assert done.output == "True\n", done.errors


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("name", ["torch-linear", "trl-nll-H", "trl-divergence", "trl"])
@pytest.mark.filterwarnings("ignore")  # at the libraries' import
def test_a_library_is_compared_with_eager_before_it_is_timed(
    library_losses: ModuleType, name: str, kl: str
) -> None:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    library = library_losses.FROM_HIDDEN[name]
    assert library_losses.check(name, "cpu", kl) is None
    # Fewer or other terms than the row says would be compared as if they were the same work.
    others = [["nll"], ["KL"], ["nll", "H"], ["nll", "KL", "H"]]
    for terms in others:
        if terms != list(library.terms):
            why = library_losses._wrong(name, library._replace(terms=terms), "cpu", kl)
            assert why is not None and why.startswith(f"not {' + '.join(terms)}"), (terms, why)
    if "KL" in library.terms:
        turned = {"policy_ref": 0.0, "ref_policy": 1.0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library_losses, "_divergence_end", turned.__getitem__)
            assert library_losses._wrong(name, library, "cpu", kl) is not None, "the other direction"


def test_a_library_that_is_not_installed_says_what_to_install(library_losses: ModuleType) -> None:
    def load() -> None:
        raise ImportError("No module named 'liger_kernel'")

    library = library_losses.Library("liger-kernel", load, ["nll"])
    why = library_losses._not_here(library, "cpu", False)
    assert why == "pip install 'liger-kernel' (No module named 'liger_kernel')"
    kernel = library._replace(needs="Triton")
    assert library_losses._not_here(kernel, "cpu", False) == "its Triton kernels run on a GPU alone"
    assert library_losses._not_here(kernel, "cuda", False) == why
