"""Python's half of a CUDA device without a GPU (stand_in_cuda.cpp): what the package uses of torch.cuda.

Import it first, with the library of the other half loaded before torch (stand_in_cuda.sh does so). It is
stricter than a GPU where that costs nothing: unwritten memory is NaN, a generator has to be of the
device that is drawn on, and a recorded step may neither read a value nor copy between the devices.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from quark_fast.model import fixed_step

ctypes.CDLL(os.environ["STAND_IN_CUDA"]).stand_in_memory()

# --- one card ---


class _Nothing:
    """For ``with torch.cuda.device(...)``."""

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


CARD = SimpleNamespace(
    name="stand-in", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
    shared_memory_per_multiprocessor=233472,
)  # fmt: skip
_ANSWERS: dict[str, Any] = {
    "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
    "set_device": None, "synchronize": None, "empty_cache": None, "is_bf16_supported": True,
    "get_device_name": CARD.name, "get_device_properties": CARD,
    "get_device_capability": (CARD.major, CARD.minor),
    "mem_get_info": (CARD.total_memory, CARD.total_memory), "memory_reserved": 0, "memory_allocated": 0,
    "max_memory_allocated": 0, "reset_peak_memory_stats": None,
}  # fmt: skip


def _answers(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


for _name, _answer in _ANSWERS.items():
    setattr(torch.cuda, _name, _answers(_answer))
torch.cuda.device = _Nothing  # type: ignore[assignment,misc]

# --- random numbers ---

_Generator = torch.Generator


class Generator(_Generator):
    """The CPU's, which knows for which device it was made."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = _Generator.__new__(cls, "cpu")
        made.made_for = (
            torch.device("cuda", 0) if torch.device(device).type == "cuda" else torch.device(device)
        )
        return made

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        made_for: torch.device = self.made_for  # type: ignore[has-type]
        return made_for


def _draws_on_its_device(draw: Callable[..., Any]) -> Callable[..., Any]:
    def drawn(*args: Any, **options: Any) -> Any:
        if (generator := options.get("generator")) is not None:
            on = torch.device(options.get("device") or torch.get_default_device())
            assert generator.device.type == on.type, f"a generator of {generator.device} draws on {on}"
        return draw(*args, **options)

    return drawn


torch.Generator = Generator  # type: ignore[misc]
for _name in ("rand", "randn", "randint", "randperm"):
    setattr(torch, _name, _draws_on_its_device(getattr(torch, _name)))

# --- tensors ---


def _pin_memory(self: Tensor, *_: Any) -> Tensor:
    assert self.device.type == "cpu", f"only memory of the CPU can be pinned, this is on {self.device}"
    return self


def _copies_on_the_device(copied: Callable[..., Any]) -> Callable[..., Any]:
    """``copy.deepcopy``, which reads a tensor's bytes where it does not know the device's storage."""

    def deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if not self.is_cuda:
            return copied(self, memo)  # type: ignore[no-any-return]
        if id(self) not in memo:
            assert self.is_leaf, "only leaves can be copied"
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)] = torch.nn.Parameter(memo[id(self)].detach(), self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    return deepcopy


torch.Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
torch.Tensor.__deepcopy__ = _copies_on_the_device(torch.Tensor.__deepcopy__)  # type: ignore[method-assign]
torch.nn.Parameter.__deepcopy__ = _copies_on_the_device(torch.nn.Parameter.__deepcopy__)  # type: ignore[method-assign]

# --- attention: the fused kernels are chosen by device, and none is registered for this one ---

_attention = torch.nn.functional.scaled_dot_product_attention


def _attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if not query.is_cuda:
        return _attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    by_products = torch.ops.aten._scaled_dot_product_attention_math
    return by_products(  # type: ignore[no-any-return]
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


torch.nn.functional.scaled_dot_product_attention = _attention_by_products

# --- Triton's interpreter, on the memory itself in place of copies of it ---


def _on_cpu(value: Any) -> Any:
    return torch.ops.stand_in.on_cpu(value.detach()) if isinstance(value, Tensor) else value


def _arguments(_: Any, args: Any, options: Any) -> tuple[list[Any], dict[str, Any]]:
    return [_on_cpu(a) for a in args], {name: _on_cpu(value) for name, value in options.items()}


interpreter.GridExecutor._init_args_hst = _arguments
interpreter.GridExecutor._restore_args_dev = _answers(None)

# --- CUDA graphs ---

READS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::masked_select",
    "aten::_unique2", "aten::unique_consecutive",
}  # fmt: skip


class _Recording(TorchDispatchMode):
    """Refuses what CUDA refuses while a graph is recorded."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        assert name not in READS, f"a recorded step reads a value: {name}"
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, out) if isinstance(x, Tensor) and x.dim()}
        assert len(devices) < 2, f"a recorded step copies between {sorted(devices)}: {name}"
        return out


def _cuda_graph(step: fixed_step.Step, device: torch.device) -> fixed_step.Step:
    """The step again at every call, which writes over what the last one gave, as a graph does."""
    fixed_step.check_device("graph", device)
    for _ in range(fixed_step.WARM_UPS):
        step()
    with _Recording():
        logits = step()

    def replay() -> Tensor:
        return logits.copy_(step())

    return replay


fixed_step.cuda_graph = _cuda_graph
torch.set_num_threads(1)
torch.manual_seed(0)
