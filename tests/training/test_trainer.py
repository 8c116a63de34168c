"""The loop on a problem known to be learnable, its resume, and what it writes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from accelerate.state import GradientState
from conftest import whole_reports
from huggingface_hub import ModelCard
from tiny_runs import PROMPTS, SHORT, copies_at, even_words, rows, small, timeless
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM
from warm import Process

from quark_fast.errors import Interrupted, UsageError
from quark_fast.model import copies
from quark_fast.model.batch import Counts
from quark_fast.model.check_model import Checked, check_model
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading
from quark_fast.rewards.reward import Reward
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.training import checkpoint
from quark_fast.training.progress import Progress
from quark_fast.training.trainer import Trainer


def test_sharded_model_whose_rows_must_not_be_padded_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(policy: Policy, *_: object, **__: object) -> Checked:
        policy.reading = Reading(padding=False)
        return Checked(True, ["checked"])

    monkeypatch.setattr("quark_fast.training.start.check_model", check)
    given = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    Trainer(small(tmp_path / "one", tiny_model()), **given)
    monkeypatch.setattr(
        "accelerate.Accelerator.distributed_type", property(lambda _: DistributedType.FSDP), raising=False
    )
    monkeypatch.setattr(Processes, "check", lambda *_: None)
    with pytest.raises(UsageError, match=r"rows of different lengths must not .*without --use_fsdp"):
        Trainer(small(tmp_path / "two", tiny_model()), **given)


def shares_of_odd_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if value is None else 1 - value for value in even_words(prompts, completions)]


def test_texts_given_to_the_trainer_are_the_settings_of_that_name(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Not a reward that is called, and not prompts of one letter each."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    spec = f"2*{__name__}:shares_of_odd_words"
    trainer = Trainer(small(tmp_path / "run", tiny_model()), reward=spec, prompts=file, held_out=np.int64(3))
    assert trainer.setup.reward.name == spec
    assert (trainer.config.reward, trainer.config.prompts) == (spec, str(file))
    assert len(trainer.setup.prompts.held_out.rows) == 3


@pytest.mark.usefixtures("no_plots")
def test_judge_takes_no_part_in_training_and_stands_in_table_headline_and_report(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    spec = f"{__name__}:shares_of_odd_words"
    given = {"reward": even_words, "prompts": PROMPTS}
    folders = []
    for judge in ("none", spec):
        config = small(tmp_path / f"judge-{judge[:4]}", tiny_model(), judge=judge, **SHORT)
        config.evaluate_on = "development"
        with whole_reports() if judge == spec else contextlib.nullcontext():
            folders.append(Trainer(config, **given, held_out=PROMPTS[:10]).train().folder)
    plain, judged = map(_evaluation, folders)
    assert timeless(folders[0] / "metrics.jsonl") == timeless(folders[1] / "metrics.jsonl")
    for before, after in zip(plain["rows"], judged["rows"], strict=True):
        assert before["metrics"].items() <= after["metrics"].items()
        mean, judged_mean = (after["metrics"][key]["value"] for key in ("mean", f"judge {spec}"))
        assert judged_mean == pytest.approx(1 - mean)
    assert (judged["split"], judged["prompts"]) == ("development", 6)
    assert "which took no part in training, score with" in (folders[1] / "report.html").read_text()
    trained = {row["prompt"] for row in rows(folders[1] / "completions.jsonl")}
    measured = {row["prompt"] for row in rows(folders[1] / "held_out.jsonl")}
    assert not trained & measured and trained | measured == set(PROMPTS)


def test_reward_rises_and_best_is_above_none_above_worst(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = tmp_path / "run"
    config = small(folder, tiny_model(), eval_rows="all")
    trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:10])
    trainer.train()
    rounds = rows(folder / "metrics.jsonl", kind="round")
    assert rounds[-1]["reward_mean"] > rounds[0]["reward_mean"] + 0.2
    table = {row["name"]: row["metrics"]["mean"]["value"] for row in _evaluation(folder)["rows"]}
    assert table["best token"] > table["no token"] > table["worst token"]
    assert table["best token"] > table["base model"] + 0.2


def test_probe_and_the_next_rounds_samples_are_of_one_copy_which_is_gone_while_learning(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    own = copies.frozen_copy

    def counted(*given: Any) -> Any:
        model = own(*given)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(copies, "frozen_copy", counted)
    config = small(tmp_path / "run", tiny_model(), **SHORT | {"rounds": 3, "steps": 2, "explore_samples": 2})
    trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4])
    step = trainer.learner.step

    def watched(*given: Any) -> Any:
        gc.collect()
        assert not [model for model in made if model() is not None]
        return step(*given)

    object.__setattr__(trainer.learner, "step", watched)
    trainer.train()
    assert len(made) == 3, "one after each round's learning"


def _evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_precision_that_a_run_began_with_is_kept_when_it_is_resumed(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()

    def precision(found: str, resume: bool) -> str:
        monkeypatch.setattr("quark_fast.training.start.settled_precision", lambda wanted: found)
        config = small(tmp_path / "run", model, precision="auto", resume=resume)
        return Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4]).config.precision

    assert precision("bf16", resume=False) == "bf16"
    assert precision("fp32", resume=True) == "bf16"


# Kills while it samples and evaluates are in test_interrupted.py.
KILLS = [
    ("round 1/2: learning", 1),  # before the first checkpoint
    ("round 1/2: learning", 5),
    ("round 2/2: learning", 1),
    ("round 2/2: learning", 5),
]


def test_run_killed_while_it_learns_resumes_to_identical_results(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()

    def run(name: str, resume: bool = False) -> None:
        listen = (lambda _: None) if resume else copies_at(KILLS, tmp_path / name)
        longer = {"rounds": 2, "explore_samples": 2, "eval_samples": 2, "sample_batch": 16}
        config = small(tmp_path / name, model, **(SHORT | longer), resume=resume)
        trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4], listen=listen)
        trainer.train()

    run("undisturbed")
    for number, kill in enumerate(KILLS):
        name = f"killed-{number}"
        run(name, resume=True)
        for file in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl"):
            assert timeless(tmp_path / name / file) == timeless(tmp_path / "undisturbed" / file), (kill, file)


def test_sigkilled_process_resumes_and_ctrl_c_leaves_a_checkpoint(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    (tmp_path / "evens.py").write_text(
        "def reward(prompts, completions, **columns):\n"
        "    return [text.count('w') % 7 / 7 for text in completions]\n"
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small(
        tmp_path / "run",
        tiny_model(),
        reward="evens:reward",
        prompts=str(tmp_path / "prompts.txt"),
        **SHORT | {"rounds": 3, "steps": 40, "explore_samples": 2, "checkpoint_every": 5},
    ).save(tmp_path / "run.yaml")

    def start(*flags: str) -> Process:
        return Process("quark_fast.train", *flags, folder=tmp_path)

    def wait_for_steps(process: Process, count: int) -> None:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count('"step": ') >= count:
                return
            time.sleep(0.02)
        raise AssertionError(f"ended early: {process.errors}")

    with_file = ["--config", str(tmp_path / "run.yaml")]
    process = start(*with_file)
    wait_for_steps(process, 20)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process = start(*with_file, "--resume")  # with the same file; below from the run folder's own settings
    wait_for_steps(process, 60)
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert "--resume" in process.errors
    steps = [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl", kind="step")]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or repeated"
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert state["step"] == steps[-1], "Ctrl-C saves the very step it stopped at"
    process = start("--resume", "--output", str(tmp_path / "run"))
    assert process.wait() == 0, process.errors
    steps = [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl", kind="step")]
    assert steps == list(range(1, 3 * 40 + 1)), "a bare --resume goes on with the run's own settings"


def test_signal_after_a_step_has_decided_stops_with_the_next_ones_checkpoint(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    config = small(tmp_path / "run", tiny_model(), **(SHORT | {"checkpoint_every": 100}))
    trainer = Trainer(config, **given)
    decides = Processes.any

    def then_a_signal(self: Processes, here: bool) -> bool:
        found = decides(self, here)
        if trainer.state.step == 1 and trainer.work.stop is not None:
            trainer.work.stop.asked = True
        return found

    monkeypatch.setattr(Processes, "any", then_a_signal)
    with pytest.raises(Interrupted, match="stopped in round 1 at step 2"):
        trainer.train()
    assert json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"] == 2


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_signal_does_not_wait_for_a_reward_that_hangs(
    tmp_path: Path, tiny_model: Callable[..., Path], name: signal.Signals
) -> None:
    calls: list[int] = []

    async def hangs(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(prompts))
        if len(calls) == 2:  # the first is the check before the run
            threading.Timer(0.05, os.kill, (os.getpid(), name)).start()
        if len(calls) > 1:
            await asyncio.sleep(600)
        return [0.0] * len(prompts)

    config = small(tmp_path / "run", tiny_model(), reward_batch=10_000)
    trainer = Trainer(config, reward=hangs, prompts=PROMPTS, held_out=PROMPTS[:4])
    with pytest.raises(Interrupted, match=f"--resume --output {tmp_path / 'run'}"):
        trainer.train()
    assert len(calls) in (2, 3), "of the round's two batches the second may have been sampled by then"


def test_folder_of_a_run_is_never_overwritten(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        Trainer(small(tmp_path / "run", tiny_model()), reward=even_words, prompts=PROMPTS, held_out=PROMPTS)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage.endswith("learning"):
            raise SystemError

    given = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    with pytest.raises(SystemError):
        Trainer(small(tmp_path / "run", tiny_model("llama"), **SHORT), listen=stop, **given).train()
    with pytest.raises(UsageError, match="resume it with its own"):
        Trainer(small(tmp_path / "run", tiny_model("gpt2"), **SHORT, resume=True), **given)


def test_resume_with_other_training_prompts_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage.endswith("learning"):
            raise SystemError

    model, given = tiny_model(), {"reward": even_words, "held_out": PROMPTS[:4]}
    with pytest.raises(SystemError):
        Trainer(small(tmp_path / "run", model, **SHORT), listen=stop, prompts=PROMPTS, **given).train()
    for other in (PROMPTS[:-1], PROMPTS[::-1]):
        with pytest.raises(UsageError, match="training prompts are not those"):
            Trainer(small(tmp_path / "run", model, **SHORT, resume=True), prompts=other, **given)


def test_messages_are_prompts_of_a_run(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model()
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} w9 {% endfor %}")
    heard: list[Any] = []

    def reward(prompts: list[str], completions: list[str], messages: list[Any]) -> list[float | None]:
        heard.append((prompts[0], messages[0]))
        return even_words(prompts, completions)

    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    given = {"prompts": [{"prompt": m} for m in asked[4:]], "held_out": [{"prompt": m} for m in asked[:4]]}
    Trainer(small(tmp_path / "run", model, **SHORT | {"steps": 1}), reward=reward, **given).train()
    prompts = {row["prompt"] for row in rows(tmp_path / "run" / "completions.jsonl")}
    assert prompts == {f"{text} w9 " for text in PROMPTS[4:]}
    assert all(prompt == f"{messages[0]['content']} w9 " for prompt, messages in heard)


@pytest.mark.parametrize(("device", "found"), [("cpu", 2), (None, 2), ("cuda", 8)])
def test_memory_of_another_kind_of_device_says_nothing_of_this_ones(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    device: str | None,
    found: int,
) -> None:
    own = checkpoint.load_checkpoint

    def elsewhere(folder: RunFolder) -> Any:
        loaded = own(folder)
        assert loaded is not None and loaded[0].pop("device") == "cpu"
        loaded[0].update({"micro_batch": [8, 2, 1]} | ({"device": device} if device else {}))
        return loaded

    def stop(progress: Progress) -> None:
        if progress.stage.endswith("learning"):
            raise Interrupted

    given = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    config = small(tmp_path / "run", tiny_model(), **SHORT | {"micro_batch": 8})
    with pytest.raises(Interrupted):
        Trainer(config, listen=stop, **given).train()
    monkeypatch.setattr(checkpoint, "load_checkpoint", elsewhere)
    resumed = Trainer(dataclasses.replace(config, resume=True), listen=None, **given)
    assert resumed.state.micro_batch == found


def test_micro_batches_add_up_to_the_whole_batch(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = tiny_model()
    losses = []
    for size in (32, 5):
        config = small(
            tmp_path / f"micro-{size}",
            model,
            **SHORT | {"steps": 3, "batch_size": 32},
            micro_batch=size,
            entropy_coef=0.1,
            unlikelihood_coef=1.0,
            unlikelihood_ngram=1,
        )
        folder = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:2]).train().folder
        steps = rows(folder / "metrics.jsonl", kind="step")
        losses.append([row[name] for row in steps for name in ("loss", "grad_norm", "unlikelihood")])
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)  # float32 sums in another order, three Adam steps


def test_other_trainings_accumulation_in_the_process_is_not_the_runs(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    alone = Trainer(small(tmp_path / "alone", tiny_model(), **SHORT), **given).train().folder
    # As a launcher's file of settings has it, and transformers' trainer when it is stopped in between.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setattr(GradientState(), "sync_gradients", False)
    after = Trainer(small(tmp_path / "after", tiny_model(), **SHORT), **given).train().folder
    assert timeless(after / "metrics.jsonl") == timeless(alone / "metrics.jsonl")


def test_gradients_switched_off_before_are_the_runs_all_the_same(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quark_fast.training.start.check_model", check_model)
    in_reward: list[bool] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        in_reward.append(torch.is_grad_enabled())
        return even_words(prompts, completions)

    with torch.set_grad_enabled(False):
        given = {"prompts": PROMPTS, "held_out": PROMPTS[:4]}
        trainer = Trainer(small(tmp_path / "run", tiny_model(), **SHORT), reward=reward, **given)
        folder = trainer.train().folder
    assert all(row["grad_norm"] > 0 for row in rows(folder / "metrics.jsonl", kind="step"))
    assert not any(in_reward), "the user's own code has them as the user left them"


# In fp32 gpt2 trains in test_prompts_left_out_are_told_in_the_run, and qwen2 in test_distributed.py.
@pytest.mark.parametrize(("architecture", "precision"), [("gpt2", "fp16"), ("qwen2", "bf16")])
def test_other_architectures_and_precisions_train(
    tmp_path: Path, tiny_model: Callable[..., Path], architecture: str, precision: str
) -> None:
    model = tiny_model(architecture, padded_vocabulary=10)
    few = SHORT | {"rounds": 2, "steps": 4, "precision": precision, "contrast_coef": 0.0}
    config = small(tmp_path / "run", model, **few)
    folder = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4]).train().folder
    card = ModelCard.load(folder / "model" / "README.md")
    assert "to write what its reward function scores high" in card.text and card.data.license is None
    assert len(rows(folder / "metrics.jsonl", kind="step")) == 8
    assert not (folder / "checkpoint").exists(), "a finished run keeps no checkpoint"


def test_fp16_scales_the_loss_and_the_scale_survives_a_resume(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    given = {"reward": even_words, "prompts": PROMPTS, "held_out": PROMPTS[:4]}
    settings = SHORT | {"precision": "fp16"}

    def stop(progress: Progress) -> None:
        if progress.stage.endswith("learning") and progress.done == 5:
            raise SystemError

    with pytest.raises(SystemError):
        Trainer(small(tmp_path / "run", model, **settings), listen=stop, **given).train()
    trainer = Trainer(small(tmp_path / "run", model, **settings, resume=True), **given)
    assert trainer.accelerator.scaler.get_scale() > 1
    assert trainer.state.step == 4
    trainer.train()
    Trainer(small(tmp_path / "whole", model, **settings), **given).train()
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        assert timeless(tmp_path / "run" / file) == timeless(tmp_path / "whole" / file)


def test_reward_that_fails_mid_run_loses_nothing_that_was_saved(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    calls = iter(range(10**9))

    def fails_later(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if next(calls) == 4:
            raise ConnectionError("scorer is down")
        return even_words(prompts, completions)

    model = tiny_model()
    given = {"prompts": PROMPTS, "held_out": PROMPTS[:4]}
    settings = {"rounds": 2, "steps": 6, "batch_size": 8, "sample_batch": 96, "eval_samples": 1}
    with pytest.raises(UsageError, match="scorer is down"):
        Trainer(small(tmp_path / "run", model, **settings), reward=fails_later, **given).train()
    assert (tmp_path / "run" / "checkpoint" / "state.json").exists()
    config = small(tmp_path / "run", model, **settings, resume=True)
    with pytest.raises(UsageError, match="--accept-changed-reward"):
        Trainer(config, reward=even_words, **given)
    Trainer(dataclasses.replace(config, accept_changed_reward=True), reward=even_words, **given).train()
    assert len(rows(tmp_path / "run" / "metrics.jsonl", kind="step")) == 12


def test_pool_of_a_run_is_numpys_rule_on_what_the_run_wrote(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Rewards with many ties and unscored completions, of the loop's own sampling and resume."""

    def stop(progress: Progress) -> None:
        if progress.stage == "round 2/2: learning" and progress.done > 5:
            raise SystemError

    def coarse(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        shares = even_words(prompts, completions)
        return [None if share is None or share == 1 else round(3 * share) / 3 for share in shares]

    folder, model = tmp_path / "run", tiny_model()
    short = {"rounds": 2, "steps": 8, "batch_size": 8, "checkpoint_every": 3, "eval_samples": 1}
    given = {"reward": coarse, "prompts": PROMPTS, "held_out": PROMPTS[:2]}
    with pytest.raises(SystemError):
        Trainer(small(folder, model, **short), listen=stop, **given).train()
    trainer = Trainer(small(folder, model, resume=True, **short), **given)
    trainer.train()

    written = rows(folder / "completions.jsonl")
    rounds = rows(folder / "metrics.jsonl", kind="round")
    assert any(row["reward"] is None for row in written)
    rewards: list[float] = []
    for about in rounds:
        of_round = [r for r in written if r["round"] == about["round"] and r["reward"] is not None]
        rewards += [row["reward"] for row in of_round]
        levels, n = Counter(rewards), len(rewards)
        assert len(levels) > 2
        quantile = {}
        for level, equal in levels.items():
            better = sum(count for other, count in levels.items() if other > level)
            cuts = [-(-j * n // 3) for j in (1, 2)]
            quantile[level] = 2 - sum(2 * cut < 2 * better + equal for cut in cuts)
        quantile[min(levels)], quantile[max(levels)] = 0, 2
        thresholds = [min(level for level in levels if quantile[level] > k) for k in (0, 1)]
        assert about["thresholds"] == thresholds
        expected = [sum(row["reward"] >= t for t in thresholds) for row in of_round]
        assert [row["quantile"] for row in of_round] == expected
        assert about["pool"] == len(rewards)

    pool = trainer.state.pool
    scored = [row for row in written if row["reward"] is not None]
    held = pool[pool.ids]
    assert pool.unscored == len(written) - len(scored)
    assert held.rewards.tolist() == rewards
    assert held.rounds.tolist() == [row["round"] for row in scored]
    decode = trainer.policy.decode
    assert [decode(row.tolist()) for row in held.completions] == [row["completion"] for row in scored]
    encoded = [trainer.policy.encode(row["prompt"], trainer.config.max_prompt_tokens) for row in scored]
    assert [row.tolist() for row in held.prompts] == encoded
    assert held.quantiles.tolist() == [sum(r >= t for t in thresholds) for r in rewards]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_gives_the_gradients_of_the_formula_without_dropout(
    tmp_path: Path, tiny_model: Callable[..., Path], architecture: str
) -> None:
    if architecture == "opt":  # its layers drop out by themselves, not by a part of theirs
        model = tiny_model()
        shape = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        words = {"vocab_size": 62, "eos_token_id": 60, "bos_token_id": 60, "pad_token_id": 60}
        OPTForCausalLM(OPTConfig(dropout=0.5, word_embed_proj_dim=32, **shape, **words)).save_pretrained(
            model
        )
    else:
        model = tiny_model(architecture)
    found, calls = [], []
    for checkpointing in (False, True):
        config = small(tmp_path / f"run-{checkpointing}", model, gradient_checkpointing=checkpointing)
        trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:2])
        body = trainer.policy.model.base_model
        layers = getattr(body, "layers", None) or getattr(body, "h", None) or body.decoder.layers
        # Within the layer: hooks of the layer itself stay outside of what is computed again.
        inner = next(layers[0].children())
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss, _ = trainer.setup.objective([[1, 2], [3]], [[4, 5, 6], [7]], [0, 2], Counts(4, 2, 0))
        before = len(calls)
        loss.backward()
        assert (len(calls) > before) is checkpointing, "the layer is computed again, or not"
        found.append({n: p.grad for n, p in trainer.policy.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=0)


# --- coarse rewards -------------------------------------------------------------------------------


def test_yes_or_no_puts_failures_under_the_worst_token_and_successes_under_the_best(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def passes(prompts: list[str], completions: list[str], **columns: Any) -> list[bool]:
        return [text.startswith("w7") for text in completions]

    config = small(tmp_path / "run", tiny_model(), rounds=1, steps=4, quantiles=5, eval_samples=1)
    trainer = Trainer(config, reward=passes, prompts=PROMPTS, held_out=PROMPTS[:4])
    trainer.train()
    written = rows(tmp_path / "run" / "completions.jsonl")
    share = sum(row["reward"] for row in written) / len(written)
    assert 0.01 < share < 0.2, "so few that all were labelled best before"
    assert all(row["quantile"] == (4 if row["reward"] else 0) for row in written)
    labels = trainer.state.pool.labels()[: len(trainer.state.draws)]
    drawn = [int(trainer.state.draws[labels == k].sum()) for k in range(5)]
    assert drawn == [64, 0, 0, 0, 64], "half of the draws each"


def constant_until(round_of_change: int) -> Callable[..., list[float | None]]:
    """All rewards are 0 until the prompts have been scored in so many rounds."""
    scored: Counter[str] = Counter()

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        scored.update(set(prompts))
        late = max(scored[prompt] for prompt in prompts) > round_of_change + 1  # the check is one
        return even_words(prompts, completions) if late else [0.0] * len(completions)

    return reward


def test_pool_of_one_reward_ends_the_run_in_one_line_and_keeps_its_samples(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    notes: list[str] = []
    config = small(tmp_path / "run", tiny_model(), rounds=2, steps=4, initial_samples=2, explore_samples=1)
    trainer = Trainer(
        config,
        reward=lambda prompts, completions, **_: [0.25] * len(prompts),
        prompts=PROMPTS,
        held_out=PROMPTS[:4],
        listen=lambda progress: notes.append(progress.note),
    )
    with pytest.raises(UsageError, match=r"all 72 rewards are 0\.25.*completions\.jsonl.*--initial-samples"):
        trainer.train()
    assert [note for note in notes if "all 48 rewards are 0.25" in note]
    assert len(rows(tmp_path / "run" / "completions.jsonl")) == 72
    assert not rows(tmp_path / "run" / "metrics.jsonl", kind="step")
    assert (tmp_path / "run" / "checkpoint").exists()


def test_round_without_a_second_reward_is_left_out_and_the_next_learns(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    settings = {"rounds": 3, "steps": 4, "initial_samples": 1, "explore_samples": 1, "checkpoint_every": 2}
    settings |= {"guidance": 1.5, "batch_size": 8, "eval_samples": 2}
    given = {"prompts": PROMPTS, "held_out": PROMPTS[:4]}

    def train(name: str, die_at: str = "", resume: bool = False, **more: Any) -> Trainer:
        def listen(progress: Progress) -> None:
            if die_at and progress.stage.startswith(die_at) and progress.done == 3:
                raise SystemError

        config = small(tmp_path / name, model, **settings, resume=resume, **more)
        trainer = Trainer(config, listen=listen, **given, reward=reward)
        trainer.train()
        return trainer

    reward: Any = constant_until(1)
    trainer = train("whole")
    steps = rows(tmp_path / "whole" / "metrics.jsonl", kind="step")
    assert [(row["step"], row["round"]) for row in steps] == [(i + 1, 1 + i // 4) for i in range(8)]
    assert trainer.state.left_out == 1
    # The schedule is that of two rounds: it falls to its end.
    assert steps[-1]["lr"] == pytest.approx(trainer.config.learning_rate * trainer.config.decay(7, 2))
    assert [row["guidance"] for row in rows(tmp_path / "whole" / "metrics.jsonl", kind="round")] == [
        1,
        1,
        1.5,
    ]
    reward = constant_until(1)
    with pytest.raises(SystemError):
        train("run", die_at="round 2/3: learning")
    train("run", resume=True)
    for file in ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl"):
        assert timeless(tmp_path / "run" / file) == timeless(tmp_path / "whole" / file)


@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_tokens_that_training_touched_stay_as_it_left_them(
    tmp_path: Path, tiny_model: Callable[..., Path], contrast: float
) -> None:
    config = small(
        tmp_path / "run",
        tiny_model(),
        **SHORT | {"steps": 3},
        quantile_weights="best",
        contrast_coef=contrast,
    )
    trainer = Trainer(config, reward=even_words, prompts=PROMPTS, held_out=PROMPTS[:4])
    trained: list[torch.Tensor] = []
    own = trainer._probe

    def probe() -> None:
        trained.append(trainer.policy.model.get_input_embeddings().rows.detach().clone())
        own()

    trainer._probe = probe  # type: ignore[method-assign]
    trainer.train()
    worst, between, best = trainer.policy.model.get_input_embeddings().rows.detach()
    torch.testing.assert_close(best, trained[0][2], rtol=0, atol=0)
    if contrast:  # its mirror token was trained as well
        torch.testing.assert_close(worst, trained[0][0], rtol=0, atol=0)
        torch.testing.assert_close(between, (worst + best) / 2)
    else:
        torch.testing.assert_close(worst, best, rtol=0, atol=0)


def test_check_at_the_start_scores_completions_of_the_model(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    heard: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        heard.extend(zip(prompts, completions, strict=True))
        # A prompt in place of a completion would be left out, and so are most completions.
        return [1.0 if text.count("w") == 8 and text.endswith("7") else None for text in completions]

    config = small(tmp_path / "run", tiny_model(), **SHORT)
    Trainer(config, reward=reward, prompts=PROMPTS, held_out=PROMPTS[:4])
    assert {prompt for prompt, _ in heard} <= set(PROMPTS)
    assert all(text.count("w") > 2 for _, text in heard)
    assert len(heard) in (4, 24)
    with pytest.raises(UsageError, match="scored none of 24 completions"):
        Trainer(
            small(tmp_path / "other", tiny_model(), **SHORT),
            reward=lambda prompts, completions, **_: [None] * len(prompts),
            prompts=PROMPTS,
            held_out=PROMPTS[:4],
        )
    assert not (tmp_path / "other").exists()


def test_run_of_chats_goes_on_after_midnight_with_the_date_that_it_began_with(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model()
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]

    def train(name: str, date: str, die: bool = False, resume: bool = False) -> None:
        # What a template leaves out of a message does not matter, either.
        template = "{% for m in messages %}" + date + " {{ m['content'][3:] }} w9 {% endfor %}"
        (model / "chat_template.jinja").write_text(template)

        def listen(progress: Progress) -> None:
            if die and progress.stage.endswith("1/2: learning") and progress.done == 3:
                raise SystemError

        config = small(tmp_path / name, model, **(SHORT | {"rounds": 2}), resume=resume)
        Trainer(config, reward=even_words, prompts=chats, listen=listen).train()

    train("whole", "w28")
    with pytest.raises(SystemError):
        train("run", "w28", die=True)
    train("run", "w29", resume=True)
    for file in ("completions.jsonl", "evaluation.jsonl", "held_out.jsonl", "prompts.jsonl"):
        assert timeless(tmp_path / "run" / file) == timeless(tmp_path / "whole" / file)


@pytest.mark.usefixtures("reports", "no_plots")
def test_prompts_left_out_are_told_in_the_run(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    config = small(tmp_path / "run", tiny_model("gpt2"), **SHORT, max_prompt_tokens=3)
    given = [*PROMPTS, "w1 w2 w3 w4 w5"]
    trainer = Trainer(config, reward=even_words, prompts=given, held_out=[*PROMPTS[:4], "w1 w2 w3 w4"])
    lines = [
        "held out and trained on, as the program gives them, so no test: 4 prompts",
        "1 of 25 training prompts left out: longer than 3 tokens (the longest 5)",
        "1 of 5 held-out prompts left out: longer than 3 tokens (the longest 4)",
    ]
    assert trainer.setup.prompts.notes == lines
    trainer.train()
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["prompts"] == lines
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1 of 25 training prompts left out" in page
    assert len(rows(tmp_path / "run" / "held_out.jsonl")) == 4


def test_words_of_the_task_name_the_quantiles_of_its_own_reward_alone(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def rows_with(name: str, reward: Any) -> Tensor:
        config = small(tmp_path / name, tiny_model())
        trainer = Trainer(config, reward=reward, prompts=PROMPTS, held_out=PROMPTS[:4])
        rows: Tensor = trainer.policy.model.get_input_embeddings().rows.detach().clone()
        return rows

    own = Reward(even_words, "evens", "1", "0" * 64, property="oddness")
    assert torch.equal(rows_with("reward", own), rows_with("function", even_words)), "random, as the paper's"
