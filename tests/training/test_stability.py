"""Steps that must not be made, the KL's weight and its limit, and steps that memory does not suffice for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import save_tiny_model
from tiny_runs import PROMPTS, SHORT, even_words, rows, small, timeless

from quark_fast.config import Config
from quark_fast.errors import Diverged, UsageError
from quark_fast.runtime.memory import OutOfMemory
from quark_fast.training.checkpoint import Checkpoint
from quark_fast.training.objective import Objective, Terms
from quark_fast.training.progress import Progress
from quark_fast.training.stability import BadSteps, KLController
from quark_fast.training.state import State
from quark_fast.training.trainer import Trainer

Spoil = Callable[[int, torch.Tensor, dict[str, float]], torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("stability") / "model", "llama")


@pytest.fixture
def runs(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """A trainer whose losses pass through ``spoil(step, loss, terms)``, which may change them."""
    own = Objective.__call__

    def make(name: str, spoil: Spoil | None = None, listen: Any = lambda _: None, **settings: Any) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(
            small(tmp_path / name, model, **(SHORT | settings)),
            reward=even_words,
            prompts=PROMPTS,
            held_out=PROMPTS[:2],
            listen=listen,
        )

        def spoiled(self: Objective, *given: Any) -> tuple[torch.Tensor, dict[str, float]]:
            loss, terms = own(self, *given)
            return (loss if spoil is None else spoil(trainer.state.step + 1, loss, terms)), terms

        monkeypatch.setattr(Objective, "__call__", spoiled)
        return trainer

    return make


# --- steps that are not finite -------------------------------------------------------------------


def infinite_loss(loss: torch.Tensor, terms: Terms) -> torch.Tensor:
    terms["kl"] = terms["loss"] = torch.tensor(math.inf), 1.0
    return loss * math.inf


def infinite_gradient(loss: torch.Tensor, terms: Terms) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def at(steps: set[int], spoil: Any) -> Spoil:
    return lambda step, loss, terms: spoil(loss, terms) if step in steps else loss


@pytest.mark.parametrize(("spoil", "term"), [(infinite_loss, "kl"), (infinite_gradient, "gradient")])
def test_step_without_finite_loss_and_gradient_leaves_weights_and_optimizer_and_is_counted(
    runs: Callable[..., Trainer], spoil: Any, term: str
) -> None:
    states: list[list[torch.Tensor]] = []
    notes: list[str] = []

    def listen(progress: Progress) -> None:
        if progress.stage.endswith("learning"):
            weights = [p.detach().clone() for p in trainer.policy.model.parameters()]
            moments = trainer.optimizer.state_dict()["state"].values()
            states.append([*weights, *(value.clone() for each in moments for value in each.values())])
            notes.append(progress.note)

    trainer = runs("run", at({3}, spoil), listen)
    trainer.train()
    same = [
        all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in itertools.pairwise(states)
    ]
    assert same == [False, True, False, False, False], "step 3 changed something, or another did nothing"
    assert all(t.isfinite().all() for t in states[-1])
    assert notes == ["", "", f"step 3: no finite {term}, skipped", "", "", ""]
    metrics = rows(trainer.folder / "metrics.jsonl", kind="step")
    assert [row.get("skipped") for row in metrics] == [None, None, 1, 1, 1, 1]
    assert [row.get("skipped_for") for row in metrics] == [None, None, term, None, None, None]
    text = (trainer.folder / "metrics.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_bad_steps_in_a_row_stop_the_run_with_a_diagnosis_also_across_a_resume(
    runs: Callable[..., Trainer],
) -> None:
    bad = at({2, 4, 5, 6}, infinite_loss)
    trainer = runs("run", bad, max_bad_steps=3)
    with pytest.raises(Diverged) as first:
        trainer.train()
    message = str(first.value)
    assert "steps 4 to 6 had no finite kl" in message and "learning rate 0.0018" in message, message
    norms = [row["grad_norm"] for row in rows(trainer.folder / "metrics.jsonl", kind="step")]
    assert f"good steps: {norms[0]:.3g}, {norms[2]:.3g}." in message
    # The checkpoint of step 4 stands in the row: it counts on from there.
    with pytest.raises(Diverged) as second:
        runs("run", bad, max_bad_steps=3, resume=True).train()
    assert str(second.value) == message
    # And it can be told to go on.
    runs("run", bad, max_bad_steps=0, resume=True).train()
    assert [row["step"] for row in rows(trainer.folder / "metrics.jsonl", kind="step")] == [1, 2, 3, 4, 5, 6]


def test_overflow_of_a_scaled_gradient_is_how_fp16_finds_its_scale() -> None:
    steps = BadSteps(in_row=1, skipped=1, norms=[2.0])
    assert steps.judge({"loss": 1.0}, math.inf, scale=65536.0) is None
    assert (steps.in_row, steps.skipped, steps.norms) == (1, 1, [2.0]), "neither bad nor good"
    assert steps.judge({"loss": 1.0}, math.inf, scale=1.0) == "gradient"
    assert steps.judge({"loss": math.nan, "kl": math.nan}, math.nan, scale=65536.0) == "kl"
    assert (steps.in_row, steps.skipped) == (3, 3)
    assert steps.judge({"loss": 1.0}, 0.5, scale=65536.0) is None
    assert (steps.in_row, steps.skipped, steps.norms) == (0, 3, [2.0, 0.5])


def test_fp16_run_lowers_its_scale_and_skips_a_spoiled_loss(runs: Callable[..., Trainer]) -> None:
    trainer = runs("run", at({5}, infinite_loss), precision="fp16", max_bad_steps=2)
    trainer.accelerator.scaler._init_scale = 2.0**60
    trainer.train()
    steps = rows(trainer.folder / "metrics.jsonl", kind="step")
    assert [row.get("skipped_for") for row in steps] == [None] * 4 + ["kl", None]
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (60 - 6)


# --- the KL --------------------------------------------------------------------------------------


def test_controller_is_the_papers_arithmetic() -> None:
    ours, theirs = KLController(0.15, 6.0, 10_000), 0.15
    for kl in (0.0, 12.0, 6.0, 6.6, 5.7, -1.0, 100.0, 7.1):
        ours.update(kl, 512)
        theirs *= 1 + np.clip(kl / 6.0 - 1, -0.2, 0.2) * 512 / 10_000
        assert ours.coef == pytest.approx(theirs, rel=1e-14)
    off = KLController(0.15, 0.0, 10_000)
    off.update(12.0, 512)
    assert off.coef == 0.15


def test_adapted_weight_is_the_one_of_the_loss_and_resumes_to_the_last_bit(
    runs: Callable[..., Trainer],
) -> None:
    settings = {"kl_coef": 0.5, "kl_target": 0.02, "kl_horizon": 40, "contrast_coef": 0.0}

    class Killed(Exception):
        pass

    def die(progress: Progress) -> None:
        if progress.stage.endswith("learning") and progress.done == 5:
            raise Killed

    whole = runs("whole", **settings)
    whole.train()
    steps = rows(whole.folder / "metrics.jsonl", kind="step")
    coefficient = 0.5
    for row in steps:
        assert row["kl_coef"] == pytest.approx(coefficient, rel=1e-12)
        assert row["loss"] == pytest.approx(row["nll"] + coefficient * row["kl"], rel=1e-5)
        coefficient *= 1 + float(np.clip(row["kl"] / 0.02 - 1, -0.2, 0.2)) * 8 / 40
    assert len({row["kl_coef"] for row in steps}) == 6
    with pytest.raises(Killed):
        runs("run", listen=die, **settings).train()
    again = runs("run", resume=True, **settings)
    again.train()
    assert timeless(again.folder / "metrics.jsonl") == timeless(whole.folder / "metrics.jsonl")


def test_step_that_fp16_skips_leaves_the_kls_weight_as_it_is(
    runs: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[float] = []
    monkeypatch.setattr(KLController, "update", lambda self, kl, samples: moved.append(kl))
    trainer = runs("run", precision="fp16", kl_target=0.02)
    trainer.accelerator.scaler._init_scale = 2.0**17
    trainer.train()
    steps = rows(trainer.folder / "metrics.jsonl", kind="step")
    assert 0 < len(moved) < len(steps)
    assert moved == [row["kl"] for row in steps if row["grad_norm"] is not None]


def test_kl_above_its_limit_stops_the_run_which_can_go_on_with_another(runs: Callable[..., Trainer]) -> None:
    free = runs("free")
    free.train()
    kl = [row["kl"] for row in rows(free.folder / "metrics.jsonl", kind="step")]
    limit = (max(kl[:3]) + max(kl)) / 2
    first = next(i for i, value in enumerate(kl, start=1) if value > limit)
    assert first > 3, "else the limit would tell nothing"
    trainer = runs("run", kl_stop=limit)
    with pytest.raises(Diverged, match=rf"step {first}: the KL .* {kl[first - 1]:.4g} nats per token"):
        trainer.train()
    again = runs("run", kl_stop=2 * max(kl), resume=True)
    again.train()
    assert timeless(again.folder / "metrics.jsonl") == timeless(free.folder / "metrics.jsonl")


@pytest.mark.parametrize("name", ["kl_stop", "kl_target"])
def test_limit_on_a_kl_that_is_not_computed_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} = 0.5 needs the KL"):
        Config(**{name: 0.5, "kl_coef": 0.0}).check()


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """``memory(most, calls)``: more than ``most`` samples fail; just so many, after ``calls`` passes."""
    own = Objective.__call__

    def limit(most: int, calls: int = 10**9) -> None:
        passes = iter(range(10**9))

        def limited(self: Objective, prompts: Any, *given: Any) -> Any:
            if len(prompts) > most or (len(prompts) == most and next(passes) >= calls):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return own(self, prompts, *given)

        monkeypatch.setattr(Objective, "__call__", limited)

    yield limit


def trainer_of(folder: Path, model: Path, listen: Any = lambda _: None, **settings: Any) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = small(folder, model, **(SHORT | {"batch_size": 8, "micro_batch": 8} | settings))
    return Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:2], listen=listen)


def test_step_out_of_memory_is_done_again_in_smaller_parts_with_the_same_result(
    tmp_path: Path, model: Path, memory: Callable[..., None]
) -> None:
    trainer_of(tmp_path / "small", model, micro_batch=2).train()
    notes: list[str] = []

    class Killed(Exception):
        pass

    def listen(progress: Progress) -> None:
        notes.append(progress.note)
        if progress.stage.endswith("learning") and progress.done == 5:
            raise Killed

    # 8 never fit; 4 do once, so that the second pass fails when a gradient is there already.
    memory(4, calls=1)
    with pytest.raises(Killed):
        trainer_of(tmp_path / "run", model, listen).train()
    memory(2)
    trainer_of(tmp_path / "run", model, resume=True).train()  # knows by now what fits
    assert [note for note in notes if note] == [
        f"out of memory: from step 1 on, {n} samples at a time, as many a step" for n in (4, 2)
    ]
    ours = timeless(tmp_path / "run" / "metrics.jsonl")
    assert [row["micro_batch"] for row in ours if row["kind"] == "micro_batch"] == [4, 2]
    assert [row for row in ours if row["kind"] != "micro_batch"] == timeless(
        tmp_path / "small" / "metrics.jsonl"
    )


@pytest.mark.parametrize(("found", "then"), [(2, 8), (1, 1)], ids=["sufficed", "lacked"])
def test_fewer_processes_at_a_resume_take_as_many_samples_at_a_time_as_their_memory_holds(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, found: int, then: int
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage.endswith("learning") and progress.done == 3:
            raise SystemError

    with monkeypatch.context() as patch:
        contents = Checkpoint._contents

        def of_four(self: Checkpoint, state: State) -> tuple[dict[str, Any], Any]:
            saved, tensors = contents(self, state)
            return saved | {"micro_batch": [8, found, 4]}, tensors  # 2 of 8 samples each

        patch.setattr(Checkpoint, "_contents", of_four)
        with pytest.raises(SystemError):
            trainer_of(tmp_path / "run", model, stop).train()
    assert trainer_of(tmp_path / "run", model, resume=True).state.micro_batch == then


def test_one_sample_that_does_not_fit_ends_the_run_with_a_checkpoint_of_that_step(
    tmp_path: Path, model: Path, memory: Callable[..., None]
) -> None:
    def listen(progress: Progress) -> None:
        if progress.stage.endswith("learning") and progress.done == 3:
            memory(0)

    with pytest.raises(OutOfMemory, match=r"one sample in a forward pass .*CUDA out of memory.*--resume"):
        trainer_of(tmp_path / "run", model, listen).train()
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert state["step"] == 3


def test_another_error_of_a_step_is_not_taken_for_a_lack_of_memory(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    trainer = trainer_of(tmp_path / "run", model)
    monkeypatch.setattr(Objective, "__call__", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()
