"""The tables of README.md, of files that do not exist yet."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from quark_fast.metrics import judge_measure


@pytest.fixture
def task_tables(from_benchmarks: Callable[[str], ModuleType]) -> ModuleType:
    return from_benchmarks("task_tables")


def row(method: str, name: str | None = None, minutes: float = 12.0, **settings: float) -> dict[str, Any]:
    """A row of peers-toxicity.json, whose numbers are those of nothing."""
    names = ("mean", judge_measure("toxicity-judge"), "perplexity", "prompt_fit", "text_accuracy")
    return {
        "method": method,
        "row": name or method,
        "settings": settings,
        "minutes": minutes,
        "all seeds": {metric: {"value": 0.2, "relative": -0.104} for metric in names},
        "seeds": [{metric: {"value": value} for metric in names} for value in (0.1, 0.3)],
    }


def test_every_method_has_a_name_and_a_line_of_its_own(task_tables: ModuleType) -> None:
    import peer_point

    assert {*task_tables.OURS, *task_tables.PEERS} == peer_point.METHODS.keys()
    rows = [
        row("base", minutes=0.0),
        row("best of 4", minutes=0.0),
        row("ours", "best token"),
        row("ours", "guided w=1.5"),
        row("Quark as published", "best token", learning_rate=1e-3),
        row("GRPO", learning_rate=1e-4, beta=0.05),
        row("RLOO", learning_rate=1.5e-4, beta=0.05),
        row("DPO", learning_rate=4e-5, beta=0.1),
        row("DPO", learning_rate=4e-5, beta=0.3),
        row("KTO", learning_rate=1e-5, beta=0.1),
        row("RAFT", learning_rate=4e-5),
    ]
    table = {"rows": rows}
    lines = task_tables.summary_table(table).splitlines()[2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        "base model",
        "best of 4",
        "unlearned: the best token in front",
        "unlearned, guided with w = 1.5",
        "Quark as published, best token, step size 1e-3",
        "GRPO of TRL, step size 1e-4",
        "RLOO of TRL, step size 1.5e-4",
        "DPO of TRL, step size 4e-5, beta 0.1",
        "DPO of TRL, step size 4e-5, beta 0.3",
        "KTO of TRL, step size 1e-5",
        "fine-tuning on the best fifth (RAFT), step size 4e-5",
    ]
    assert lines[0].endswith("| 0.200 (0.100 to 0.300) |  |"), "the base model takes no minutes"
    assert lines[1].endswith("| 0.200, -10% (0.100 to 0.300) | 0 |")

    explained = task_tables.explanations(table)
    named = [line.split("*: ")[0].removeprefix("*") for line in explained]
    assert named == [peer.name for peer in task_tables.PEERS.values()], "once each, ours in README.md"
    assert all(line.endswith(".") and "\n" not in line for line in explained)
