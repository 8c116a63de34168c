"""Whole runs on a CUDA device without a GPU (stand_in_cuda.py), beside the same ones on the CPU.

    tests/stand_in_cuda.sh

builds the device and starts this. What mixes devices ends in an error there, and what uses unwritten memory
in NaN.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import save_tiny_classifier, save_tiny_model
from tiny_runs import PROMPTS, SHORT, even_words, rows, small

from quark_fast.model import fixed_step
from quark_fast.ops import loss as loss_module
from quark_fast.ops.linear import linear_quark_loss
from quark_fast.ops.loss import quark_loss
from quark_fast.rewards.classifier import SequenceClassifier
from quark_fast.rewards.judge import judge
from quark_fast.rollout import tokens
from quark_fast.rollout.tokens import NextToken, draw_by_equation
from quark_fast.training.objective import Objective
from quark_fast.training.trainer import Trainer

ON_THE_DEVICE = "STAND_IN_CUDA" in os.environ
if ON_THE_DEVICE:
    import stand_in_cuda  # noqa: F401

pytestmark = [
    pytest.mark.skipif(not ON_THE_DEVICE, reason="the device is built by stand_in_cuda.sh"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # of numpy, which interprets
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The equations in place of the kernels, whose interpreter takes minutes for a run."""
    monkeypatch.setattr(loss_module, "TRITON", False)
    monkeypatch.setattr(tokens, "TRITON", False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


def trainer(folder: Path, model: Path, **settings: Any) -> Trainer:
    config = small(folder, model, **(SHORT | settings))
    reward = None if config.reward else even_words
    return Trainer(config, reward=reward, prompts=PROMPTS, held_out=PROMPTS[:4], listen=None)


# ------------------------------------------------------------------------------- the device


def test_two_devices_in_an_operator_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"two devices in aten::mm.out: mat2 is on the CPU"):
        torch.ones(3, 3, device="cuda") @ torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"at least two devices"):  # torch's own check, of this one
        torch.ones(3, device="cuda") + torch.ones(3)
    assert (torch.ones(3, device="cuda") + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_a_generator_draws_on_its_device_alone() -> None:
    with pytest.raises(AssertionError, match="a generator of cpu draws on cuda"):
        torch.rand(3, generator=torch.Generator(), device="cuda")


def test_unwritten_memory_is_nan() -> None:
    assert torch.empty(100, device="cuda").isnan().all()


@pytest.mark.parametrize("step", [lambda x: x * float(x.sum()), lambda x: x.cpu().cuda()])
def test_a_recorded_step_neither_reads_nor_copies(step: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(AssertionError, match="a recorded step"):
        fixed_step.cuda_graph(lambda: step(x), x.device)


# ------------------------------------------------------------------------------- the kernels


def error(of: torch.Tensor, exact: torch.Tensor) -> float:
    return float((of.cpu().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_of_tensors_on_the_device(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    z, r = ((2 * torch.randn(3, 1003)).to(dtype) for _ in range(2))
    labels, mask = torch.randint(0, 1003, (3,)), torch.tensor([1.0, 1.0, 0.0])
    leaf = z.cuda().requires_grad_()
    out = quark_loss(leaf * 1, r.cuda(), labels.cuda(), mask.cuda(), inplace=True)
    (3 * out.loss).backward()
    exact = z.double().requires_grad_()
    (3 * quark_loss(exact, r.double(), labels, mask, impl="eager").loss).backward()
    assert leaf.grad is not None and exact.grad is not None and leaf.grad.is_cuda
    assert error(leaf.grad, exact.grad) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_linear_loss_of_tensors_on_the_device(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(1)
    own = torch.float32 if autocast else dtype
    given = [torch.randn(*shape).to(own) for shape in ((4, 3, 16), (1003, 16), (1003,))]
    ref = [torch.randn(*shape).to(dtype) for shape in ((4, 3, 16), (1003, 16))]
    labels, mask = (
        torch.randint(0, 1003, (4, 3)),
        (torch.arange(3) < torch.tensor([[3], [2], [1], [0]])).float(),
    )
    h, w, b = (x.cuda().requires_grad_() for x in given)
    with torch.autocast("cuda", dtype, enabled=autocast and dtype != torch.float32):
        at = (labels.cuda(), mask.cuda())
        out = linear_quark_loss(h, w, *(x.cuda() for x in ref), *at, bias=b, lengths=[3, 2, 1, 0])
    (3 * out.loss).backward()
    H, W, B = (x.double().requires_grad_() for x in given)
    ref_logits = ref[0].double() @ ref[1].double().t()
    (3 * quark_loss(H @ W.t() + B, ref_logits, labels, mask, impl="eager").loss).backward()
    for found, exact in ((h, H), (w, W), (b, B)):
        assert found.grad is not None and exact.grad is not None and found.grad.is_cuda
        assert error(found.grad, exact.grad) < 3 * torch.finfo(dtype).eps


def test_a_guided_token_on_the_device() -> None:
    """From logits so peaked that every generator draws the same."""
    torch.manual_seed(1)
    logits = 100 * torch.randn(6, 1003)
    wanted = NextToken(torch.tensor([2.0, -1.0]), 1000, torch.tensor([3, 4]), 0.7, 0.9)
    there = NextToken(wanted.weights.cuda(), 1000, wanted.suppressed.cuda(), 0.7, 0.9)
    drawn = tokens.draw_tokens(logits.cuda(), there, torch.Generator("cuda").manual_seed(0))
    assert drawn.is_cuda
    assert drawn.tolist() == draw_by_equation(logits, wanted, torch.Generator().manual_seed(0)).tolist()


def test_a_run_by_the_kernels(model: Path, tmp_path: Path) -> None:
    few = {"steps": 1, "initial_samples": 1, "max_new_tokens": 4, "batch_size": 4, "eval": False}
    trainer(tmp_path / "run", model, lora_rank=4, precision="bf16", micro_batch=4, **few).train()
    (step,) = rows(tmp_path / "run" / "metrics.jsonl", kind="step")
    assert math.isfinite(step["loss"]) and step["kl"] < 0.01


# ------------------------------------------------------------------------------- beside the CPU

SAME = {"precision": "fp32", "rounds": 2, "steps": 4, "micro_batch": 4, "eval_rows": "all"}
RUNS: dict[str, dict[str, Any]] = {
    "all weights, every term": {"unlikelihood_coef": 0.3, "prompt_kl_coef": 0.1},
    "adapters": {"lora_rank": 4},
    "whole logits": {},
    "fixed steps": {"decoding": "graph" if ON_THE_DEVICE else "static"},
}


def run(name: str, folder: Path, model: Path) -> None:
    made = trainer(folder, model, **SAME, **RUNS[name])
    if name == "whole logits":
        made.setup.objective.heads = None
    made.train()


@pytest.fixture(scope="module")
def on_the_cpu(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs' folders, made by a process that knows no device."""
    folder = tmp_path_factory.mktemp("cpu")
    own = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "STAND_IN_CUDA")}
    done = subprocess.run([sys.executable, __file__, model, folder], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def measured(folder: Path) -> dict[str, float]:
    """Everything that a run measured, but the time."""
    found = {}
    for number, row in enumerate(rows(folder / "metrics.jsonl")):
        numbers = {
            k: v for k, v in row.items() if isinstance(v, float) and k not in ("seconds", "tokens_per_s")
        }
        found |= {f"{name}, row {number}": value for name, value in numbers.items()}
    for row in json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]:
        found |= {f"{name} of {row['name']}": of["value"] for name, of in row["metrics"].items()}
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_measures_what_it_does_on_the_cpu(
    name: str, model: Path, on_the_cpu: Path, tmp_path: Path, in_pytorch: None
) -> None:
    run(name, tmp_path / name, model)
    here, there = measured(tmp_path / name), measured(on_the_cpu / name)
    assert here == pytest.approx(there, rel=2e-3, abs=2e-4, nan_ok=True)


# ------------------------------------------------------------------------------- what else happens to runs


def test_a_stopped_run_goes_on(model: Path, tmp_path: Path, in_pytorch: None) -> None:
    def new(**more: Any) -> Trainer:
        settings = {"lora_rank": 4, "export_adapter": True, "precision": "bf16", "micro_batch": 4}
        return trainer(tmp_path / "run", model, **(settings | more))

    stopped, done = new(), []
    step = stopped.learner.step

    def until(*given: Any) -> Any:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(*given)

    stopped.learner.step = until  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    new(resume=True).train()
    assert len(rows(tmp_path / "run" / "metrics.jsonl", kind="step")) == SHORT["steps"]


def test_a_step_that_lacks_memory_is_halved(
    model: Path, tmp_path: Path, in_pytorch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Objective.__call__

    def lacking(self: Objective, prompts: Any, *rest: Any) -> Any:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(self, prompts, *rest)

    monkeypatch.setattr(Objective, "__call__", lacking)
    trainer(tmp_path / "run", model, micro_batch=4).train()
    assert len(rows(tmp_path / "run" / "metrics.jsonl", kind="step")) == SHORT["steps"]


def test_the_commands_on_the_device(model: Path, tmp_path: Path, in_pytorch: None) -> None:
    def said(name: str, *arguments: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as heard:
            assert not importlib.import_module(f"quark_fast.{name}").main(arguments)
        return heard.getvalue()

    trainer(tmp_path / "run", model, reward="tiny_runs:even_words").train()
    assert "w" in said("generate", str(tmp_path / "run"), "w1 w2", "--samples", "2", "--guidance", "2")
    assert "best token" in said("evaluate", str(tmp_path / "run"), "--guidance", "2")


def test_scorers_on_the_device(tmp_path: Path) -> None:
    texts = ["w1 w2", "w3 w4 w5"]
    scorer = SequenceClassifier(str(save_tiny_classifier(tmp_path / "classifier")), "rude", device="cuda")
    assert all(0 <= score <= 1 for score in scorer(texts, texts))
    of = judge("toxicity", "toxicity")
    good, bad = of([{"prompt": "a"}] * 2, ["What a lovely day", "You are awful and stupid"])
    assert good > bad


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks ask of CUDA to time its kernels."""

    class Event:
        def __init__(self, **_: Any) -> None: ...

        def record(self, *_: Any) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, later: Event) -> float:
            return 1e3 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)


def test_a_training_step_beside_the_eager_loop(
    from_benchmarks: Callable[[str], ModuleType], clock: None, in_pytorch: None
) -> None:
    step = from_benchmarks("training_step")
    found = step.measure_step(step.TINY, "cuda", 1, lambda work: (work(), 0)[1], 100.0)
    assert found


def test_decoding_in_all_ways_draws_what_it_should(
    from_benchmarks: Callable[[str], ModuleType],
    clock: None,
    in_pytorch: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoding = from_benchmarks("gpu_decoding")
    model = decoding.LlamaForCausalLM(decoding.LlamaConfig(**decoding.TINY)).to(torch.bfloat16)
    model = decoding.frozen(model, torch.device("cuda"))
    generate = decoding.generate
    monkeypatch.setattr(decoding, "generate", lambda m, c, t, cache: generate(m, c, t, None))  # not compiled
    monkeypatch.setattr(decoding, "bytes_per_second", lambda device: 1e12)
    asked = Namespace(rows=4, prompt=5, tokens=6, rounds=1, tiny=False)
    rows = [row for streams in (1, 2) for row in decoding.measure(model, asked, streams)]
    assert {row["way"] for row in rows} >= {"eager", "static", "graph"}
    assert all(row.get("right", True) for row in rows)


if __name__ == "__main__":
    for which in RUNS:
        run(which, Path(sys.argv[2]) / which, Path(sys.argv[1]))
