"""The short form of kill.py; the long one is `python tests/faults/kill.py --kills 100`."""

from __future__ import annotations

import json
from pathlib import Path

from warm import Process


def test_killed_runs_end_as_the_undisturbed_one_and_lose_nothing(tmp_path: Path) -> None:
    options = ["--kills", "10", "--json", str(tmp_path / "found.json")]
    command = Process("kill", *options, folder=Path(__file__).parent)
    assert command.wait(timeout=600) == 0, command.output + command.errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"] >= 10 and found["lost"] == []
