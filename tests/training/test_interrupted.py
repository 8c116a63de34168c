"""What is on disk of a run at any moment, and that going on pays for nothing twice."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS, Told, copies_at, even_words, rows, small, timeless

from quark_fast.arguments import load_config, parse
from quark_fast.errors import Interrupted, OutOfResources, UsageError
from quark_fast.evaluation import perplexity
from quark_fast.report.columns import duration
from quark_fast.rollout import transformers as rollout
from quark_fast.rollout.sampling import Conditioning, SampleRequest
from quark_fast.runtime.journal import Journal
from quark_fast.training import checkpoint, listeners, results
from quark_fast.training import start as start_module
from quark_fast.training import trainer as trainer_module
from quark_fast.training.explore import Explorer
from quark_fast.training.progress import Progress
from quark_fast.training.scored import Scored
from quark_fast.training.signals import Stop, stop_signals
from quark_fast.training.trainer import Trainer

SHORT = {
    "rounds": 2,
    "steps": 3,
    "batch_size": 8,
    "initial_samples": 4,
    "explore_samples": 3,
    "sample_batch": 16,
    "eval_samples": 4,
    "eval_rows": "ends",
    "eval_guidance": "2",
}
GIVEN: dict[str, Any] = {"prompts": PROMPTS, "held_out": PROMPTS[:12]}
FILES = ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl", "held_out.jsonl")


class Killed(BaseException):
    """The process is gone: nobody handles it."""


def counting(calls: list[int]) -> Callable[..., list[float | None]]:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append(len(completions))
        return even_words(prompts, completions)

    return reward


def run(folder: Path, model: Path, reward: Any = even_words, **settings: Any) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    listen = settings.pop("listen", lambda _: None)
    trainer = Trainer(small(folder, model, **(SHORT | settings)), reward=reward, listen=listen, **GIVEN)
    trainer.train()
    return trainer


KILLS = [
    ("round 1/2: sampling", 40),
    ("round 2/2: sampling", 40),
    ("evaluating: base model", 30),
    ("evaluating: guided w=2", 30),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[int, int]]:
    """An undisturbed run of the tiny model; how many completions were scored in it, and by each of KILLS."""
    here, calls, by_then = tmp_path_factory.mktemp("whole"), [], {}
    copies = copies_at(KILLS, here / "run", lambda number: by_then.update({number: sum(calls)}))
    run(here / "run", save_tiny_model(here / "model", "llama"), counting(calls), listen=copies)
    return here / "run", sum(calls), by_then


@pytest.fixture(scope="module")
def one_round(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("one-round")
    run(here / "run", save_tiny_model(here / "model", "llama"), rounds=1)
    return here / "run"


@pytest.fixture
def finished(one_round: Path, tmp_path: Path) -> Path:
    """A copy of the run of one round, in "run"."""
    return Path(shutil.copytree(one_round, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


def assert_same(one: Path, other: Path) -> None:
    for name in FILES:
        assert timeless(one / name) == timeless(other / name), name


@pytest.mark.parametrize("number", range(len(KILLS)), ids=[stage for stage, _ in KILLS])
def test_kill_inside_a_stage_keeps_its_batches_and_no_reward_is_asked_twice(
    whole: tuple[Path, int, dict[int, int]], number: int
) -> None:
    folder, calls = whole[0].with_name(f"killed-{number}"), [whole[2][number]]
    assert list((folder / "pending").glob("*.jsonl")), "the batches that were made are on disk"
    run(folder, whole[0].with_name("model"), counting(calls), resume=True)
    assert_same(folder, whole[0])
    assert sum(calls) == whole[1], "every completion was scored once"
    assert not (folder / "pending").exists()


def test_kill_in_the_middle_of_scoring_costs_one_batch(
    tmp_path: Path, tiny_model: Callable[..., Path], whole: tuple[Path, int, dict[int, int]]
) -> None:
    model, scored = tiny_model(), []
    calls = iter(range(10**9))

    def dies(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if next(calls) == 4:
            raise Killed
        scored.append(len(completions))
        return even_words(prompts, completions)

    with pytest.raises(Killed):
        run(tmp_path / "run", model, dies)
    before = sum(scored)
    assert before > 16
    run(tmp_path / "run", model, counting(scored), resume=True, accept_changed_reward=True)
    assert_same(tmp_path / "run", whole[0])
    evaluated = len(rows(tmp_path / "run" / "evaluation.jsonl"))
    sampled = len(rows(tmp_path / "run" / "completions.jsonl"))
    assert sum(scored) == sampled + evaluated + 2 * 4 + 12, "with both checks' and the probe's completions"


def test_reward_of_one_completion_at_a_time_keeps_each_answer(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    asked = Told()
    down = iter(range(10**9))

    def one(prompt: str, completion: str) -> float | None:
        if next(down) == 60:
            raise Killed
        asked.append((prompt, completion))
        return even_words([prompt], [completion])[0]

    model = tiny_model()
    with pytest.raises(Killed):
        run(tmp_path / "run", model, one, rounds=1)
    before = len(asked)
    run(tmp_path / "run", model, one, rounds=1, resume=True)
    assert before == 60
    again = [pair for pair, count in Counter(asked).items() if count > 1]
    # The check before the run has no folder to keep its four answers in.
    assert len(again) <= 4


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "pending")
    journal.stage("round-1").keep(0, ["a", 0.1])
    (file,) = (tmp_path / "pending").glob("round-1.*")
    with file.open("a") as half:
        half.write('[1, ["b", 0.')
    kept = journal.stage("round-1")
    assert 0 in kept and 1 not in kept and kept[0] == ["a", 0.1]
    kept.keep(1, ["b", 0.2])
    assert journal.stage("round-1")[1] == ["b", 0.2]
    # Another process's batches are found, other settings are another stage.
    Journal(tmp_path / "pending", process=1).stage("round-1").keep(2, ["c", None])
    assert 2 in journal.stage("round-1")
    assert 0 not in journal.stage("round-1", ["other settings"])
    journal.forget("round-1")
    assert 0 not in journal.stage("round-1")


@pytest.mark.parametrize("line", ["{}", "[1]", '["a", []]', "[0, [[1, 2]]]", "[0, 7]", "[" * 10**5, "\udcff"])
def test_damaged_file_of_batches_is_named(tmp_path: Path, line: str) -> None:
    journal = Journal(tmp_path / "pending")
    journal.stage("round-1").keep(0, [])
    (file,) = (tmp_path / "pending").glob("round-1.*")
    file.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UsageError, match=r"round-1\..*is damaged .*delete it"):
        journal.stage("round-1", decode=Scored.from_json)


def killed_in_the_evaluation(folder: Path, model: Path, reward: Any = even_words, **settings: Any) -> None:
    def listen(progress: Progress) -> None:
        if progress.stage.startswith("evaluating: best") and progress.done >= 16:
            raise Killed

    with pytest.raises(Killed):
        run(folder, model, reward, listen=listen, **settings)


def test_evaluation_with_other_settings_does_not_take_the_old_ones_batches(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    killed_in_the_evaluation(tmp_path / "run", model)
    run(tmp_path / "run", model, resume=True, eval_samples=2)
    evaluated = Counter(row["row"] for row in rows(tmp_path / "run" / "evaluation.jsonl"))
    assert set(evaluated.values()) == {24}


def test_guided_row_is_not_resumed_in_another_nucleus(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version drew from the nucleus of the mix."""

    def listen(progress: Progress) -> None:
        if progress.stage.startswith("evaluating: guided") and progress.done >= 16:
            raise Killed

    def guided(folder: Path) -> list[str]:
        return [row["completion"] for row in rows(folder / "evaluation.jsonl") if "guided" in row["row"]]

    model, settings = tiny_model(), {"rounds": 1, "eval_top_p": 0.3, "eval_guidance": "4"}
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(Conditioning, "nucleus_of", lambda self: None)
        run(tmp_path / "run", model, listen=listen, **settings)
    run(tmp_path / "run", model, resume=True, **settings)
    run(tmp_path / "whole", model, **settings)
    assert guided(tmp_path / "run") == guided(tmp_path / "whole")


def test_evaluation_by_a_changed_reward_has_no_score_of_the_one_before(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def plus_ten(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if one is None else one + 10 for one in even_words(prompts, completions)]

    model = tiny_model()
    killed_in_the_evaluation(tmp_path / "run", model, rounds=1)
    run(tmp_path / "run", model, plus_ten, rounds=1, resume=True, accept_changed_reward=True)
    scores = [row["score"] for row in rows(tmp_path / "run" / "evaluation.jsonl")]
    assert min(one for one in scores if one is not None) >= 10


def test_settings_that_changed_at_a_resume_are_the_runs_from_then_on(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, folder = tiny_model(), tmp_path / "run"
    killed_in_the_evaluation(folder, model, rounds=1)
    changed = {"eval_samples": 2, "eval_top_p": 0.5, "sample_batch": 8}
    killed_in_the_evaluation(folder, model, rounds=1, resume=True, accept_changed_reward=True, **changed)
    saved = load_config(folder / "config.yaml")
    assert (saved.eval_samples, saved.eval_top_p) == (2, 0.5)
    assert saved.sample_batch == SHORT["sample_batch"], "which says what a batch of this run is"
    assert not saved.resume and not saved.accept_changed_reward
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = parse(["--resume", "--output", str(folder)], "train")
    Trainer(plain, reward=even_words, listen=None, **GIVEN).train()
    assert set(Counter(row["row"] for row in rows(folder / "evaluation.jsonl")).values()) == {24}
    assert json.loads((folder / "evaluation.json").read_text())["sampling"]["top_p"] == 0.5


def test_judge_that_comes_at_a_resume_is_tried_out_before_the_work(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_judge.py").write_text("def broken(prompts, completions, *, reference): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model()
    with pytest.raises(Killed):
        run(tmp_path / "run", model, rounds=1, listen=stop_while_learning)
    stages: list[str] = []
    with pytest.raises(UsageError, match="late_judge:broken needs reference, which it is not passed"):
        run(
            tmp_path / "run",
            model,
            rounds=1,
            resume=True,
            judge="late_judge:broken",
            listen=lambda progress: stages.append(progress.stage),
        )
    assert not any("learning" in stage for stage in stages)


@pytest.mark.parametrize("killed", [False, True])
def test_columns_may_be_what_json_has_no_word_for(
    tmp_path: Path, tiny_model: Callable[..., Path], killed: bool
) -> None:
    own = [
        {"prompt": text, "day": datetime.date(2026, 1, 1 + i), "tags": {"a", text}, "size": np.int64(i)}
        for i, text in enumerate(PROMPTS)
    ]
    folder, given = tmp_path / "run", {"prompts": own, "held_out": own[:12]}
    settings = SHORT | {"rounds": 1}

    def listen(progress: Progress) -> None:
        if killed and progress.stage.startswith("evaluating: best"):
            raise Killed

    model = tiny_model()
    with pytest.raises(Killed) if killed else contextlib.nullcontext():
        Trainer(small(folder, model, **settings), reward=even_words, listen=listen, **given).train()
    if killed:
        assert list((folder / "pending").glob("evaluation.*"))
        Trainer(
            small(folder, model, **settings, resume=True), reward=even_words, listen=None, **given
        ).train()
    assert (folder / "finished.json").exists()


def test_reward_is_called_with_the_same_columns_whatever_rows_a_batch_has(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def reward(prompts: list[str], completions: list[str], keywords: list[Any]) -> list[float | None]:
        return even_words(prompts, completions)

    longer = [{"prompt": text + " w1 w2 w3", "keywords": ["w1"]} for text in PROMPTS]  # batches of their own
    given = {"prompts": [*PROMPTS, *longer], "held_out": PROMPTS[:4]}
    config = small(tmp_path / "run", tiny_model(), **(SHORT | {"rounds": 1}))
    Trainer(config, reward=reward, listen=None, **given).train()

    def needs(prompts: list[str], completions: list[str], keywords: list[Any]) -> list[float]:
        return [float(text.count(words[0])) for text, words in zip(completions, keywords, strict=True)]

    given = {"prompts": longer, "held_out": PROMPTS[:4]}
    with pytest.raises(UsageError, match="needs raised TypeError"):  # before anything is sampled
        Trainer(small(tmp_path / "other", tiny_model(), **SHORT), reward=needs, listen=None, **given)


def test_runs_of_different_precisions_may_follow_each_other_in_one_process(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    for precision, expected in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        config = small(tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}", model, precision=precision)
        trainer = Trainer(config, reward=even_words, listen=None, **GIVEN)
        assert trainer.accelerator.mixed_precision == expected


def test_run_has_its_own_precision_whatever_is_made_beside_it(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, norms = tiny_model(), []
    for name, beside in (("alone", []), ("first", ["fp32", "bf16"])):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = [
            Trainer(
                small(tmp_path / f"{name}-{precision}", model, **SHORT, precision=precision),
                reward=even_words,
                listen=None,
                **GIVEN,
            )
            for precision in ["fp16", *beside]
        ]
        made[0].train()
        norms.append([row["grad_norm"] for row in rows(tmp_path / f"{name}-fp16" / FILES[0], kind="step")])
    assert norms[0] == norms[1]


@pytest.mark.parametrize("kept", [False, True], ids=["plain", "async, whose answers are kept"])
def test_round_of_which_nothing_was_scored_is_asked_again_at_a_resume(
    tmp_path: Path, tiny_model: Callable[..., Path], kept: bool
) -> None:
    model, works = tiny_model(), [True]

    def plain(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return even_words(prompts, completions) if works[0] else [None] * len(completions)

    async def awaited(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return plain(prompts, completions)

    reward = awaited if kept else plain

    def out_of_order(progress: Progress) -> None:
        works[0] = works[0] and (progress.stage, progress.done) != ("probing", 1)

    folder = tmp_path / "run"
    message = r"scored none of \d+ completions in round 2; .* --resume --output .*run samples and scores"
    with pytest.raises(UsageError, match=message):
        run(folder, model, reward, listen=out_of_order)
    works[0] = True
    run(folder, model, reward, resume=True)
    run(tmp_path / "whole", model, reward)
    assert_same(folder, tmp_path / "whole")


def test_run_that_an_error_ended_is_free_for_another_process(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, folder, held = tiny_model(), tmp_path / "run", []

    def stops(progress: Progress) -> None:
        held.append((folder / ".lock").exists())
        if (progress.stage, progress.done) == ("round 1/2: learning", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, model, listen=stops)
    assert all(held) and not (folder / ".lock").exists()
    with pytest.raises(UsageError, match="batch_size"):
        run(folder, model, resume=True, batch_size=4)
    assert not (folder / ".lock").exists(), "of a resume that was refused"
    run(folder, model, resume=True)


# --- signals --------------------------------------------------------------------------------------


def test_stop_that_a_reward_swallows_comes_again() -> None:
    stop = Stop(lambda: "go on")
    with stop.allowed_at_once(), contextlib.suppress(BaseException):  # a reward's bare except
        stop.ask(signal.SIGTERM, None)
    assert stop.asked
    with pytest.raises(Interrupted, match="go on"), stop.allowed_at_once():
        pass


def test_forked_child_ends_by_the_first_signal() -> None:
    with stop_signals(lambda: "go on") as stop:
        ready, tell = os.pipe()
        child = os.fork()
        if not child:
            os.write(tell, b"1")  # Python forgets a signal that comes while it forks
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.asked


def test_handlers_of_a_program_around_python_become_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now: dict[int, Any] = {signal.SIGINT: None, signal.SIGTERM: "own"}

    def set_handler(number: int, handler: Any) -> Any:
        before, now[number] = now[number], handler
        return before

    monkeypatch.setattr(signal, "signal", set_handler)
    with stop_signals(lambda: "go on"):
        assert "own" not in now.values()
    assert now == {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: "own"}


# --- what "finished" means ------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_finished_run_without_its_report_is_still_finished(finished: Path, one_round: Path) -> None:
    (finished / "report.html").unlink()
    before = files(finished)
    with pytest.raises(UsageError, match="finished"):
        run(finished, one_round.parent / "model", rounds=1, resume=True)
    assert files(finished) == before


@pytest.mark.parametrize(
    "gone", [["report.html", "finished.json"], ["finished.json", "report.html", "model"]]
)
def test_results_without_a_checkpoint_are_refused_and_left_alone(
    finished: Path, one_round: Path, gone: list[str]
) -> None:
    for name in gone:
        path = finished / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(finished)
    with pytest.raises(UsageError, match=r"has results \(.*\) but no checkpoint"):
        run(finished, one_round.parent / "model", rounds=1, resume=True)
    after = files(finished)
    after.pop(".lock", None)
    assert after == before


# --- the reward's identity, every start -----------------------------------------------------------


def stop_while_learning(progress: Progress) -> None:
    if progress.stage.endswith("learning") and progress.done >= 2:
        raise Killed


@pytest.mark.parametrize("when", ["sampling", "learning"])
def test_reward_whose_code_changed_is_refused_unless_that_is_wanted(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def listen(progress: Progress) -> None:
        if progress.stage.endswith(when) and progress.done >= 2:
            raise Killed

    module = f"changing_reward_{when}"  # imported once a process
    source = tmp_path / f"{module}.py"
    source.write_text(
        "def score(prompts, completions, **_):\n    return [t.count('w1') for t in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model()

    def start(**settings: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        listen = settings.pop("listen", lambda _: None)
        config = small(
            tmp_path / "run", model, **(SHORT | {"rounds": 1, "reward": f"{module}:score"} | settings)
        )
        Trainer(config, listen=listen, **GIVEN).train()

    with pytest.raises(Killed):
        start(listen=listen)
    source.write_text(source.read_text().replace("w1", "w2"))
    before = files(tmp_path / "run")
    with pytest.raises(UsageError, match=rf"{module}:score.*--accept-changed-reward"):
        start(resume=True)
    assert files(tmp_path / "run") == before
    start(resume=True, accept_changed_reward=True)
    assert (tmp_path / "run" / "finished.json").exists()


@pytest.mark.parametrize(("when", "lora_rank"), [("sampling", 4), ("learning", 0)])
def test_other_base_model_or_other_columns_are_refused_before_anything_is_changed(
    tmp_path: Path, tiny_model: Callable[..., Path], when: str, lora_rank: int
) -> None:
    def listen(progress: Progress) -> None:
        if progress.stage.endswith(when) and progress.done >= 2:
            raise Killed

    folder, model = tmp_path / "run", Path(shutil.copytree(tiny_model(), tmp_path / "my-model"))

    def start(answer: str = "w1", **settings: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        listen = settings.pop("listen", lambda _: None)
        # An object without a text of its own has another address at each start.
        own = [{"prompt": text, "answer": answer, "tool": object()} for text in PROMPTS]
        config = small(folder, model, **(SHORT | {"rounds": 1, "lora_rank": lora_rank} | settings))
        Trainer(config, reward=even_words, listen=listen, prompts=own, held_out=PROMPTS[:12]).train()

    with pytest.raises(Killed):
        start(listen=listen)
    before, stored = files(folder), (model / "model.safetensors").read_bytes()
    weights = {name: value * 1.01 for name, value in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"my-model has other weights than when the run in .*run began"):
        start(resume=True, accept_changed_reward=True)
    (model / "model.safetensors").write_bytes(stored)
    with pytest.raises(UsageError, match=r"columns beside the training prompts.*--accept-changed-reward"):
        start("w2", resume=True)
    assert files(folder) == before
    with pytest.raises(Killed):
        start(resume=True, listen=listen)
    start("w2", resume=True, accept_changed_reward=True)


def test_run_of_an_older_version_without_a_note_of_model_and_columns_goes_on(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def listen(progress: Progress) -> None:
        if progress.stage.endswith("sampling") and progress.done >= 2:
            raise Killed

    folder, model = tmp_path / "run", tiny_model()
    with pytest.raises(Killed):
        run(folder, model, rounds=1, listen=listen)
    about = folder / "pending" / "about.json"
    known = json.loads(about.read_text())
    about.write_text(json.dumps({name: known[name] for name in ("reward", "prompts", "scored")}))
    run(folder, model, rounds=1, resume=True)


def test_versions_keep_every_start(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    monkeypatch.setattr("sys.argv", ["quark_fast/train.py", "--first"])
    with pytest.raises(Killed):
        run(tmp_path / "run", model, listen=stop_while_learning, checkpoint_every=1)
    monkeypatch.setattr("sys.argv", ["quark_fast/train.py", "--resume"])
    run(tmp_path / "run", model, resume=True, checkpoint_every=1)
    found = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert found["command"] == "python -m quark_fast.train --first", "how to reproduce it"
    assert [start["command"].rpartition(" ")[2] for start in found["starts"]] == ["--first", "--resume"]
    assert [start["step"] for start in found["starts"]] == [0, 1]
    assert all({"torch", "machine", "time"} <= start.keys() for start in found["starts"])
    assert found["memory_gb"] > 0.1


def test_minutes_are_those_of_setting_up_training_and_writing_but_not_of_the_time_between(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0

    def and_it_takes(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*given: Any, **how: Any) -> Any:
            nonlocal clock
            clock += seconds
            return function(*given, **how)

        return slow

    for owner, name, seconds in (
        (trainer_module, "set_up", 60.0),
        (Explorer, "explore", 120.0),
        (results, "write_export", 240.0),
        (results, "write_report", 9000.0),  # which shows the minutes
    ):
        monkeypatch.setattr(owner, name, and_it_takes(seconds, getattr(owner, name)))
    for module in (trainer_module, results, listeners):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock))
    config = small(tmp_path / "run", tiny_model(), **SHORT)
    trainer = Trainer(config, reward=even_words, listen=None, **GIVEN)
    clock += 9000.0
    trainer.train()
    found = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert found["minutes"] == 1 + 2 * 2 + 4
    assert duration(found["minutes"]) == "9.0 minutes" and duration(0.4) == "24 seconds"


def test_time_and_memory_of_batches_that_were_kept_are_part_of_the_run(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped within its evaluation begins that where it stopped, and its clock, too."""
    folder, model = tmp_path / "run", tiny_model()
    held = [9e9]
    monkeypatch.setattr("quark_fast.training.results.most_memory", lambda device: held[0])

    def listen(progress: Progress) -> None:
        if progress.stage.startswith("evaluating: best"):
            now = json.loads((folder / "pending" / "spent.json").read_text())
            longer = {"seconds": now["seconds"] + 600, "memory_gb": now["memory_gb"]}
            (folder / "pending" / "spent.json").write_text(json.dumps(longer))
            raise Killed

    with pytest.raises(Killed):
        run(folder, model, rounds=1, listen=listen)
    held[0] = 2e9
    run(folder, model, rounds=1, resume=True)
    record = json.loads((folder / "versions.json").read_text())
    assert record["minutes"] >= 10 and record["memory_gb"] == 9


def test_no_file_of_a_run_holds_what_json_has_not(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    # A single held-out prompt: no rank correlation can be had.
    config = small(tmp_path / "run", tiny_model(), **(SHORT | {"rounds": 1}))
    Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:1]).train()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for path in sorted((tmp_path / "run").glob("*.json*")):
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    (probe,) = rows(tmp_path / "run" / "metrics.jsonl", kind="probe")
    assert probe["rank_correlation"] is None


# --- out of memory --------------------------------------------------------------------------------


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Sampling of more than so many rows runs out of memory; the rows that were tried."""
    tried: list[int] = []
    own = rollout._sample_batch

    def limited(policy: Any, model: Any, request: SampleRequest, g: Any) -> Any:
        tried.append(len(request.prompts) * request.samples)
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return own(policy, model, request, g)

    monkeypatch.setattr(rollout, "_sample_batch", limited)
    return tried


def test_sampling_that_runs_out_of_memory_goes_on_with_half_and_says_so(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = small_memory(monkeypatch, 5)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", tiny_model(), rounds=1)
    assert "out of memory: from here on 8 completions side by side" in caplog.text
    assert "out of memory: from here on 4 completions side by side" in caplog.text
    assert max(tried) == 16 and 4 in tried
    written = Counter(row["prompt"] for row in rows(tmp_path / "run" / "completions.jsonl"))
    assert written == dict.fromkeys(PROMPTS, 4)
    evaluated = Counter(row["row"] for row in rows(tmp_path / "run" / "evaluation.jsonl"))
    assert set(evaluated.values()) == {48}


def test_memory_for_not_even_one_completion_ends_in_one_line(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, 0)
    with pytest.raises(UsageError, match="one sample in a forward pass is more than the memory holds"):
        run(tmp_path / "run", tiny_model())


def test_lack_of_memory_outside_of_the_passes_ends_in_one_line_and_the_run_goes_on(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Path, int, dict[int, int]],
) -> None:
    folder, model = tmp_path / "run", tiny_model()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def refused(where: Any, name: str, how: str, **settings: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full)
            with pytest.raises(OutOfResources, match=rf"out of memory \(CUDA out of memory.*, and {how}"):
                run(folder, model, **settings)

    refused(start_module, "_load_policy", "start the run again")
    refused(torch.optim.AdamW, "step", "go on with --resume --output")
    with pytest.raises(Killed):
        run(folder, model, resume=True, listen=stop_while_learning)
    refused(checkpoint, "load_state", "go on with --resume --output", resume=True)
    run(folder, model, resume=True)
    assert_same(folder, whole[0])


def test_texts_that_run_out_of_memory_are_read_by_halves(
    tmp_path: Path, tiny_model: Callable[..., Path], one_round: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, sizes = perplexity.make_batch, []

    def limited(policy: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return own(policy, prompts, *rest)

    monkeypatch.setattr(perplexity, "make_batch", limited)
    run(tmp_path / "run", tiny_model(), rounds=1)
    assert max(sizes) > 3
    for ours, theirs in zip(
        rows(tmp_path / "run" / "evaluation.jsonl"),
        rows(one_round / "evaluation.jsonl"),
        strict=True,
    ):
        assert ours["completion"] == theirs["completion"]
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-4)


def test_sample_batch_may_change_at_a_resume_and_the_batches_stay(
    tmp_path: Path, tiny_model: Callable[..., Path], whole: tuple[Path, int, dict[int, int]]
) -> None:
    model = tiny_model()
    with pytest.raises(Killed):
        run(tmp_path / "run", model, listen=stop_while_learning)
    notes: list[str] = []
    run(tmp_path / "run", model, resume=True, sample_batch=64, listen=lambda p: notes.append(p.note))
    assert "sample_batch = 64: the run's batches stay those of 16" in notes
    assert_same(tmp_path / "run", whole[0])
