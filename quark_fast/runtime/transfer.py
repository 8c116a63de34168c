"""Copies to a GPU, which the program does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """The numbers, which lie on the CPU, as a tensor there, in the dtype of a list of them unless given.

    ``torch.tensor(values, device=...)`` would wait for a GPU. So may a copy of memory that is not pinned:
    until the GPU has done what it has to do before.
    """
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type == "cuda" and values.numel():
        values = values.pin_memory()
    return values.to(device, dtype, non_blocking=True)
