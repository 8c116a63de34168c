"""What a run says of its memory, against what the system says."""

from pathlib import Path

import pytest
import torch

from quark_fast.runtime.memory import give_back_freed_memory, is_lack_of_memory, most_memory


def resident() -> int:
    """Bytes of this process that are in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def test_the_most_memory_holds_what_was_there_and_is_gone() -> None:
    size = 300 << 20
    give_back_freed_memory()  # of other tests, which would be held in place of new memory
    before = resident()
    held = torch.ones(size, dtype=torch.uint8)
    assert most_memory(torch.device("cpu")) >= before + size * 0.9
    del held
    assert most_memory(torch.device("cpu")) >= before + size * 0.9, "the most so far, not what is there now"


def spoiled(before: Exception | None = None) -> Exception:
    """What the end of a CUDA graph's recording raises, which an error has ended before."""
    message = "CUDA error: operation failed due to a previous error during capture\nSearch for"
    error = RuntimeError(message)
    error.__context__ = before
    return error


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (spoiled(), True),
        (spoiled(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")), True),
        (spoiled(spoiled()), True),
        (spoiled(RuntimeError("CUDA error: operation not permitted when stream is capturing")), False),
        (spoiled(ValueError("no such key")), False),
        (ValueError("a text that says: out of memory"), False),
    ],
)
def test_lack_of_memory_is_known_whoever_says_it(error: Exception, lack: bool) -> None:
    assert is_lack_of_memory(error) is lack


def test_memory_that_was_freed_in_pieces_goes_back() -> None:
    # Below glibc's limit for memory of its own, each between two that stay: the heap cannot shrink by itself.
    pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]
    full = resident()
    del pieces[::2], pieces[1::2]
    give_back_freed_memory()
    assert resident() < full - (50 << 20)
    assert len(pieces) == 500
