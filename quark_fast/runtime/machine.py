"""The machine: threads, precision, and the record of what a run was made with."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import accelerate
import numpy as np
import torch
import transformers
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from quark_fast import __version__
from quark_fast.errors import UsageError

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def set_threads(threads: int) -> None:
    """Let torch use ``threads`` CPU threads; 0: $OMP_NUM_THREADS, else one for each core of this process.

    Of cores that are limited to a share of their time, as a container's, so many as that share amounts to.
    More threads than free cores are many times slower than one: they spin while they wait for each other.
    """
    if threads < 0:
        raise UsageError(f"threads = {threads}; give at least 0, 0 for every core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = math.ceil(min(cores, _quota()))
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # "4,1": of nested regions, too
    torch.set_num_threads(threads or (int(asked) if asked.isdecimal() else 0) or cores)


def _quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that control groups leave this process, as in a container; inf: no limit."""
    groups = root / "sys/fs/cgroup"
    # A container sees its own group as the root; a service's or a user's is within others, whose limits hold.
    own = groups / _text(root / "proc/self/cgroup").partition("0::/")[2].strip()
    found = [_text(group / "cpu.max") for group in (own, *own.parents)]
    v1 = groups / "cpu"
    found.append(f"{_text(v1 / 'cpu.cfs_quota_us')} {_text(v1 / 'cpu.cfs_period_us')}")
    # Without a limit there is "max", or -1.
    limits = [re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", text) for text in found]
    return min((int(limit[1]) / int(limit[2]) for limit in limits if limit), default=math.inf)


def _text(path: Path) -> str:
    """What stands in the file; "" without one."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def quiet_libraries() -> None:
    """Keep transformers' and the hub's messages off the terminal; commands print errors themselves."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers for models that a run loads and saves; the hub's, of downloads, stay."""
    logs, of_hub = transformers.logging, not are_progress_bars_disabled()
    if not logs.is_progress_bar_enabled():
        yield
        return
    logs.disable_progress_bar()  # type: ignore[no-untyped-call]  # and the hub's
    if of_hub:
        enable_progress_bars()
    try:
        yield
    finally:
        logs.enable_progress_bar()  # type: ignore[no-untyped-call]
        if not of_hub:
            disable_progress_bars()


def settled_precision(wanted: Precision) -> Precision:
    """The precision for "auto": bf16 where the machine is fast in it, else fp16 on a GPU, fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        # Older GPUs emulate bf16, slowly.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # not on a Mac
    has_bf16 = has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if has_bf16 and _bf16_is_faster() else "fp32"


@functools.cache
def _bf16_is_faster() -> bool:
    """Whether a layer of a small model takes less time in bf16 than in fp32 on this CPU.

    Having the instructions proves little: on an EPYC they double the speed, on a Xeon whose tiles (AMX) are
    hidden from a virtual machine bf16 takes 1.6 times as long as fp32. 0.1 seconds, once a process.
    """

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(128, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        best = math.inf  # the least of several is the one that nothing else on the machine disturbed
        for _ in range(8):
            started = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            best = min(best, time.perf_counter() - started)
        return best

    with torch.inference_mode():
        return seconds(torch.bfloat16) < seconds(torch.float32)


def sampling_dtype(wanted: Precision, device: torch.device) -> torch.dtype:
    """The dtype of frozen copies: the low half of the precision, except that CPUs compute fp16 badly."""
    name = settled_precision(wanted)
    if name == "bf16":
        return torch.bfloat16
    return torch.float16 if name == "fp16" and device.type != "cpu" else torch.float32


def versions(device: torch.device) -> dict[str, Any]:
    """Versions, machine and command, for the run's record."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_model()} with {torch.backends.cpu.get_cpu_capability()}"
    threads = torch.get_num_threads()
    return {
        "quark_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "machine": f"{processor}, {threads} thread{'s' * (threads > 1)}",
        "command": shlex.join(["python", *_program(), *sys.argv[1:]]),
    }


def _program() -> list[str]:
    """What Python was started with: one of the commands, a program of the user's, or nothing."""
    started = Path(sys.argv[0])
    if started.parent.name == "quark_fast":
        return ["-m", f"quark_fast.{started.stem}"]
    return [sys.argv[0]] if sys.argv[0] else []


def _cpu_model() -> str:
    """What Linux calls the processor, with family and model (clouds hide the rest); else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"
