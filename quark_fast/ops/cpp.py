"""The C++ kernels on CPU tensors: addresses and strides in, new tensors out, no autograd.

The numbers are computed in csrc/quark_loss_rows.cpp and csrc/sampling_rows.cpp: blocks of a row in float32,
their sums in double. Every tensor that is made here names its dtype and its device: C++ takes no other, and
the defaults are the caller's (torch.set_default_dtype, torch.set_default_device).
"""

from typing import Any

import torch
from torch import Tensor

from quark_fast import _C
from quark_fast.ops.rows import Nucleus, Rows, rows_of, with_rows

STATS_PER_ROW = _C.STATS_PER_ROW


def _rows(tensor: Tensor, rows: Rows | None) -> _C.Rows:
    """Where the rows lie, and how much memory there is, to which C++ holds them."""
    assert rows is not None
    elements = int(tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset())
    return _C.Rows(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), *rows, elements)


class _Inputs:
    """The tensors of one call, kept alive while C++ holds their addresses."""

    def __init__(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        vocab_size: int,
        kl_coef: float,
        entropy_coef: float,
        kl: str,
    ) -> None:
        logits, rows = with_rows(logits)
        logits_rows, ref_rows = _rows(logits, rows), None
        if ref_logits is not None:
            ref_logits, rows = with_rows(ref_logits)
            ref_rows = _rows(ref_logits, rows)
        labels, weights = labels.contiguous(), weights.contiguous()
        self.tensors = (logits, ref_logits)
        self.problem = _C.Problem(
            logits_rows,
            ref_rows,
            labels.numpy(),
            weights.numpy(),
            vocab=vocab_size,
            width=logits.shape[-1],
            kl=kl,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
        )


def new_gradient(logits: Tensor) -> Tensor:
    """An empty contiguous tensor like logits, in huge pages where the system has them."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    _C.prefer_huge_pages(grad.data_ptr(), grad.nbytes)
    return grad


def forward(
    *problem: Any,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H (float32), and the per-row statistics that `backward` takes.

    Args:
        problem: logits, ref_logits, labels, weights, vocab_size, kl_coef, entropy_coef, kl, as for `eager`.
        grad: like logits, or logits itself: where the gradient of the loss is written.
    """
    inputs, labels = _Inputs(*problem), problem[2]
    nll, divergence, entropy = (
        torch.empty(labels.shape, dtype=torch.float32, device="cpu") for _ in range(3)
    )
    stats = torch.empty(labels.numel(), STATS_PER_ROW, dtype=torch.float32, device="cpu")
    loss = _C.quark_loss_forward(
        inputs.problem,
        nll.numpy(),
        divergence.numpy(),
        entropy.numpy(),
        stats.numpy(),
        None if grad is None else _rows(grad, rows_of(grad)),
        torch.get_num_threads(),
    )
    total = torch.tensor(loss, dtype=torch.float32, device="cpu")
    return total, nll, divergence, entropy, stats


def backward(
    scale: Tensor,
    stats: Tensor,
    *problem: Any,
    grad: Tensor,
    unless_one: bool = False,
) -> None:
    """Write the gradient of scale * loss into grad (like logits, or logits itself).

    With unless_one, grad holds the gradient of the loss already, and a scale of 1 leaves it alone.
    """
    if unless_one and scale.item() == 1:
        return
    inputs = _Inputs(*problem)
    _C.quark_loss_backward(
        inputs.problem, stats.numpy(), scale.item(), _rows(grad, rows_of(grad)), torch.get_num_threads()
    )


def rescale(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, in place."""
    if scale.item() != 1:
        grad.mul_(scale)


def sample_tokens(
    logits: Tensor,
    weights: Tensor,
    suppressed: Tensor,
    nucleus: Nucleus,
    rows: Tensor,
    uniform: Tensor | None,
    log_p: Tensor | None = None,
) -> tuple[Tensor, Tensor, bool]:
    """A token of each of ``rows``, whether it is in the nucleus, and whether all logits were finite or -inf.

    The equation: csrc/sampling.hpp. A token outside the nucleus, if that is none of a stream, has to be drawn
    again.

    Args:
        logits: (streams N, V) of one of KERNEL_DTYPES, all rows of the first stream, then those of the next.
        weights: (streams,) float32, divided by the temperature.
        suppressed: int64 ids that are not drawn.
        rows: (D,) int64 in [0, N).
        uniform: (D, 1) float32 in [0, 1); None: the most probable token, the lowest id among equals.
        log_p: (D,) float32, contiguous: where log p of each token goes, p restricted to the nucleus; 0
            without uniform numbers, NaN outside the nucleus. None: it is not computed.
    Returns:
        (D,) int64, -1 where the logits have a NaN or +inf, or nothing but -inf; (D,) bool.
    """
    logits, where = with_rows(logits)
    tokens, inside = torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool)
    finite = _C.sample_tokens(
        _rows(logits, where),
        len(logits) // len(weights),
        logits.shape[-1],
        weights.numpy(),
        suppressed.numpy(),
        *nucleus,
        rows.numpy(),
        None if uniform is None else uniform.numpy(),
        tokens.numpy(),
        inside.numpy(),
        None if log_p is None else log_p.numpy(),
        torch.get_num_threads(),
    )
    return tokens, inside, finite
