"""Copies of a policy: to sample from, to evaluate, to export; and the reference that shares its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import build_glob_alternation

from quark_fast.model.loading import decode_fast, frozen
from quark_fast.model.lora import drop_adapters, has_adapters, merge_adapters
from quark_fast.model.policy import Policy, hide_reward_tokens
from quark_fast.model.reward_embedding import RewardEmbedding
from quark_fast.model.rounding import conversion
from quark_fast.runtime.distributed import whole


def is_sharded(model: Any) -> bool:
    """Whether each process has a part of the model's weights alone."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """A copy whose adapters, if any, are added to its weights.

    Of a sharded model it is a whole one on each process, all of which have to ask for it.
    """
    return _copy(policy, conversion(dtype, policy.stored_dtype), [dtype])


def _copy(policy: Policy, converted: Callable[[Tensor], Tensor], dtypes: Sequence[torch.dtype]) -> Any:
    """A copy whose weights are ``converted`` one by one; buffers go through the dtypes to the last.

    Weights that a model loaded in one of these dtypes has in float32, such as a router's, stay as they are.
    """
    own = dict(policy.model.named_parameters())
    wide = {name for dtype in dtypes for name in _own_dtypes(policy, dtype)}

    def converted_of(name: str, weights: Tensor) -> Tensor:
        return weights if name.replace(".base.", ".") in wide else converted(weights)

    sharded = is_sharded(policy.model)
    _forget_graphs(policy.model)
    model = _same_weights(policy.unsharded if sharded else policy.model)
    done: set[int] = set()
    if sharded:
        embedding: RewardEmbedding = policy.model.get_input_embeddings()
        rows = torch.empty(embedding.rows.shape, device=model.device)
        base = model.get_input_embeddings()
        model.set_input_embeddings(RewardEmbedding(base, embedding.first_id, rows))
        hide_reward_tokens(model, policy.other_tables, policy.vocabulary)
    elif has_adapters(model):
        done.update(map(id, merge_adapters(model, converted_of)))
    # Not model.to(dtype), which would round the rotary frequencies, too.
    for dtype in dtypes:
        _cast_buffers(model, _own_dtypes(policy, dtype))
    for name, parameter in model.named_parameters():
        if id(parameter) in done:
            continue
        before = whole(own[name].detach()) if sharded else parameter.data
        after = converted_of(name, before).to(parameter.device)
        parameter.data = after.clone() if after.data_ptr() == before.data_ptr() else after
    model.config.dtype = dtypes[-1]
    return model


def _same_weights(model: Any) -> Any:
    """A copy with parameters of its own in the same memory: a whole copy would be there beside the next."""
    # What is in its memo, deepcopy does not copy. A tied weight is one parameter, and stays one.
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, own)


def frozen_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """The model as it is now, for sampling: low precision, no gradients or adapters, fast decoding."""
    return frozen(whole_copy(policy, dtype), policy.model.device)


def exported_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """``frozen_copy`` of what an export holds, which is in the dtype that the model came in."""
    stored = policy.stored_dtype
    rounded = conversion(stored, stored)
    copied = _copy(policy, lambda weights: rounded(weights).to(dtype), [stored, dtype])
    return frozen(copied, policy.model.device)


class SharedCopy:
    """The policy's frozen copy between two trainings, made when it is first needed."""

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self.policy, self.dtype = policy, dtype
        self._model: Any = None

    def get(self) -> Any:
        if self._model is None:
            self._model = frozen_copy(self.policy, self.dtype)
        return self._model

    def drop(self) -> None:
        """Before the policy changes: learning needs the memory, and the next copy is another."""
        self._model = None


def _cast_buffers(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give a copy's buffers these dtypes.

    Rotary frequencies are float32 in any model; masks, decays or positions may not be.
    """
    for name, buffer in model.named_buffers():
        wanted = dtypes.get(name.replace(".base.", "."), buffer.dtype)
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


def _own_dtypes(policy: Policy, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """What a model of this kind loaded in ``dtype`` has in a dtype of its own: its buffers, and the weights
    that stay in float32; nothing where it cannot be made without data."""
    if dtype not in policy._dtypes:
        try:
            with torch.device("meta"):
                made = type(policy.model)._from_config(copy.deepcopy(policy.model.config), dtype=dtype)
            policy._dtypes[dtype] = dict(_dtypes_apart(made, dtype))
        except Exception:  # foreign code fails in any way; check_reading.py finds what does not fit then
            policy._dtypes[dtype] = {}
    return policy._dtypes[dtype]


def _dtypes_apart(made: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype]]:
    yield from ((name, buffer.dtype) for name, buffer in made.named_buffers())
    # As from_pretrained has it: parts of names, or parameters that the model itself makes in float32.
    plan = list(made._get_dtype_plan(dtype))
    named = build_glob_alternation(plan)[0].search if plan else lambda _: None
    for name, parameter in made.named_parameters():
        if parameter.dtype != dtype or named(name):
            yield name, torch.float32
