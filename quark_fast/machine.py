"""The machine: threads, precision, and the record of what a run was made with."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers

from quark_fast import __version__
from quark_fast.config import UsageError


def set_threads(threads: int) -> None:
    """Let torch use ``threads`` CPU threads; 0: $OMP_NUM_THREADS, else one for each core of this process.

    More threads than free cores are many times slower than one: they spin while they wait for each other.
    """
    if threads < 0:
        raise UsageError(f"threads = {threads}; give at least 0, 0 for every core")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or cores))


def quiet_libraries() -> None:
    """Keep transformers' and the hub's remarks and bars off a command's terminal; errors are ours to tell."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free instead of giving it back, for the life of the process.

    By default every tensor of a megabyte or more is mapped, faulted in page by page and unmapped again: over
    two million page faults for 128 completions, a third of the time. Without effect where libc has no
    mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at the most that glibc takes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def mixed_precision(wanted: str) -> str:
    """accelerate's name for a precision; "auto" is bf16 where the machine computes in it, else none."""
    if wanted == "auto":
        if torch.cuda.is_available():
            # Older GPUs emulate bf16, slowly.
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # not on a Mac
        return "bf16" if has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
    return "no" if wanted == "fp32" else wanted


def sampling_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen copies: the low half of the precision, except that CPUs compute fp16 badly."""
    name = mixed_precision(wanted)
    if name == "bf16":
        return torch.bfloat16
    return torch.float16 if name == "fp16" and device.type != "cpu" else torch.float32


def versions(device: torch.device) -> dict[str, Any]:
    """Versions, machine and command, for the run's record."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_model()} with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "quark_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "numpy": np.__version__,
        "machine": f"{processor}, {torch.get_num_threads()} threads",
        "command": shlex.join(["python", "-m", "quark_fast.train", *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    """What Linux calls the processor, with family and model (clouds hide the rest); else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"
