"""Attention's mask and kernels, as a GPU needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quark_fast.model import attention
from quark_fast.model.loading import decode_fast
from quark_fast.model.reading import pad_left, positions_of, read


def test_cudnns_attention_is_off_once_a_model_decodes(tiny_model: Callable[..., Path]) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    decode_fast(AutoModelForCausalLM.from_pretrained(tiny_model()))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_padding_sees_something_and_changes_no_token(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel may make NaN of a query that sees no key, or of its gradient."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    model.set_attn_implementation(attention.FAST_ATTENTION)
    rows = [[1, 2, 3, 4, 5], [6, 7]]
    ids, mask = pad_left(rows, torch.device("cpu"))
    made: list[torch.Tensor] = []
    plain = attention.sdpa_attention_forward

    def seen(module: object, query: torch.Tensor, *given: torch.Tensor, **how: object) -> object:
        made.append(given[2])
        return plain(module, query, *given, **how)

    monkeypatch.setattr(attention, "sdpa_attention_forward", seen)
    logits = read(model, ids, mask, positions_of(mask)).logits
    assert made and all(bool(one.any(-1).all()) for one in made), "each query sees a key"
    for row, found in zip(rows, logits, strict=True):
        alone = read(model, torch.tensor([row])).logits[0]
        torch.testing.assert_close(found[-len(row) :], alone, rtol=1e-4, atol=1e-4)
