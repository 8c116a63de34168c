"""The C++ kernels on CPU tensors: addresses and strides in, new tensors out, no autograd."""

import torch
from torch import Tensor

from quark_fast import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATS_PER_ROW = _C.STATS_PER_ROW


def rows_of(tensor: Tensor) -> _C.Rows | None:
    """The rows of (..., width) where they lie, or None if no kernel can walk them without a copy.

    Leading dimensions that follow each other in memory are merged; two may remain, as in
    logits[:, :-1] of a (batch, time, vocabulary) tensor.
    """
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
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _C.Rows(tensor.data_ptr(), dtype, max(1, inner_size), outer, inner)


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
        logits_rows = rows_of(logits)
        if logits_rows is None:
            logits = logits.contiguous()
            logits_rows = rows_of(logits)
            assert logits_rows is not None
        ref_rows = None
        if ref_logits is not None:
            ref_rows = rows_of(ref_logits)
            if ref_rows is None:
                ref_logits = ref_logits.contiguous()
                ref_rows = rows_of(ref_logits)
        labels, weights = labels.contiguous(), weights.contiguous()
        self.tensors = (logits, ref_logits, labels, weights)
        self.problem = _C.Problem(
            logits_rows,
            ref_rows,
            labels.data_ptr(),
            weights.data_ptr(),
            rows=labels.numel(),
            vocab=vocab_size,
            width=logits.shape[-1],
            kl=kl,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
        )


def new_gradient(logits: Tensor) -> Tensor:
    """An empty contiguous tensor like logits, in huge pages where the system has them."""
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    _C.prefer_huge_pages(grad.data_ptr(), grad.nbytes)
    return grad


def forward(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    kl_coef: float,
    entropy_coef: float,
    kl: str,
    *,
    grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, KL, H (float32), and the per-row statistics that `backward` takes.

    With grad (like logits, or logits itself), the gradient of the loss is written there.
    """
    inputs = _Inputs(logits, ref_logits, labels, weights, vocab_size, kl_coef, entropy_coef, kl)
    nll, divergence, entropy = (torch.empty(labels.shape) for _ in range(3))
    stats = torch.empty(labels.numel(), STATS_PER_ROW)
    loss = _C.quark_loss_forward(
        inputs.problem,
        nll.data_ptr(),
        divergence.data_ptr(),
        entropy.data_ptr(),
        stats.data_ptr(),
        None if grad is None else rows_of(grad),
        torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32), nll, divergence, entropy, stats


def backward(
    scale: float,
    stats: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    kl_coef: float,
    entropy_coef: float,
    kl: str,
    *,
    grad: Tensor,
) -> None:
    """Write the gradient of scale * loss into grad (like logits, or logits itself)."""
    inputs = _Inputs(logits, ref_logits, labels, weights, vocab_size, kl_coef, entropy_coef, kl)
    grad_rows = rows_of(grad)
    assert grad_rows is not None
    _C.quark_loss_backward(inputs.problem, stats.data_ptr(), scale, grad_rows, torch.get_num_threads())
