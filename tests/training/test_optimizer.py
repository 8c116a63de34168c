"""8-bit AdamW: what has how many bits, that a killed run loses none of them, and what it cannot run on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS, SHORT, even_words, rows, small, timeless
from torch import Tensor
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM
from warm import START_METHOD, Process

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.model.lora import Lora
from quark_fast.model.policy import Policy
from quark_fast.training import optimizer as optimizers
from quark_fast.training.learn import Learner
from quark_fast.training.optimizer import (
    check_optimizer,
    load_state,
    make_optimizer,
    state_tensors,
    trained_parameters,
)
from quark_fast.training.trainer import Trainer

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
EIGHT = Config(optimizer="adamw-8bit", learning_rate=1e-3, reward_token_lr=1e-2)
GIVEN: dict[str, Any] = {"prompts": PROMPTS, "held_out": PROMPTS[:4]}
DIES, EVERY, STEPS = 6, 2, 8  # killed before step 6 + 1, between the checkpoints of steps 6 and 8
HANGS = 300  # seconds that are too many on any machine


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights mostly have the 4096 numbers of 8 bits, which ``tiny_model`` has nowhere."""
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "model", "llama", width=64, padded_vocabulary=10)


@pytest.fixture(scope="module")
def wide_in_bf16(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16, beside whose weights adapters are trained in float32."""
    folder = shutil.copytree(wide, tmp_path_factory.mktemp("wide") / "bf16")
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def policy_of(model: Path, **how: Any) -> Policy:
    return Policy.create(model, **{"quantiles": 80} | how)


def steps(optimizer: Any, parameters: list[Tensor], count: int, seed: int = 0) -> None:
    """Steps by the same random gradients, whose sizes differ from number to number and from step to step."""
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.rand(p.shape, generator=generator) for p in parameters]
    for _ in range(count):
        for parameter, scale in zip(parameters, scales, strict=True):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = ((noise + 0.5) * scale).to(parameter.dtype)
        optimizer.step()


def test_default_is_pytorchs_adamw_with_a_rate_for_each_group(wide: Path) -> None:
    policy = policy_of(wide)
    made = make_optimizer(Config(learning_rate=1e-3), policy)
    assert type(made) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], g["fused"]) for g in made.param_groups] == [
        (1e-3, 0.0, True),
        (1e-2, 0.0, True),
    ]
    steps(made, trained_parameters(policy.model), 1)
    plain = made.state_dict()["state"]
    assert {name: value.dtype for name, value in state_tensors(made)} == {
        f"{index}.{name}": torch.float32 for index in plain for name in ("step", "exp_avg", "exp_avg_sq")
    }


# --- what is refused before a model is loaded -----------------------------------------------------


def test_missing_package_is_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    config = small(tmp_path / "run", tmp_path / "no such model", optimizer="adamw-8bit")
    with pytest.raises(UsageError, match=r"optimizer = adamw-8bit .*pip install 'bitsandbytes>=0.50'"):
        Trainer(config, reward=even_words, **GIVEN)
    assert not (tmp_path / "run").exists()


@needs_bitsandbytes
def test_device_on_which_it_makes_no_step_is_refused() -> None:
    check_optimizer("adamw-8bit", torch.device("cpu"))
    with pytest.raises(UsageError, match=r"optimizer = adamw-8bit: .* makes no step on meta .* give adamw"):
        check_optimizer("adamw-8bit", torch.device("meta"))


@needs_bitsandbytes
def test_wrong_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    with pytest.raises(UsageError, match=r"moves weights by 0, not by -1; .* or give adamw"):
        check_optimizer("adamw-8bit", torch.device("cpu"))


# --- what has how many bits -----------------------------------------------------------------------


@needs_bitsandbytes
def test_rows_tables_and_small_parameters_stay_in_32_bits_and_the_bytes_are_those_of_the_arithmetic(
    wide: Path, step_bytes: ModuleType
) -> None:
    policy = policy_of(wide)
    made, parameters = make_optimizer(EIGHT, policy), trained_parameters(policy.model)
    steps(made, parameters, 1)
    names = {id(p): name for name, p in policy.model.named_parameters()}
    bits = {names[id(p)]: made.state[p]["state1"].dtype.itemsize * 8 for p in parameters}
    embedding = policy.model.get_input_embeddings()
    rows_, table = names[id(embedding.rows)], names[id(embedding.base.weight)]
    assert embedding.rows.numel() >= optimizers.LEAST_IN_8_BITS, "else they were in 32 bits in any case"
    assert embedding.base.weight.numel() >= optimizers.LEAST_IN_8_BITS
    assert bits[rows_] == bits[table] == 32
    others = {names[id(p)]: p.numel() for p in parameters} | {rows_: 0, table: 0}
    assert {name for name, count in others.items() if count >= 4096} == {
        name for name, found in bits.items() if found == 8
    }
    assert bits["lm_head.weight"] == 8 and bits["model.norm.weight"] == 32
    small_ = [p for p in parameters if p.numel() < 4096]
    every = sum(p.numel() for p in policy.model.parameters())
    large = every - sum(p.numel() for p in [*small_, embedding.rows])
    held = sum(
        value.nbytes
        for p in parameters
        if p is not embedding.rows and p.numel() >= 4096
        for name, value in made.state[p].items()
        if isinstance(value, Tensor) and name not in optimizers.TABLES
    )
    shape = dataclasses.replace(step_bytes.TrainedShape.of(policy.model.config), parameters=large)
    assert held == step_bytes.optimizer_bytes(shape, 0, "adamw-8bit")


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_adapters_have_the_bytes_of_the_arithmetic_beside_weights_of_any_dtype(
    wide: Path, wide_in_bf16: Path, dtype: torch.dtype, step_bytes: ModuleType
) -> None:
    rank = 64
    model = wide_in_bf16 if dtype == torch.bfloat16 else wide
    policy = policy_of(model, lora=Lora(rank, 64), low=dtype)
    adapters = trained_parameters(policy.model)[:-1]
    assert {p.dtype for p in adapters} == {torch.float32}
    made = make_optimizer(EIGHT, policy)
    steps(made, trained_parameters(policy.model), 1)
    shape = step_bytes.TrainedShape.of(policy.model.config)
    held = sum(
        made.state[p][name].nbytes
        for p in adapters
        for name in ("state1", "state2", "absmax1", "absmax2")
        if name in made.state[p]
    )
    # Key and value are half as wide as the queries: their second matrices, 64 x 32, stay in 32 bits.
    few = [p for p in adapters if p.numel() < 4096]
    assert sum(made.state[p]["state1"].dtype == torch.float32 for p in adapters) == len(few) == 4
    in_32_bits = sum(p.numel() for p in few)
    more = in_32_bits * 8 - in_32_bits * 65 // 32
    assert held == step_bytes.optimizer_bytes(shape, rank, "adamw-8bit") + more


@needs_bitsandbytes
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.1), (torch.bfloat16, 0.2)])
def test_weights_move_as_by_pytorchs_adamw(wide: Path, dtype: torch.dtype, bound: float) -> None:
    moved = []
    for config in (Config(learning_rate=1e-3), EIGHT):
        policy = policy_of(wide)
        policy.model.to(dtype)
        parameters = trained_parameters(policy.model)
        before = [p.detach().clone() for p in parameters]
        steps(make_optimizer(config, policy), parameters, 20)
        moved.append([p.detach().float() - b.float() for p, b in zip(parameters, before, strict=True)])
    for ours, theirs in zip(*moved, strict=True):
        assert float((ours - theirs).norm()) <= bound * float(theirs.norm())  # norms of bf16 do not move


# --- state, saved and restored --------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_makes_the_same_steps_to_the_last_bit(
    tmp_path: Path, wide: Path, dtype: torch.dtype
) -> None:
    def begun() -> tuple[Any, list[Tensor]]:
        policy = policy_of(wide)
        policy.model.to(dtype)
        return make_optimizer(EIGHT, policy), trained_parameters(policy.model)

    first, weights = begun()
    steps(first, weights, 3)
    save_file(dict(state_tensors(first)), tmp_path / "state.safetensors")
    kept = [p.detach().clone() for p in weights]
    steps(first, weights, 2, seed=1)
    for restored in (True, False):
        second, others = begun()
        with torch.no_grad():
            for other, own in zip(others, kept, strict=True):
                other.copy_(own)
        if restored:
            load_state(second, load_file(tmp_path / "state.safetensors").items())
        steps(second, others, 2, seed=1)
        same = [torch.equal(a, b) for a, b in zip(weights, others, strict=True)]
        assert all(same) if restored else not all(same)


@needs_bitsandbytes
@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"1.absmax1": state["1.absmax1"][:-1]},
        lambda state: state | {"1.qmap1": state["1.qmap1"][:9]},
        lambda state: state | {"1.state2": state["1.state2"].float()},
        lambda state: state | {"1.step": torch.tensor(3.0)},
        lambda state: {k: v for k, v in state.items() if k != "1.state1"},
        lambda state: state | {"99.step": torch.tensor(3)},
    ],
)
def test_state_of_wrong_sizes_which_kernels_would_read_past_is_refused(
    wide: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    policy = policy_of(wide)
    made = make_optimizer(EIGHT, policy)
    steps(made, trained_parameters(policy.model), 1)
    whole = dict(state_tensors(made))
    assert whole["1.state1"].dtype == torch.uint8
    load_state(make_optimizer(EIGHT, policy), whole.items())
    with pytest.raises((ValueError, LookupError)):
        load_state(make_optimizer(EIGHT, policy), change(whole).items())


# A program in the folder of a test: the run of --config or --resume, killed before a step, or forgetful.
PROGRAM = """
import os, signal, sys
import torch
from quark_fast.train import main
from quark_fast.training import checkpoint
from quark_fast.training.learn import Learner

torch.set_num_threads(1)
own, dies, forgets = Learner.step, int(os.environ.get("DIES", "-1")), "FORGETS" in os.environ

def step(self, state, *given):
    if state.step == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(self, state, *given)

Learner.step = step
if forgets:
    checkpoint.load_state = lambda *_: None
sys.exit(main())
"""


@needs_bitsandbytes
@pytest.mark.parametrize(("precision", "rank"), [("fp32", 0), ("fp16", 0), ("bf16", 64)])
def test_run_killed_between_steps_ends_as_the_undisturbed_one_and_without_its_state_does_not(
    tmp_path: Path, wide: Path, wide_in_bf16: Path, precision: str, rank: int
) -> None:
    model = wide_in_bf16 if precision == "bf16" else wide
    (tmp_path / "evens.py").write_text("from tiny_runs import even_words\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    from_file = {"reward": "evens:even_words", "prompts": str(tmp_path / "prompts.txt"), "held_out": "4"}
    learned = {"optimizer": "adamw-8bit", "precision": precision, "lora_rank": rank, "learning_rate": 1e-3}
    longer = {"steps": STEPS, "checkpoint_every": EVERY}

    def run(name: str, *flags: str, **environment: str) -> Process:
        process = Process("program", *flags, folder=tmp_path, environment=environment)
        process.wait()
        return process

    for name in ("undisturbed", "killed"):
        config = small(tmp_path / name, model, **SHORT | from_file | learned | longer)
        config.save(tmp_path / f"{name}.yaml")
    done = run("undisturbed", "--config", str(tmp_path / "undisturbed.yaml"))
    assert done.poll() == 0, done.errors
    killed = run("killed", "--config", str(tmp_path / "killed.yaml"), DIES=str(DIES + 1))
    assert killed.poll() == -signal.SIGKILL, killed.errors
    made = rows(tmp_path / "killed" / "metrics.jsonl", kind="step")
    assert [row["step"] for row in made] == list(range(1, DIES + 2)), "one more than the checkpoint has"
    saved = json.loads((tmp_path / "killed" / "checkpoint" / "state.json").read_text())
    assert saved["step"] == DIES
    codes = load_file(tmp_path / "killed" / "checkpoint" / "optimizer.safetensors")
    assert sum(tensor.dtype == torch.uint8 for tensor in codes.values()) > 10, "moments in 8 bits"
    shutil.copytree(tmp_path / "killed", tmp_path / "forgetful")
    for name, environment in (("killed", {}), ("forgetful", {"FORGETS": "1"})):
        again = run(name, "--resume", "--output", str(tmp_path / name), **environment)
        assert again.poll() == 0, again.errors
    assert same_results(tmp_path / "killed", tmp_path / "undisturbed")
    assert not same_results(tmp_path / "forgetful", tmp_path / "undisturbed"), "the state says something"


def same_results(one: Path, other: Path) -> bool:
    """Every step, sample and weight, to the last bit."""
    files = ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl")
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (one, other)]
    return all(timeless(one / name) == timeless(other / name) for name in files) and (
        weights[0] == weights[1]
    )


@needs_bitsandbytes
def test_another_optimizer_at_a_resume_is_refused(tmp_path: Path, wide: Path) -> None:
    small(tmp_path / "run", wide).save(tmp_path / "saved.yaml")
    saved = small(tmp_path / "run", wide)
    with pytest.raises(UsageError, match="optimizer = 'adamw-8bit', but the run to resume has 'adamw'"):
        small(tmp_path / "run", wide, optimizer="adamw-8bit", resume=True).check_resumes(saved)


# --- two processes --------------------------------------------------------------------------------


def of_two(index: int, port: int, config: Config, dies: int) -> None:
    """One of two processes of a run; with ``dies`` it is killed before the step after that."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # pytest makes errors of those of torch's wrappers
    AcceleratorState._reset_state(reset_partial_state=True)
    alike = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in alike.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    own = Learner.step

    def step(self: Learner, state: Any, *given: Any) -> dict[str, Any]:
        if state.step == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, state, *given)

    Learner.step = step  # type: ignore[method-assign]
    trainer = Trainer(config, reward=even_words, listen=None, **GIVEN)
    trainer.train()
    weights = {name: p.detach() for name, p in trainer.policy.model.named_parameters()}
    save_file(weights, f"{config.output}-{index}.safetensors")
    torch.distributed.destroy_process_group()


def on_two(config: Config, dies: int = -1) -> list[int | None]:
    """Exit status of each of two processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = start_processes(of_two, (port, config, dies), 2, join=False, start_method=START_METHOD)
    try:
        for process in pair.processes:
            process.join(timeout=HANGS)
    finally:
        for process in pair.processes:
            process.kill()
    return [process.exitcode for process in pair.processes]


@needs_bitsandbytes
def test_two_processes_stay_alike_and_go_on_from_a_kill_to_the_last_bit(tmp_path: Path, wide: Path) -> None:
    def config(name: str, **changed: Any) -> Config:
        learned = {"optimizer": "adamw-8bit", "learning_rate": 1e-3, "steps": STEPS}
        return small(tmp_path / name, wide, **SHORT | learned | {"checkpoint_every": EVERY} | changed)

    Trainer(config("one"), reward=even_words, **GIVEN).train()
    assert on_two(config("two")) == [0, 0]
    assert on_two(config("killed"), dies=DIES + 1) == [-signal.SIGKILL, -signal.SIGKILL]
    assert on_two(config("killed", resume=True)) == [0, 0]
    ranks = [load_file(tmp_path / f"two-{index}.safetensors") for index in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    assert same_results(tmp_path / "killed", tmp_path / "two")
    # A sum in another order may end in another code: nearer than float32 alone cannot be had.
    one, two = (rows(tmp_path / name / "metrics.jsonl", kind="step") for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-3)
