"""How threads wait is decided before torch, whose OpenMP reads the environment as it is loaded."""

import os
import subprocess
import sys

import pytest

from quark_fast.runtime.waiting import SPINS, wait_briefly


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_sleep_soon_unless_the_environment_says_how_they_are_to_wait(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_a_command_decides_before_torch_is_loaded() -> None:
    code = """
import os, sys
from quark_fast.terminal import command
def run(arguments, console, notices):
    print("torch" in sys.modules, os.environ["GOMP_SPINCOUNT"])
command(run)([])
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["False", SPINS]
