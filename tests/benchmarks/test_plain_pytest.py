"""The benchmarks, and test files one by one, without pytest-xdist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("what", [["benchmarks/", "--benchmark-only"], ["tests/test_config.py"]])
def test_it_is_collected_without_xdist(what: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "--collect-only", *what]
    # As outside of xdist, by whose worker this may be run.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests collected" in done.stdout
