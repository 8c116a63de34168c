"""The benchmarks, and test files one by one, without pytest-xdist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from warm import Process

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("what", [["benchmarks/", "--benchmark-only"], ["tests/test_config.py"]])
def test_it_is_collected_without_xdist(what: list[str]) -> None:
    # As outside of xdist, by whose worker this may be run.
    plain = {name: None for name in os.environ if name.startswith("PYTEST")}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--collect-only"]
    done = Process("pytest", *options, *what, folder=ROOT, environment=plain)
    assert done.wait() == 0, done.output + done.errors
    assert "tests collected" in done.output
