"""Threads and the names of precisions."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quark_fast.errors import UsageError
from quark_fast.runtime.machine import (
    _bf16_is_faster,
    _quota,
    sampling_dtype,
    set_threads,
    settled_precision,
    versions,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU without a GPU, whose bfloat16 a test decides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
def test_precision_asked_for_is_taken_whatever_the_machine(wanted: str) -> None:
    assert settled_precision(wanted) == wanted


@pytest.mark.parametrize(
    ("supported", "faster", "name"),
    [(True, True, "bf16"), (True, False, "fp32"), (False, True, "fp32")],
)
def test_auto_on_a_cpu_is_bf16_only_where_the_cpu_computes_in_it_and_gains_by_it(
    machine: pytest.MonkeyPatch, supported: bool, faster: bool, name: str
) -> None:
    machine.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    machine.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    machine.setattr("quark_fast.runtime.machine._bf16_is_faster", lambda: faster)
    assert settled_precision("auto") == name


@pytest.mark.parametrize("slow", [torch.bfloat16, torch.float32])
def test_bf16_is_faster_only_if_its_layer_takes_less_time(
    monkeypatch: pytest.MonkeyPatch, slow: torch.dtype
) -> None:
    """By a clock of its own: a layer of one dtype takes 30, every other one of the other is disturbed."""
    linear, calls, now = torch.nn.functional.linear, Counter(), 0.0

    def layer(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal now
        calls[weight.dtype] += 1
        disturbed = calls[weight.dtype] % 2 == 1
        now += 30 if weight.dtype == slow else 100 if disturbed else 1
        return linear(rows, weight)

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("quark_fast.runtime.machine.time", clock)
    monkeypatch.setattr(torch.nn.functional, "linear", layer)
    assert _bf16_is_faster.__wrapped__() == (slow == torch.float32)


def test_auto_without_onednn_is_fp32(machine: pytest.MonkeyPatch) -> None:
    def missing() -> bool:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")  # as on a Mac

    machine.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    machine.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", missing)
    assert settled_precision("auto") == "fp32"


@pytest.mark.parametrize(("native", "name"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_does_not_count_emulated_bf16(
    machine: pytest.MonkeyPatch, native: bool, name: str
) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert settled_precision("auto") == name


@pytest.mark.parametrize(
    ("wanted", "device", "dtype"),
    [
        ("bf16", CPU, torch.bfloat16),
        ("bf16", CUDA, torch.bfloat16),
        ("fp16", CUDA, torch.float16),
        ("fp16", CPU, torch.float32),  # CPUs compute fp16 badly
        ("fp32", CPU, torch.float32),
        ("fp32", CUDA, torch.float32),
    ],
)
def test_frozen_copies_have_the_low_half_of_the_precision(
    wanted: str, device: torch.device, dtype: torch.dtype
) -> None:
    assert sampling_dtype(wanted, device) == dtype


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def test_threads_asked_for_win_over_the_environment_and_that_over_all_cores(
    threads: pytest.MonkeyPatch,
) -> None:
    threads.setenv("OMP_NUM_THREADS", "2")
    set_threads(3)
    assert torch.get_num_threads() == 3
    set_threads(0)
    assert torch.get_num_threads() == 2
    threads.setenv("OMP_NUM_THREADS", "3,1")  # OpenMP's own form
    set_threads(0)
    assert torch.get_num_threads() == 3
    threads.setenv("OMP_NUM_THREADS", "0")  # as if it were not set
    threads.setattr("quark_fast.runtime.machine._quota", lambda: math.inf)
    set_threads(0)
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    threads.setattr(os, "sched_getaffinity", lambda _: range(5))
    threads.setattr("quark_fast.runtime.machine._quota", lambda: 2.5)
    set_threads(0)
    assert torch.get_num_threads() == 3
    with pytest.raises(UsageError, match="threads = -1"):
        set_threads(-1)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "400000 100000\n"}, 4),  # docker run --cpus=4
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"user.slice/cpu.max": "200000 100000\n", "user.slice/a.service/cpu.max": "max 100000\n"}, 2),
        ({"user.slice/cpu.max": "200000 100000\n", "user.slice/a.service/cpu.max": "50000 100000\n"}, 0.5),
        ({"other.slice/cpu.max": "50000 100000\n"}, math.inf),
    ],
)
def test_quota_of_a_container_or_of_the_groups_around_a_process_limits_its_cores(
    tmp_path: Path, files: dict[str, str], cores: float
) -> None:
    own = {"proc/self/cgroup": "1:cpu:/\n0::/user.slice/a.service\n"}
    for name, text in (own | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _quota(tmp_path) == cores


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/lib/quark_fast/train.py", "--seed", "1"], "python -m quark_fast.train --seed 1"),
        (["my runs/years.py", "--seed", "1"], "python 'my runs/years.py' --seed 1"),
        (["/lib/ipykernel_launcher.py", "-f", "k.json"], "python /lib/ipykernel_launcher.py -f k.json"),
        ([""], "python"),
    ],
    ids=["command", "program", "notebook", "terminal"],
)
def test_record_names_versions_machine_and_command(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: str
) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    record = versions(CPU)
    assert record["torch"] == torch.__version__
    assert record["machine"].endswith(", 1 thread") and record["command"] == command
