"""The docs as a newcomer follows them: all Python and the whole tutorial run, and links lead somewhere."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import export, save_tiny_model, whole_reports, word_tokenizer
from tokenizers import decoders
from transformers import AutoModelForCausalLM

from quark_fast import train
from quark_fast.config import Config
from quark_fast.errors import EXIT_STATUS, Diverged, NotUploaded, OutOfResources, UsageError
from quark_fast.model.policy import Policy
from quark_fast.training.learn import Learner
from quark_fast.training.state import State

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_line(line: str) -> None:
    """A shell line of the tutorial; a command of the package runs in this process, which has torch loaded."""
    words = shlex.split(os.path.expandvars(line))
    if words[0] == "pip":
        assert words == ["pip", "install", "-e", "."]  # as the README has it, whose own line CI runs
        return
    assert words[:2] == ["python", "-m"] and words[2].startswith("quark_fast."), line
    assert importlib.import_module(words[2]).main(words[3:]) == 0, line


def interrupt_after_a_step(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training line as it goes on with a Ctrl-C in its second step."""
    step = Learner.step

    def interrupted(self: Learner, state: State, *given: Any) -> Any:
        if state.step:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, state, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        assert train.main(shlex.split(os.path.expandvars(line))[3:]) == 130


def test_every_command_of_the_tutorial_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    page = (DOCS / "tutorial.md").read_text()
    (resume,) = re.findall(r"^    (python -m quark_fast\.train --resume .*)$", page, re.MULTILINE)
    (model,) = re.findall(r'MODEL=\$\(python -c "(.*?)"\)', page)
    tiny = save_tiny_model(tmp_path / "tiny", "llama")
    spaced = word_tokenizer()  # the tutorial's reward counts words
    spaced.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    spaced.save_pretrained(tiny)
    monkeypatch.setattr("quark_fast.data.assets.default_model", lambda: tiny)
    exec(model, {})
    monkeypatch.setenv("MODEL", capsys.readouterr().out.splitlines()[-1])
    blocks = BLOCK.findall(page)
    assert {language for language, _, _ in blocks} == {"sh", "python"} and len(blocks) == 9
    try:
        for language, file, text in blocks:
            if file:
                Path(file).write_text(text)
            elif language == "python":
                exec(compile(text, "tutorial.md", "exec"), {})
            elif "quark_fast.train" in text and "--scored" not in text:
                interrupt_after_a_step(text, monkeypatch)
                with whole_reports():
                    run_line(resume)
            else:
                for line in text.splitlines():
                    run_line(line)
    finally:
        sys.modules.pop("brevity", None)
    shown = capsys.readouterr().out
    assert "[-3, -11]" in shown
    assert len(Path("prompts.txt").read_text().splitlines()) == 128
    evaluation = json.loads(Path("runs/brevity/evaluation.json").read_text())
    assert evaluation["prompts"] == 32 and evaluation["scorer"]["name"] == "brevity:score"
    assert Path("runs/brevity/report.html").stat().st_size > 10_000
    assert Path("runs/again/finished.json").exists()


def python_blocks(page: Path) -> list[str]:
    blocks = [text for language, _, text in BLOCK.findall(page.read_text()) if language == "python"]
    assert blocks, page
    return blocks


def test_python_of_the_readme_runs_on_tiny_models_of_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    exported = tmp_path / "runs" / "toxicity" / "model"
    export(Policy.create(save_tiny_model(tmp_path / "llama", "llama"), quantiles=5), exported, torch.float32)
    # What the loss and the pool are given there without being made.
    vocabulary = 11
    given: dict[str, Any] = {
        "__name__": "readme",
        "logits": torch.randn(2, 4, vocabulary, requires_grad=True),
        "ref_logits": torch.randn(2, 4, vocabulary),
        "labels": torch.randint(vocabulary, (2, 4)),
        "mask": torch.ones(2, 4),
        "prompt_ids": [[1, 2], [3]],
        "completion_ids": [[4], [5, 6]],
        "rewards": [0.1, 0.9],
    }
    short = "rounds=1, steps=2, batch_size=4, initial_samples=1, eval_samples=1, threads=1"
    for text in python_blocks(DOCS.parent / "README.md"):
        exec(compile(text.replace('"runs/years")', f'"runs/years", {short})'), "README.md", "exec"), given)
    assert given["logits"].grad.abs().sum() > 0
    assert len(given["batch"].prompts) == 32
    evaluation = json.loads((tmp_path / "runs" / "years" / "evaluation.json").read_text())
    assert evaluation["prompts"] > 0 and evaluation["scorer"]["name"] == "readme:score"
    assert "best token" in capsys.readouterr().out


def test_python_of_the_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = save_tiny_model(tmp_path / "tiny", "llama")
    model, reference = (AutoModelForCausalLM.from_pretrained(source) for _ in range(2))
    ids = torch.randint(model.config.vocab_size, (3, 9))
    logits = torch.randn(3, 8, model.config.vocab_size, requires_grad=True)
    given: dict[str, Any] = {
        **{"torch": torch, "model": model, "reference": reference, "ids": ids, "mask": torch.ones(3, 8)},
        **{"logits": logits, "ref_logits": torch.randn_like(logits), "labels": ids[:, 1:]},
    }
    for text in python_blocks(DOCS / "library.md"):
        exec(compile(text, "library.md", "exec"), given)
    torch.testing.assert_close(given["out"].kl, torch.zeros(3, 8), rtol=0, atol=1e-5)
    assert (tmp_path / "pool.safetensors").exists()


def test_python_of_the_page_on_watching_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    given: dict[str, Any] = {
        "score": lambda prompts, completions, **columns: [-len(text) for text in completions],
        "openings": [f"In the year {year}" for year in range(1900, 1940)],
    }
    short = "rounds=1, steps=2, batch_size=4, initial_samples=1, eval_samples=1, threads=1"
    (text,) = python_blocks(DOCS / "watching.md")
    exec(compile(text.replace('"runs/watched")', f'"runs/watched", {short})'), "watching.md", "exec"), given)
    assert len(given["losses"]) == 2 and given["run"].table["prompts"] > 0


def test_exit_statuses_of_the_docs_are_those_of_the_errors() -> None:
    table = dict(re.findall(r"^\| (\d+) \| ([^|]*) \|", (DOCS / "watching.md").read_text(), re.MULTILINE))
    named = re.findall(r"(\d+) ", EXIT_STATUS)
    assert list(table) == named
    said = {UsageError: "cannot be done", Diverged: "diverged", OutOfResources: "memory or disk"}
    said[NotUploaded] = "could not upload"
    for error, words in said.items():
        assert words in table[str(error.exit_status)]


def anchors_of(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_work_of_a_default_step_is_that_of_its_file() -> None:
    file = DOCS.parent / "benchmarks" / "results" / "main-job-default.json"
    stages = json.loads(file.read_text())["stages"]
    learning = [stage["tflop"] for stage in stages if "learning" in stage["stage"]]
    a_step = sum(learning) / len(learning) / Config(task="toxicity").steps
    assert f"| {a_step:.2f} TFLOP ([its stages]" in (DOCS / "gpu.md").read_text()
    assert f"(with LoRA {1000 * a_step:.0f})" in (DOCS / "speed.md").read_text()


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            led = page.parent / target if target else page
            assert led.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors_of(led), f"{page.name} links to {target}#{anchor}"
