"""The real parsers take what README.md and docs/ say to type, and their tables are those of the files."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

from quark_fast import ablate, evaluate, generate
from quark_fast.arguments import _ConfigParser, _without_help, parse
from quark_fast.report.results import BASE
from quark_fast.report.tables import results_table
from quark_fast.runtime.console import Terminal
from quark_fast.tasks import toxicity

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMAND = r"(?:python -m quark_fast\.|accelerate launch |python (?:benchmarks|tests)/)"


def commands_of(page: Path) -> Iterator[str]:
    """Shell lines, and what stands between backticks; what is broken over lines in one piece."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page in EXAMPLES:
        text = text.split('"""')[1]
    for line in text.splitlines():
        for part in line.split("&&"):
            if found := re.match(rf"\s*(?:\w+=\S+\s+)?({COMMAND}.*)", part):
                yield found[1]
    for inline in re.findall(rf"`({COMMAND}[^`]*)`", text):
        yield " ".join(inline.split())


COMMANDS = [(page.name, command) for page in PAGES + EXAMPLES for command in commands_of(page)]


class Parsed(BaseException):
    """Raised once the arguments are parsed, in place of the work; nothing catches it."""


@pytest.fixture
def only_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """In an empty folder: requires that a program accepts its arguments, and ends it there."""
    monkeypatch.chdir(tmp_path)
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*given: Any) -> None:
        raise Parsed(parse_args(*given))

    def check(program: Callable[[], object]) -> None:
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            program()

    return check


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_one_that_the_program_takes(
    page: str,
    command: str,
    only_parses: Callable[[Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [word for word in _without_help(shlex.split(command, comments=True)) if word != "..."]
    if words[0] == "accelerate":
        words = ["0" if word == "RANK" else word for word in words]
        words += [] if "-m" in words else ["-m", "quark_fast.train"]  # for "..."
        launched = launch_command_parser().parse_args(words[2:])
        assert launched.module, "-m"
        words = ["python", "-m", launched.training_script, *launched.training_script_args]
    if words[1] != "-m":
        check_script(ROOT / words[1], words[2:], only_parses, monkeypatch)
    elif words[2] == "quark_fast.train":
        parse(words[3:], "train")
    elif words[2] == "quark_fast.ablate":
        assert ablate.main([*words[3:], "--dry-run"]) == 0
    else:
        program = importlib.import_module(words[2])
        if hasattr(program, "__path__"):
            program = importlib.import_module(f"{words[2]}.__main__")
        only_parses(lambda: program.main(words[3:]))


def check_script(
    script: Path,
    arguments: list[str],
    only_parses: Callable[[Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "parse_args" not in script.read_text():
        assert not arguments, f"{script.name} takes none"
        return
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    only_parses(lambda: runpy.run_path(str(script), run_name="__main__"))


def test_commands_are_found_in_every_form() -> None:
    found = {name: [command for page, command in COMMANDS if page == name] for name, _ in COMMANDS}
    both = ("--top-p", "--out-of-domain")
    assert any(all(flag in command for flag in both) for command in found["README.md"]), "in two lines"
    assert any(command.startswith("accelerate") for command in found["scale.md"])
    assert found["http_reward.py"] and found["tutorial.md"] and found["results.md"]
    assert len(COMMANDS) > 40


# Flags of other programs.
VLLM = "--dtype --max-model-len --tensor-parallel-size --data-parallel-size --generation-config --host --port"
OTHERS = {*VLLM.split(), "--logit-bias", "--benchmark-only"}


def test_every_flag_that_is_named_exists() -> None:
    parsers = [
        _ConfigParser(""),
        generate.parser(),
        evaluate.parser(),
        ablate.parser(),
        launch_command_parser(),
    ]
    known = OTHERS.union(*(parser._option_string_actions for parser in parsers))
    for folder in ("benchmarks", "tests"):
        for script in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'(?:add_argument|addoption)\(\s*"(--[\w-]+)"', script.read_text()))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
        assert named <= known, f"{page.name} names {sorted(named - known)}"


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r'"\.\[([\w,]+)\]"', page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras.keys(), f"{page.name}: {names}"


def test_tables_are_those_of_the_files_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import peers
    import peers_minutes
    import task_tables

    for task in ("toxicity", "sentiment"):
        beside = json.loads((task_tables.RESULTS / f"peers-{task}.json").read_text())
        assert peers.markdown(beside) in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
        if task == "toxicity":
            assert peers.short_markdown(beside) in (ROOT / "README.md").read_text(encoding="utf-8")
    over_minutes = json.loads((task_tables.RESULTS / "peers-toxicity-minutes.json").read_text())
    assert peers_minutes.table(over_minutes) in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    judges = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
    for name in ("toxicity", "sentiment"):
        assert task_tables.judge_table(name) in judges and task_tables.terms_table(name) in judges
    assert task_tables.calibration_table("toxicity") in judges
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    of_tasks = [task_tables.task_table(task) for task in task_tables.TASKS]
    for made in (*of_tasks, task_tables.unlikelihood_table(task_tables.RESULTS / "unlikelihood.json")):
        table, scorer = made.split("\n\n")
        assert f"\n{table}\n\n" in page
        assert scorer in " ".join(page.split())


def test_readmes_example_and_its_tasks_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from task_tables import RESULTS, evaluations

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    evaluation = json.loads((RESULTS / "toxicity-seed0.json").read_text())
    evaluation["columns"] = toxicity.TASK.columns  # the terminal's of today
    shown = io.StringIO()
    Terminal(file=shown, width=80).print(results_table(evaluation))
    begin, end = "Mean toxicity on", "    ..."
    example = readme[readme.index(begin) : readme.index(end)]
    lines = [line.strip() for line in example.strip().splitlines()]
    assert lines == [line.strip() for line in shown.getvalue().splitlines()[: len(lines)]] and len(lines) > 10

    def numbers(task: str, of: Callable[[dict[str, Any]], float], row: str = "best token") -> str:
        return ", ".join(f"{100 * of(run[row]):.0f}" for run in evaluations(task))

    def change(row: dict[str, Any]) -> float:
        metric = "rep4" if "rep4" in row["change"] else "mean"
        return float(row["change"][metric]["relative"])

    def positive(row: dict[str, Any]) -> float:
        return float(row["metrics"]["target"]["value"])

    assert f"mean toxicity {numbers('toxicity', change)}% |" in readme
    were = numbers("sentiment", positive, BASE)
    assert f"{numbers('sentiment', positive)}% positive completions, where {were}% were |" in readme
    assert f"repeated 4-grams in 128 greedy tokens {numbers('repetition', change)}% |" in readme
