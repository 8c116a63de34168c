"""The short form of kill.py; the long one is `python tests/faults/kill.py --kills 100`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_killed_runs_end_as_the_undisturbed_one_and_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "kill.py"), "--kills", "10"]
    done = subprocess.run([*command, "--json", str(tmp_path / "found.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"] >= 10 and found["lost"] == []
