"""What trackers hear is what metrics.jsonl holds."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import PROMPTS, even_words, rows, small

from quark_fast.errors import UsageError
from quark_fast.runtime.trackers import track, trackers
from quark_fast.training.progress import Progress
from quark_fast.training.trainer import Trainer


@pytest.mark.parametrize("first", [0, 6])
def test_tensorboard_holds_every_number_of_the_metrics_once_across_a_resume(
    tmp_path: Path, tiny_model: Callable[..., Path], first: int
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == f"round {1 + (first > 0)}/2: learning" and progress.done == 3:
            raise SystemError

    model, folder = tiny_model(), tmp_path / "run"
    given: dict[str, Any] = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    settings = {"rounds": 2, "steps": 4, "batch_size": 4, "eval_samples": 1}
    settings["checkpoint_every"] = 2 if first else 50  # a run may resume at a checkpoint before any step
    config = small(folder, model, report_to="tensorboard", **settings)
    stopped = Trainer(config, listen=stop, **given)
    with pytest.raises(SystemError):  # at a step that is tracked, but later than the checkpoint
        stopped.train()
    assert not stopped.accelerator.trackers, "the next run of the process would track into this one's"
    Trainer(small(folder, model, report_to="tensorboard", resume=True, **settings), **given).train()

    heard = EventAccumulator(str(folder / "tensorboard" / "quark_fast")).Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in heard.Scalars(tag)]

    for kind, name in (("step", "loss"), ("step", "grad_norm"), ("round", "reward_mean")):
        written = [(row["step"], row[name]) for row in rows(folder / "metrics.jsonl", kind=kind)]
        assert curve(f"{kind}/{name}") == [(step, pytest.approx(value, rel=1e-6)) for step, value in written]
    thresholds = [row["thresholds"][1] for row in rows(folder / "metrics.jsonl", kind="round")]
    assert [value for _, value in curve("round/thresholds/1")] == pytest.approx(thresholds)
    table = {
        row["name"]: row["metrics"] for row in json.loads((folder / "evaluation.json").read_text())["rows"]
    }
    assert curve("evaluation/best token/mean") == [(8, pytest.approx(table["best token"]["mean"]["value"]))]


def test_trackio_holds_the_numbers_under_the_name_of_the_run(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it looks once
    settings = {"rounds": 1, "steps": 3, "batch_size": 4, "eval_samples": 1, "report_to": "trackio"}
    config = small(tmp_path / "run", tiny_model(), **settings)
    Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4]).train()
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "quark_fast.db")) as store:
        tracked = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in tracked} == {str(tmp_path / "run")}
    losses = [
        (step, json.loads(numbers)["step/loss"]) for _, step, numbers in tracked if b"step/loss" in numbers
    ]
    written = [
        (row["step"], row["loss"]) for row in rows(config.output_folder / "metrics.jsonl", kind="step")
    ]
    assert losses == [(step, pytest.approx(loss)) for step, loss in written]


def test_trackers_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers("") == []
    assert trackers("none") == []
    assert trackers(" trackio, tensorboard,trackio") == ["trackio", "tensorboard"]
    assert {"trackio", "tensorboard"} <= set(trackers("all"))
    for unknown in ("tensorboard,wandbi", "none,tensorboard", "tensorboard,all"):
        with pytest.raises(UsageError, match=r"no tracker '\w+'; give none, all, or .* wandb"):
            trackers(unknown)
    monkeypatch.setattr("quark_fast.runtime.trackers.get_available_trackers", lambda: [])
    with pytest.raises(UsageError, match="report_to = all, but no tracker is installed"):
        trackers("all")


def test_names_are_such_as_mlflow_takes() -> None:
    logged: dict[str, float] = {}
    accelerator: Any = SimpleNamespace(trackers=["mlflow"], log=lambda values, step: logged.update(values))
    row = {"guided w=-1.5/mean": 0.5, "guided w=1.5/judge 2*hf:me/x+y": 0.25, "no token/mean": float("nan")}
    track(accelerator, {"kind": "evaluation", "step": 3, **row})
    assert logged == {
        "evaluation/guided w -1.5/mean": 0.5,
        "evaluation/guided w 1.5/judge 2 hf:me/x y": 0.25,
    }
    # mlflow.utils.validation.validate_param_and_metric_name, which ends the run otherwise.
    assert all(re.match(r"^[/\w.\- :]*$", name) for name in logged)


class Wandb(ModuleType):
    """What accelerate calls of wandb, noting what it is called with."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.settings: dict[str, Any] = {}
        self.finished = 0
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))

    def init(self, **options: Any) -> Any:
        self.starts.append(options)

        def finish() -> None:
            self.finished += 1

        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)), finish=finish, **options
        )


def test_wandb_goes_on_with_the_same_run_when_the_run_is_resumed(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    model, given = tiny_model(), {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    settings = {"rounds": 1, "steps": 4, "batch_size": 4, "checkpoint_every": 2, "eval_samples": 1}

    def stop(progress: Progress) -> None:
        if progress.stage == "round 1/1: learning" and progress.done == 3:
            raise SystemError

    for output in ("run", "other"):
        with pytest.raises(SystemError):
            config = small(tmp_path / output, model, report_to="wandb", **settings)
            Trainer(config, listen=stop, **given).train()
    assert wandb.finished == 2, "what is tracked next is another run's"
    wandb.logged.clear()
    run = Trainer(small(tmp_path / "run", model, report_to="all", resume=True, **settings), **given).train()
    first, other, again = wandb.starts
    assert first == again and first["resume"] == "allow" and first["id"] != other["id"]
    assert (first["project"], first["name"], first["dir"]) == ("quark_fast", str(run.folder), str(run.folder))
    assert wandb.finished == 3 and wandb.settings["steps"] == 4
    losses = [(step, values["step/loss"]) for step, values in wandb.logged if "step/loss" in values]
    written = [(row["step"], row["loss"]) for row in rows(run.folder / "metrics.jsonl", kind="step")]
    assert losses == written[2:], "from the checkpoint on"


def test_missing_tracker_is_told_with_the_line_to_run_before_any_work(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quark_fast.runtime.trackers.get_available_trackers", lambda: [])
    config = small(tmp_path / "run", tiny_model(), report_to="trackio")
    with pytest.raises(UsageError, match="report_to = trackio needs its package: pip install trackio"):
        Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4])
    assert not (tmp_path / "run").exists()
