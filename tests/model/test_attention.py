"""Attention's mask and kernels, as a GPU needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quark_fast.model import attention
from quark_fast.model.loading import decode_fast
from quark_fast.model.reading import pad_left, positions_of, read


def test_cudnns_attention_stays_off_while_any_thread_wants_it_off() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        first, second = attention.without_cudnn(), attention.without_cudnn()  # of two threads at once
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        second.__exit__(None, None, None)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("on", [True, False])
def test_cudnns_attention_is_off_in_our_models_and_as_it_was_elsewhere(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    plain, seen = attention.sdpa_attention_forward, list[bool]()

    def watched(*given: Any, **how: Any) -> Any:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
        return plain(*given, **how)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    try:
        model = AutoModelForCausalLM.from_pretrained(tiny_model())
        decode_fast(model)
        read(model, torch.tensor([[1, 2, 3]]))
        assert seen and not any(seen)
        assert torch.backends.cuda.cudnn_sdp_enabled() == on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


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
