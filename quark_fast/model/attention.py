"""Attention of the models that are decoded, and on a GPU trained, known to transformers by its own name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quark_fast.model.cache import with_room

FAST_ATTENTION = "quark_grouped"


class _Cudnn:
    """PyTorch's one switch for cuDNN's attention, which several threads may want off at a time."""

    lock = threading.Lock()
    inside = 0  # how many want it off
    before = True  # how it was before the first of them


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """No attention within is cuDNN's; that of the rest of the process may be.

    cuDNN's is PyTorch's first choice on Hopper and later GPUs since 2.11. It plans for every new shape anew,
    and each token that is decoded is one; and its gradient may be NaN under a mask (pytorch#196678).
    """
    with _Cudnn.lock:
        if _Cudnn.inside == 0:
            _Cudnn.before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
        _Cudnn.inside += 1
    try:
        yield
    finally:
        with _Cudnn.lock:
            _Cudnn.inside -= 1
            if _Cudnn.inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(_Cudnn.before)


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa, except that the heads of one new token that share a key head become the rows of one matrix.

    So no key is copied for each query head, as transformers 5.17 does wherever there is a mask. On the
    CPU two small matmuls do it: PyTorch's flash kernel there is made for long queries, and takes 2.3 ms a
    layer where this takes 0.3 (128 rows, 9 heads of 64, 30 keys), which would be half of a decoding step.
    """
    # A bias of positions, a cap or a mask of each head is sdpa's, or its refusal.
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    if query.shape[2] != 1 or special or per_head:
        with without_cudnn():
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **kwargs
            )
    batch, heads, _, width = query.shape
    groups, length = key.shape[1], key.shape[-2]
    rows = query.reshape(batch, groups, heads // groups, width)
    if query.device.type != "cpu":
        return attend_by_sdpa(rows, key, value, attention_mask, scaling), None
    keys, values = with_room(key), with_room(value)
    scores = (rows @ keys.transpose(-1, -2))[..., :length] * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        allowed = attention_mask[..., :length]
        if allowed.dtype == torch.bool:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        else:
            scores = scores + allowed
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    if room := values.shape[-2] - length:
        weights = torch.nn.functional.pad(weights, (0, room))
    context = weights @ values
    return context.reshape(batch, 1, heads, value.shape[-1]), None


def attend_by_sdpa(
    rows: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """(B, 1, heads, D') of one new token, whose ``rows`` are (B, key heads, heads a key head, D)."""
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[-2]]
    with without_cudnn():
        context = torch.nn.functional.scaled_dot_product_attention(
            rows, key, value, attn_mask=attention_mask, scale=scaling
        )
    return context.reshape(len(rows), 1, -1, value.shape[-1])


def mask_without_a_look(
    *, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """sdpa's mask, on a GPU whether or not it hides anything.

    transformers leaves out a mask that hides nothing. To see that, it looks at the mask's values, and a GPU
    would be waited for at every token and every step.
    """
    look = attention_mask is None or is_free_to_read(attention_mask)
    mask = sdpa_mask(
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip and look, **kwargs
    )
    if mask is None or mask.dtype != torch.bool or mask.shape[-2] == 1:
        return mask
    # Padding on the left sees nothing, and some kernels make NaN of that, or of its gradient: let it see all.
    return mask | ~mask.any(-1, keepdim=True)


def is_free_to_read(values: Tensor) -> bool:
    """Whether a look at the values waits for nothing."""
    return values.device.type == "cpu"


AttentionInterface.register(FAST_ATTENTION, grouped_attention)
# An attention without a mask function of its own is handed no padding mask at all.
AttentionMaskInterface.register(FAST_ATTENTION, mask_without_a_look)
