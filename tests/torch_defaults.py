"""torch's defaults as a caller may have set them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Other default dtypes, and a default device that is not the tensors'.
OTHERS = [torch.float64, torch.float16, torch.bfloat16, "meta"]


@contextmanager
def defaults(other: torch.dtype | str) -> Iterator[None]:
    if isinstance(other, str):
        with torch.device(other):
            yield
        return
    torch.set_default_dtype(other)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
