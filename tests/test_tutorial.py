"""docs/tutorial.md as a newcomer follows it: every block in order, in one folder, on a tiny model."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_model

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


def test_every_block_of_the_tutorial_runs_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MODEL", str(save_tiny_model(tmp_path / "tiny", "llama")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    blocks = BLOCK.findall((DOCS / "tutorial.md").read_text())
    assert {language for language, _, _ in blocks} == {"sh", "python"} and len(blocks) == 7
    try:
        for language, file, text in blocks:
            if file:
                Path(file).write_text(text)
            elif language == "python":
                exec(compile(text, "tutorial.md", "exec"), {})
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


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
