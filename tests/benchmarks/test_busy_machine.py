"""benchmarks/busy_machine.py compares the same job with all cores free and with one of them taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize(("slower", "within"), [(2.4, True), (2.6, False)])
def test_every_way_of_waiting_is_measured_with_and_without_another_program(
    from_benchmarks: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    slower: float,
    within: bool,
) -> None:
    busy_machine = from_benchmarks("busy_machine")
    own = busy_machine.WAYS["sleep soon, the commands' own"]
    others: list[object] = []

    class Program:
        def __init__(self, command: list[str]) -> None:
            others.append(self)

        def kill(self) -> None:
            others.remove(self)

        def wait(self) -> None:
            pass

    def job(spins: str) -> dict[str, float]:
        times = (slower if spins == own else 9.0) if others else 1.0
        return dict.fromkeys(busy_machine.KINDS, times)

    monkeypatch.setattr(busy_machine.subprocess, "Popen", Program)
    monkeypatch.setattr(busy_machine, "job", job)
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["busy_machine.py", "--repeats", "2", "--output", str(file)])
    if within:
        busy_machine.main()
    else:
        with pytest.raises(SystemExit, match=r"2\.6 times as long, more than 2\.5"):
            busy_machine.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["times"] for row in rows] == [9.0] * 3 + [slower] * 3 + [9.0] * 3
    assert not others
