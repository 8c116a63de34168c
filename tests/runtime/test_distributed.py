"""The same run on two processes: DDP and FSDP2 with gloo on the CPU, against one process."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import save_tiny_model, sharpen
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM
from vllm_server import VllmServer
from warm import START_METHOD, Process

from quark_fast.ablation.grid import run_grid
from quark_fast.config import Config
from quark_fast.errors import Interrupted, OtherProcessFailed, UsageError
from quark_fast.files.locks import unlock
from quark_fast.model.check_model import Checked, check_model
from quark_fast.model.lora import has_adapters
from quark_fast.model.policy import Policy
from quark_fast.rollout.vllm import launch_folder
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.run_folder import LOCK, ROLLOUT
from quark_fast.training import checkpoint, start
from quark_fast.training.learn import Learner
from quark_fast.training.objective import Objective
from quark_fast.training.progress import Progress
from quark_fast.training.state import State
from quark_fast.training.trainer import Trainer

PROMPTS = [f"w{i} w{j}" + " w5" * (i % 3) for i in range(5) for j in range(12, 15)]
HANGS = 300  # seconds that are too many on any machine
STOP_AT = 7  # steps; in the second round, between two checkpoints
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# Whole tables are compared of the plain runs, "one" and its like; these tables have two rows.
ADAPTERS: dict[str, Any] = {"rounds": 1, "lora_rank": 2, "eval_rows": "best"}
# The second round lowers it.
COMPARED: dict[str, Any] = {"keep_best": "perplexity:max", "eval_rows": "best"}
EIGHT_BIT = {"optimizer": "adamw-8bit"}
SERVED: dict[str, Any] = {"rollout": "vllm", "guidance": 1.0, "initial_samples": 2, "explore_samples": 2}
SERVED |= {"eval_rows": "best"}
GRID: dict[str, Any] = {"steps": 1, "initial_samples": 2, "explore_samples": 1, "eval_rows": "best"}


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Many ties, some unscored, and no two processes see the same."""
    return [None if "w7 " in text else text.count("2") + 0.25 * text.count("4") for text in completions]


def settings(root: Path, name: str, **changed: Any) -> Config:
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "output": str(root / name),
        "quantiles": 3,
        "initial_samples": 4,
        "explore_samples": 4,
        "sample_batch": 12,  # 5 batches a round: an odd number
        "rounds": 2,
        "steps": 5,
        "batch_size": 8,
        "micro_batch": 3,  # of 4 samples on each of two processes: two micro-batches, of 3 and 1
        "max_new_tokens": 6,
        "entropy_coef": 0.1,
        "unlikelihood_coef": 0.5,
        "unlikelihood_ngram": 1,
        "lora_rank": 0,  # FSDP2 and DeepSpeed have none
        "learning_rate": 3e-3,
        "eval_samples": 2,
        "eval_guidance": "1.5",
        "precision": "fp32",
        "threads": 1,
        "checkpoint_every": 4,
    }
    return Config(**(values | changed))


# A run in which the loss of a step is infinite and memory holds fewer samples than --micro-batch.
HARD: dict[str, Any] = {"rounds": 1, "kl_coef": 0.5, "kl_target": 0.02, "kl_horizon": 40, "batch_size": 12}
HARD |= {"eval_rows": "best"}
SPOILED, FITTING = 3, 2  # the step, the samples


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def trouble(*, memory: bool, loss: bool) -> Iterator[None]:
    """Which of these this very process has."""
    objective, step = Objective.__call__, Learner.step
    at = [0]

    def noted(self: Learner, state: State, *given: Any) -> dict[str, Any]:
        at[0] = state.step + 1
        return step(self, state, *given)

    def troubled(self: Objective, prompts: Any, *given: Any) -> Any:
        if memory and len(prompts) > FITTING:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        value, terms = objective(self, prompts, *given)
        if loss and at[0] == SPOILED:
            value = value * math.inf
            terms["kl"] = terms["loss"] = torch.tensor(math.inf), 1.0
        return value, terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", noted)
        patch.setattr(Objective, "__call__", troubled)
        yield


def train(config: Config, stop: bool = False) -> Trainer:
    """Run to the end, or until this very process is asked to stop."""

    def listen(progress: Progress) -> None:
        if stop and progress.stage == "round 2/2: learning" and progress.done == STOP_AT - config.steps:
            os.kill(os.getpid(), signal.SIGTERM)
        if progress.stage == "waiting for the vLLM server":
            port = urlsplit(config.vllm_server or "").port or 0
            servers.callback(VllmServer(launch_folder(config.output_folder / ROLLOUT), port=port).close)

    trainer = Trainer(config, reward=reward, prompts=PROMPTS, held_out=PROMPTS[:5], listen=listen)
    with contextlib.ExitStack() as servers:
        trainer.train()
    return trainer


def train_grid(folder: Path) -> list[str]:
    """Two points; what was said of them."""
    said: list[str] = []
    given = {"reward": reward, "prompts": PROMPTS, "held_out": PROMPTS[:5], "listen": None}
    run_grid(settings(folder.parent, folder.name, **GRID), ["tokens"], [0], note=said.append, **given)
    return said


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def check_once() -> Callable[..., Checked]:
    """The check of a model, on two processes in any case, but of each kind of copy only in its first run."""
    found: dict[tuple[bool, ...], Checked] = {}

    def check(policy: Policy, *given: Any, **how: Any) -> Checked:
        engines = (f"ACCELERATE_USE_{engine}" in os.environ for engine in ("FSDP", "DEEPSPEED"))
        kind = (*engines, has_adapters(policy.model))
        if kind not in found:
            found[kind] = check_model(policy, *given, **how)
        return found[kind]

    return check


def work(index: int, root: Path, port: int, url: str) -> None:
    """All that is done on two processes, in one pair of them: starting one takes longest."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # pytest makes errors of those of torch's wrappers
    AcceleratorState._reset_state(reset_partial_state=True)
    start.check_model = check_once()
    alike = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in alike.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    heard: dict[str, str] = {}

    def attempt(name: str, config: Config, **how: Any) -> None:
        try:
            train(config, **how)
        except (UsageError, Interrupted, OtherProcessFailed) as error:
            heard[name] = f"{type(error).__name__}: {error}"
        AcceleratorState._reset_state(reset_partial_state=True)

    attempt("indivisible", settings(root, "indivisible", batch_size=7))
    attempt("two", settings(root, "two"))
    attempt("stopped", settings(root, "stopped-on-two"), stop=index == 1)
    attempt("resumed", settings(root, "stopped-on-one", resume=True))
    with trouble(memory=index == 1, loss=index == 0):
        attempt("hard", settings(root, "hard", **HARD))
    with trouble(memory=False, loss=True):
        attempt("diverged", settings(root, "diverged", **HARD, max_bad_steps=1))
    attempt("adapters", settings(root, "adapters", **ADAPTERS, gradient_checkpointing=True))
    attempt("compared", settings(root, "compared", **COMPARED))
    attempt("beyond", settings(root, "beyond", keep_best="reward:max, perplexity<=0.01", rounds=1))
    heard["grid"] = "; ".join(train_grid(root / "grid"))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", no_space)
        attempt("full", settings(root, "full"))

    # accelerate shards on devices other than the CPU alone, though FSDP2 itself does not mind: it is told
    # that these processes have GPUs once it has made their gloo group.
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}

    def attempt_sharded(name: str, config: Config, **how: Any) -> None:
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        attempt(name, config, **how)

    sharded: list[bool] = []
    write_start = Trainer._write_start

    def look(self: Trainer) -> None:
        write_start(self)
        sharded.append(all(isinstance(p, DTensor) for p in self.policy.model.parameters()))

    Trainer._write_start = look  # type: ignore[method-assign]
    attempt_sharded("sharded", settings(root, "sharded", gradient_checkpointing=True))
    attempt_sharded("sharded, compared", settings(root, "sharded-compared", **COMPARED))
    attempt_sharded("sharded, stopped", settings(root, "sharded-stopped"), stop=index == 0)
    attempt_sharded("served", settings(root, "served", **SERVED, vllm_server=url))
    heard["all parameters sharded"] = str(sharded)

    del os.environ["ACCELERATE_USE_FSDP"]
    if DEEPSPEED:  # which accelerate takes to GPUs alone, too
        os.environ |= {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

        def attempt_zero(name: str, stage: int, config: Config, **how: Any) -> None:
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
            attempt_sharded(name, config, **how)

        attempt_zero("zero, stopped", 2, settings(root, "zero-2"), stop=index == 0)
        attempt_zero("zero, resumed", 1, settings(root, "zero-1", resume=True, gradient_checkpointing=True))
        with trouble(memory=False, loss=index == 0):
            attempt_zero("zero, hard", 2, settings(root, "zero-hard", **HARD))
    (root / f"heard-{index}.json").write_text(json.dumps(heard))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all tests: on one process, on two, and begun on one and ended on the other."""
    root = tmp_path_factory.mktemp("distributed")
    save_tiny_model(root / "model", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    sharpen(model)
    model.save_pretrained(root / "model")
    train(settings(root, "one"))
    with pytest.raises(Interrupted):
        train(settings(root, "stopped-on-one"), stop=True)
    unlock(root / "stopped-on-one" / LOCK)  # which would otherwise be this process's for its life
    shutil.copytree(root / "stopped-on-one", root / "zero-1")
    with trouble(memory=False, loss=True):
        train(settings(root, "hard-on-one", **HARD))
    train(settings(root, "adapters-on-one", **ADAPTERS))
    train(settings(root, "compared-on-one", **COMPARED))
    train_grid(root / "grid-on-one")
    url = f"http://127.0.0.1:{free_port()}"
    train(settings(root, "served-on-one", **SERVED, vllm_server=url))
    pair = start_processes(work, (root, free_port(), url), 2, join=False, start_method=START_METHOD)
    try:
        assert pair.join(timeout=HANGS) or pair.join(timeout=HANGS), "a process waits for what never comes"
    finally:
        for process in pair.processes:
            process.kill()
    train(settings(root, "stopped-on-two", resume=True))
    train(settings(root, "sharded-stopped", resume=True))
    if DEEPSPEED:
        train(settings(root, "zero-2", resume=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    return root


def test_lack_of_memory_and_a_bad_loss_of_one_process_are_all_processes(root: Path) -> None:
    assert "hard" not in heard(root, 0) | heard(root, 1)
    found = rows(root / "hard" / "metrics.jsonl")
    assert [row["micro_batch"] for row in found if row["kind"] == "micro_batch"] == [FITTING]
    steps = [row for row in found if row["kind"] == "step"]
    assert [row.get("skipped_for") for row in steps] == [None, None, "kl", None, None]
    assert len({row["kl_coef"] for row in steps}) == 4, "the step that was skipped adapts nothing"
    assert_same_run(root / "hard-on-one", root / "hard", without="micro_batch")


def test_diverged_run_ends_on_all_processes_with_one_message(root: Path) -> None:
    assert heard(root, 0)["diverged"].startswith("Diverged: steps 3 to 3 had no finite kl and were skipped;")
    assert heard(root, 1)["diverged"].startswith("OtherProcessFailed: process 0 failed: steps 3 to 3")


def test_full_disk_of_the_one_that_writes_ends_all_with_one_message(root: Path) -> None:
    assert heard(root, 0)["full"].startswith("OutOfResources: cannot write to the run folder")
    assert heard(root, 1)["full"].startswith("OtherProcessFailed: process 0 failed")


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize(
    ("one", "other"), [("one", "zero-1"), ("one", "zero-2"), ("hard-on-one", "zero-hard")]
)
def test_zero_computes_what_one_process_does_and_each_goes_on_with_the_others_checkpoint(
    root: Path, one: str, other: str
) -> None:
    assert not {"zero, resumed", "zero, hard"} & heard(root, 0).keys()
    assert heard(root, 0)["zero, stopped"].startswith("Interrupted: stopped in round 2")
    assert_same_run(root / one, root / other)


def accelerator(kind: DistributedType, **state: Any) -> Any:
    """What launchers leave for the checks."""
    return SimpleNamespace(distributed_type=kind, **{"is_fsdp2": True} | state)


def zero_plugin(stage: int, **config: Any) -> Any:
    """A DeepSpeed configuration as accelerate holds it."""
    given = {"zero_optimization": {"stage": stage}, **config}
    offloads = SimpleNamespace(is_offload=lambda: "offload" in config)
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=given, hf_ds_config=offloads)
    return SimpleNamespace(deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    ("launched", "changed", "message"),
    [
        (accelerator(DistributedType.FSDP, is_fsdp2=False), {}, "FSDP version 1 .*--fsdp_version 2"),
        (accelerator(DistributedType.FSDP), {"lora_rank": 4}, "lora_rank = 4 .* without --use_fsdp"),
        (accelerator(DistributedType.FSDP), {"precision": "fp16"}, "fp16 .* give bf16 or fp32"),
        (accelerator(DistributedType.DEEPSPEED, state=zero_plugin(3)), {}, "zero_stage = 3 .*--use_fsdp"),
        (accelerator(DistributedType.DEEPSPEED, state=zero_plugin(2, offload=1)), {}, "offload_optimizer"),
        (
            accelerator(DistributedType.DEEPSPEED, state=zero_plugin(2, optimizer={"type": "Adam"})),
            {},
            "its own optimizer; leave it out",
        ),
        (accelerator(DistributedType.DEEPSPEED, state=zero_plugin(2)), {"lora_rank": 4}, "lora_rank = 4"),
        (accelerator(DistributedType.DEEPSPEED, state=zero_plugin(2)), {"precision": "fp16"}, "fp16"),
        (accelerator(DistributedType.FSDP), EIGHT_BIT, "adamw-8bit .* give adamw.* without --use_fsdp"),
        (
            accelerator(DistributedType.DEEPSPEED, state=zero_plugin(1)),
            EIGHT_BIT,
            "adamw-8bit .* give adamw.* without --use_deepspeed",
        ),
    ],
)
def test_combination_that_cannot_work_is_refused_with_the_mend(
    tmp_path: Path, launched: Any, changed: dict[str, Any], message: str
) -> None:
    config = settings(tmp_path, "run", **changed)
    with pytest.raises(UsageError, match=message):
        Processes(2, 0).check(launched, config)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engine_asked_for_that_accelerate_would_leave_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    with pytest.raises(UsageError, match=f"--use_{engine} needs GPUs"):
        Processes(2, 0).check(accelerator(DistributedType.MULTI_CPU), settings(tmp_path, "run"))


def test_zero_configuration_that_states_what_the_run_does_is_taken(tmp_path: Path) -> None:
    state = zero_plugin(2, bf16={"enabled": False}, fp16={"enabled": False})
    Processes(2, 0).check(accelerator(DistributedType.DEEPSPEED, state=state), settings(tmp_path, "run"))


def test_lack_of_memory_that_sharded_processes_cannot_repair_is_told_with_the_mend() -> None:
    processes = Processes(2, 1)
    processes.sharded = True
    with pytest.raises(UsageError, match=r"process 1 .*2 GiB.*--resume and a smaller --micro-batch"):
        processes.lacked_memory("Tried to allocate 2 GiB")


def test_adapters_on_two_processes_are_those_of_one(root: Path) -> None:
    assert_same_run(root / "adapters-on-one", root / "adapters")


@pytest.mark.parametrize("name", ["compared", "sharded-compared"])
def test_processes_keep_the_round_that_one_keeps(root: Path, name: str) -> None:
    assert not {"compared", "sharded, compared"} & heard(root, 0).keys()
    assert_same_run(root / "compared-on-one", root / name)
    kept = json.loads((root / name / "evaluation.json").read_text())["kept_round"]
    assert (kept["round"], kept["rounds"]) == (1, 2)


def test_no_round_within_the_bounds_ends_all_processes_with_one_message(root: Path) -> None:
    assert heard(root, 0)["beyond"].startswith("UsageError: no round meets keep_best = 'reward:max, perplex")
    assert heard(root, 1)["beyond"].startswith("OtherProcessFailed: process 0 failed: no round meets")


def test_grid_on_two_processes_is_that_of_one_and_one_of_them_speaks(root: Path) -> None:
    one, two = (json.loads((root / name / "ablations.json").read_text()) for name in ("grid-on-one", "grid"))
    assert len(two["points"]) > 1
    for point in (*one["points"], *two["points"]):
        for measured in (point["mean"], *point["seeds"]):
            del measured["minutes"]
    assert two["points"] == near(one["points"])
    assert heard(root, 0)["grid"].startswith("run 1/")
    assert heard(root, 1)["grid"] == ""


def launched(folder: Path, *command: str) -> Process:
    # As on GPUs; with --cpu in place of --multi_gpu it would take MPI.
    flags = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()), "-m", *command]
    tests = {"PYTHONPATH": str(Path(__file__).parents[1])}  # where launcher.py is
    return Process("launcher", *flags, folder=folder, environment=tests)


def test_help_is_asked_of_a_launcher_and_shown_once(tmp_path: Path) -> None:
    done = launched(tmp_path, "quark_fast.ablate", "--help")
    assert done.wait() == 0, done.errors
    assert done.output.count("shared points run once") == 1


def test_error_of_one_process_ends_all_with_one_line(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "qwen2")
    (tmp_path / "rewards.py").write_text(
        "import os\n"
        "def score(prompts, completions):\n"
        "    if os.environ['RANK'] == '1' and len(prompts) > 9:\n"  # not yet in the check before the run
        "        raise ConnectionError('the scorer is down')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = {"reward": "rewards:score", "prompts": str(tmp_path / "prompts.txt"), "held_out": "2"}
    settings(tmp_path, "down", **given).save(tmp_path / "run.yaml")
    done = launched(tmp_path, "quark_fast.train", "--config", str(tmp_path / "run.yaml"))
    assert done.wait() != 0
    lines = [line for line in done.errors.splitlines() if "error: " in line]
    assert len(lines) == 1, done.errors
    assert lines[0].startswith("error: ") and "the scorer is down" in lines[0]
    assert done.errors.count("prompts.txt: 15") == 1, "one process speaks"


def heard(root: Path, index: int) -> dict[str, str]:
    return json.loads((root / f"heard-{index}.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(one: Path, other: Path, without: str = "") -> None:
    """Every sample, step, probe and table, numbers within float32 rounding through ten Adam steps.

    Args:
        without: rows of that kind are left out.
    """
    assert rows(one / "completions.jsonl") == rows(other / "completions.jsonl")
    clock = {"seconds", "tokens_per_s"}
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        mine, theirs = (
            [row for row in rows(path / file) if row.get("kind") != without] for path in (one, other)
        )
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - clock:
                assert a[name] == (b[name] if isinstance(a[name], str) else near(b[name])), (
                    file,
                    a,
                    b,
                )
    weights, others = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=2e-4)
    assert not (other / "checkpoint").exists()


def near(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: near(one) for name, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, rel=2e-3, abs=2e-5) if isinstance(value, int | float) else value


def test_two_processes_compute_the_samples_losses_and_weights_of_one(root: Path) -> None:
    assert heard(root, 0).get("two") is heard(root, 1).get("two") is None
    assert_same_run(root / "one", root / "two")
    losses = [
        [r["loss"] for r in rows(root / n / "metrics.jsonl") if r["kind"] == "step"] for n in ("one", "two")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)  # nothing but the order of float32 sums
    assert np.ptp(losses[0]) > 0.1, "the curve is one"


def test_sharded_model_computes_the_samples_losses_and_weights_of_a_whole_one(root: Path) -> None:
    assert heard(root, 0)["all parameters sharded"] == "[True, True, True, True]"
    assert_same_run(root / "one", root / "sharded")
    assert json.loads((root / "sharded" / "versions.json").read_text())["loss"] == "chunks of hidden states"


def test_sharded_processes_are_served_the_samples_that_one_is(root: Path) -> None:
    assert heard(root, 0).get("served") is heard(root, 1).get("served") is None
    assert_same_run(root / "served-on-one", root / "served")


@pytest.mark.parametrize("name", ["stopped-on-two", "stopped-on-one", "sharded-stopped"])
def test_run_goes_on_with_another_number_of_processes(root: Path, name: str) -> None:
    assert_same_run(root / "one", root / name)


def test_signal_to_one_process_stops_all_with_one_message_and_a_checkpoint(root: Path) -> None:
    assert heard(root, 1)["stopped"].startswith(
        f"Interrupted: stopped in round 2 at step {STOP_AT}; go on with"
    )
    assert heard(root, 0)["stopped"].startswith("OtherProcessFailed: process 1 failed: stopped in round 2")


def test_error_before_the_work_is_raised_once(root: Path) -> None:
    assert heard(root, 0)["indivisible"] == (
        "UsageError: batch_size = 7 does not divide among 2 processes; give 8, or launch another"
        " --num_processes"
    )
    assert heard(root, 1)["indivisible"].startswith("OtherProcessFailed: process 0 failed")
    assert not (root / "indivisible").exists()


def test_page_on_scale_shows_what_its_formulas_give_for_the_models_it_names(
    from_benchmarks: Callable[[str], ModuleType],
) -> None:
    scale = from_benchmarks("scale")
    # As the weights that Meta published count.
    published = {"1B": 1_235_814_400, "8B": 8_030_261_248, "70B": 70_553_706_496}
    assert {shape.name: shape.parameters for shape in scale.SHAPES} == published
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for table in (scale.memory(), scale.engines(), scale.traffic(), scale.time_shares()):
        assert table in page
