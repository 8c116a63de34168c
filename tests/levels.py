"""Tests again with the C++ kernels of one instruction-set level, which a process chooses once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quark_fast import _C

LEVELS = ["v2", "v3", "v4"]


def in_a_new_process(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    # Without a conftest.py this folder is not searched by itself.
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "QUARK_FAST_ISA": level, "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )


def run_again_at(level: str, file: str, chosen: str, *options: str) -> None:
    """The file's tests that ``chosen`` names, with the kernels of the level; skips one that is not here."""
    known = in_a_new_process(level, "-c", "from quark_fast import _C; print(_C.isa())")
    if known.returncode != 0:
        assert "lacks that level" in known.stderr or "not a level of this build" in known.stderr
        pytest.skip(known.stderr.strip().splitlines()[-1])
    assert known.stdout.strip() == level
    if os.environ.get("QUARK_FAST_ISA") == level or _C.isa() == level:
        return  # this process runs all of its tests at that level
    alone = ["-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *options]
    tests = in_a_new_process(level, *alone, "-k", chosen, file)
    assert tests.returncode == 0, tests.stdout
