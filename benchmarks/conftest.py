"""What every benchmark shares: results in one small JSON file, and memory beside time.

pytest benchmarks/bench_loss.py --benchmark-only --results benchmarks/results/loss.json
"""

import json
import os
import shlex
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from quark_fast.runtime.machine import versions


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, help="write every row to this JSON file, with machine and command"
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--results")
    benchmarks = session.config._benchmarksession.benchmarks  # type: ignore[attr-defined]
    if path is None or not benchmarks:
        return
    about = versions(torch.device("cpu"))
    about["command"] = shlex.join(["pytest", *sys.argv[1:]])
    about["environment"] = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("QUARK_FAST_", "MALLOC_", "OMP_", "MKL_"))
    }
    rows = [
        {
            "group": bench.group,
            "name": bench.name,
            "median_ms": round(bench.stats.median * 1e3, 4),
            "min_ms": round(bench.stats.min * 1e3, 4),
            "rounds": bench.stats.rounds,
            **bench.extra_info,
        }
        for bench in benchmarks
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def peak_memory(step: Callable[[], Any]) -> int:
    """The most bytes of tensors that one call of step holds beyond those that were there before."""
    step()  # compiled, cached, warm
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((bytes_ for _, bytes_ in changes), initial=0))
