"""What happens when memory runs out: the same work in smaller parts."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from quark_fast.errors import OutOfResources
from quark_fast.runtime.run_folder import RunFolder


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


def give_back_freed_memory() -> None:
    """Give the system what this process has freed and kept, between two stages that need it differently.

    What one stage leaves in pieces the next cannot use for its own, larger tensors. Without effect where libc
    has no malloc_trim.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def most_memory(device: torch.device) -> int:
    """The most memory that this process has held so far, bytes: of the GPU, if it is on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free_memory(device: torch.device) -> int | None:
    """Bytes of the GPU that tensors can still have, what PyTorch keeps unused included; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class OutOfMemory(OutOfResources):
    """Not even one sample at a time fits."""


T = TypeVar("T")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory ran out: PyTorch's, as accelerate knows it, or a library's.

    While a CUDA graph is recorded, what ran out may be all that is said: that the recording is spoiled. Of an
    operation that cannot be recorded, the error before says so; an allocation that first gives back what the
    allocator keeps has no other (github.com/pytorch/pytorch/pull/187795).
    """
    said = str(error)
    if isinstance(error, RuntimeError) and "previous error during capture" in said:
        return error.__context__ is None or is_lack_of_memory(error.__context__)
    library = isinstance(error, RuntimeError) and ("out of memory" in said or "ALLOC_FAILED" in said)
    return library or (isinstance(error, Exception) and should_reduce_batch_size(error))


@contextlib.contextmanager
def memory_errors(folder: RunFolder) -> Iterator[None]:
    """Have a lack of memory that no smaller part of the work would mend end the run with a one-line error."""
    try:
        yield
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        raise OutOfResources(
            f"out of memory ({str(error).splitlines()[0]}); free some or take a machine with more, and"
            f" {folder.how_to_go_on}. A new run takes less with a smaller --model, --lora-rank or --optimizer"
            " adamw-8bit"
        ) from error


def within_memory(
    work: Callable[[int], T],
    size: int,
    smaller: Callable[[int], None],
    anywhere: Callable[[str | None], bool] = lambda lack: lack is not None,
) -> tuple[T, int]:
    """(work(n), n) for the first n of size, its half, the half's half ... for which the memory suffices.

    ``smaller`` is called with each n but the first; ``anywhere`` returns whether any process ran out, given
    this one's error, if any.

    Raises:
        OutOfMemory: it does not suffice for 1.
    """
    while True:
        done: list[T] = []
        lack = None
        try:
            done.append(work(size))
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            lack = str(error).splitlines()[0]
        # Out of the handler: the error keeps the tensors of the pass that failed.
        if not anywhere(lack):
            return done[0], size
        if size == 1:
            raise OutOfMemory(
                "one sample in a forward pass is more than the memory holds"
                f" ({lack or 'on another process'}); what was done is in the checkpoint: go on with"
                " --resume where there is more, or start anew with fewer --max-new-tokens"
            )
        clear_device_cache(garbage_collection=True)
        size = (size + 1) // 2
        smaller(size)


def by_parts(count: int, size: int, work: Callable[[slice], T]) -> Iterator[T]:
    """``work`` on at most so many of ``count`` texts at a time, on half as many where the memory lacks."""
    start = 0
    while start < count:

        def part(size: int, start: int = start) -> T:
            return work(slice(start, start + size))

        found, size = within_memory(part, size, _warn_smaller)
        yield found
        start += size


def _warn_smaller(size: int) -> None:
    logging.getLogger(__name__).warning("out of memory: from here on %d texts side by side", size)
