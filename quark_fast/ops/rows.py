"""What the kernels are told: the rows of a strided tensor where they lie, and which tokens may be drawn."""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Looked for once and not at each call, which torch.compile would have to trace.
TRITON = importlib.util.find_spec("triton") is not None


class Rows(NamedTuple):
    """Row n starts at element (n // inner) * outer_stride + (n % inner) * inner_stride."""

    inner: int
    outer_stride: int
    inner_stride: int


class Nucleus(NamedTuple):
    """The smallest set of most probable tokens whose mass reaches ``top_p``; 1 and more: all tokens.

    Of the distribution that is drawn from, with ``stream`` -1; else of softmax(weight logits) of that stream.
    """

    top_p: float
    stream: int = -1
    weight: float = 1.0


def rows_of(tensor: Tensor) -> Rows | None:
    """The rows of (..., width), or None if no kernel can walk them without a copy.

    Leading dimensions that follow each other in memory are merged; two may remain, as in
    logits[:, :-1] of a (batch, time, vocabulary) tensor.
    """
    if tensor.numel() == 0:  # of any strides, which no copy would change
        return Rows(1, 0, 0)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    leading: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if leading and leading[-1][1] == size * stride:
            leading[-1] = (leading[-1][0] * size, stride)
        else:
            leading.append((size, stride))
    if len(leading) > 2:
        return None
    (_, outer), (inner_size, inner) = [(1, 0), (1, 0), *leading][-2:]
    return Rows(max(1, inner_size), outer, inner)


def with_rows(tensor: Tensor) -> tuple[Tensor, Rows]:
    """The tensor, or a contiguous copy if its rows cannot be walked where they lie; and its rows."""
    rows = rows_of(tensor)
    if rows is None:
        tensor = tensor.contiguous()
        rows = rows_of(tensor)
        assert rows is not None
    return tensor, rows
