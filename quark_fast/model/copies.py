"""Copies of a policy: to sample from, to evaluate, to export; and the reference that shares its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quark_fast.model.loading import decode_fast
from quark_fast.model.lora import drop_adapters, has_adapters, merge_adapters
from quark_fast.model.policy import Policy, hide_reward_tokens
from quark_fast.model.reward_embedding import RewardEmbedding
from quark_fast.model.rounding import conversion
from quark_fast.runtime.distributed import whole


def whole_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """A copy whose adapters, if any, are added to its weights.

    Of a sharded model it is a whole one on each process, all of which have to ask for it.
    """
    own = dict(policy.model.named_parameters())
    sharded = any(isinstance(parameter, DTensor) for parameter in own.values())
    _forget_graphs(policy.model)
    model = copy.deepcopy(policy.unsharded if sharded else policy.model)
    converted = conversion(dtype, policy.stored_dtype)
    if sharded:
        embedding: RewardEmbedding = policy.model.get_input_embeddings()
        rows = torch.empty(embedding.rows.shape, device=model.device)
        base = model.get_input_embeddings()
        model.set_input_embeddings(RewardEmbedding(base, embedding.first_id, rows))
        hide_reward_tokens(model, policy.other_tables, policy.vocabulary)
    elif has_adapters(model):
        merge_adapters(model, converted)
    # Not model.to(dtype), which would round the rotary frequencies, too.
    _cast_buffers(policy, model, dtype)
    for name, parameter in model.named_parameters():
        if sharded:
            parameter.data = converted(whole(own[name].detach())).to(parameter.device)
        else:
            parameter.data = converted(parameter.data)
    model.config.dtype = dtype
    return model


def frozen_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """The model as it is now, for sampling: low precision, no gradients or adapters, fast decoding."""
    model = whole_copy(policy, dtype).eval().requires_grad_(False)
    decode_fast(model)
    return model


def exported_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """``frozen_copy`` of what an export holds, which is in the dtype that the model came in."""
    model = frozen_copy(policy, policy.stored_dtype)
    _cast_buffers(policy, model, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _cast_buffers(policy: Policy, model: Any, dtype: torch.dtype) -> None:
    """Give a copy's buffers the dtypes that they have in a model loaded in ``dtype``.

    Rotary frequencies are float32 in any; masks, decays or positions may not be.
    """
    if dtype not in policy._buffers:
        policy._buffers[dtype] = _buffer_dtypes(model, dtype)
    for name, buffer in model.named_buffers():
        wanted = policy._buffers[dtype].get(name.replace(".base.", "."), buffer.dtype)
        if buffer.is_floating_point() and wanted.is_floating_point:
            buffer.data = buffer.data.to(wanted)


def shared_reference(policy: Policy, dtype: torch.dtype) -> Any | None:
    """The base model on the frozen weights that the adapters belong to; None where these have another
    dtype, or all weights are trained."""
    if not has_adapters(policy.model) or policy.model.get_input_embeddings().weight.dtype != dtype:
        return None
    _forget_graphs(policy.model)
    # What is in its memo, deepcopy does not copy: the parameters are shared.
    model = copy.deepcopy(policy.model, {id(p): p for p in policy.model.parameters()})
    drop_adapters(model)
    model.set_input_embeddings(model.get_input_embeddings().base)
    model.eval()
    decode_fast(model)
    return model


def _forget_graphs(model: Any) -> None:
    """Detach what modules keep of their last forward pass, such as a state: it could not be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def _buffer_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of a model of this kind when it is made in ``dtype``; nothing where it cannot be made without data."""
    try:
        with torch.device("meta"):
            made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    except Exception:  # foreign code fails in any way; check_reading.py finds what does not fit then
        return {}
    return {name: buffer.dtype for name, buffer in made.named_buffers()}
