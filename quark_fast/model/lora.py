"""LoRA (Hu et al. 2022) by peft: low-rank adapters beside frozen weights, and how they leave again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quark_fast.config import Config
from quark_fast.errors import UsageError

ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the head
ATTENTION = "attention"  # those of them that lie in a module so called
# Model types whose fast kernels read out_proj's weight by itself, past an adapter; peft refuses it there.
PAST_ADAPTERS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


@dataclass(frozen=True)
class Lora:
    """What adapters to train.

    Attributes:
        rank: of each update B A of a weight.
        alpha: the update is scaled by alpha / rank.
        targets: ``all-linear``, ``attention``, or ends of layers' names with commas between.
    """

    rank: int
    alpha: float
    targets: str = ALL_LINEAR

    @classmethod
    def of(cls, config: Config) -> Lora | None:
        """The adapters that a run's settings ask for; None: it trains all weights."""
        if config.lora_rank == 0:
            return None
        return cls(config.lora_rank, config.lora_alpha or 2.0 * config.lora_rank, config.lora_targets)


def add_adapters(model: Any, lora: Lora, seed: int) -> None:
    """Freeze the model and put an adapter beside each target layer, which at first changes nothing.

    It is in float32 beside weights of any dtype: a small step would be lost in bfloat16's rounding.

    Raises:
        UsageError: the targets are not layers of the model's body.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if lora.targets == ATTENTION:
        names = _of_attention(model)
    else:
        names = [name.strip() for name in lora.targets.split(",") if name.strip()]
    _check_of_body(model, lora, names)
    alpha: Any = lora.alpha  # for peft an int, which it only divides
    every = lora.targets == ALL_LINEAR
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        target_modules=ALL_LINEAR if every else names,
        exclude_modules=(_left_out(model) or None) if every else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of patterns that peft itself makes for experts.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as error:  # peft's word for names that no layer has
            raise UsageError(f"lora_targets = {lora.targets!r}: {str(error).splitlines()[0]}") from error
    _leave_bare_weights_alone(model, lora)
    if not every:
        _check_every_name(model, names)
    cast_adapter_dtype(model, adapter_name="default")
    for _, layer in adapted_layers(model):
        layer._cast_input_dtype = _as_adapter_takes_it
    _check_unshared(model, lora)


def _of_attention(model: Any) -> list[str]:
    """The linear layers within modules that are called attention, or attn in short."""
    left_out = _left_out(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and any(re.search("attention|attn", part) and "norm" not in part for part in name.split(".")[:-1])
        and name not in left_out
    ]
    if not names:
        raise UsageError(
            f"lora_targets = {ATTENTION!r}: {type(model).__name__} has no layers of that name; give"
            f" {ALL_LINEAR}, or layers' names"
        )
    return names


def _left_out(model: Any) -> list[str]:
    """What all-linear does not mean: routers, which are linear layers and more, and what peft refuses."""
    refused = ("out_proj",) if model.config.model_type in PAST_ADAPTERS else ()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name.rpartition(".")[2] in refused or not _gives_a_product(module))
    ]


@torch.no_grad()
def _gives_a_product(layer: nn.Linear) -> bool:
    """Whether a layer of a class of its own has outputs that an adapter's can be added to."""
    if type(layer) is nn.Linear:
        return True
    try:
        out = layer(layer.weight.new_zeros(3, layer.in_features))
    except Exception:  # foreign code fails in any way
        return False
    return isinstance(out, Tensor) and out.shape == (3, layer.out_features)


def _check_of_body(model: Any, lora: Lora, names: list[str]) -> None:
    """Raise UsageError for the name of the embedding or the head, which have rows of reward tokens."""
    outer = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    for layer, module in model.named_modules():
        if id(module) in outer and any(f".{layer}".endswith(f".{name}") for name in names):
            raise UsageError(
                f"lora_targets = {lora.targets!r} names the model's {outer[id(module)]}, {layer}; give layers"
                " of its body"
            )


def _check_unshared(model: Any, lora: Lora) -> None:
    """Raise UsageError where layers share a weight (Zamba's): merged, each would have all their adapters."""
    adapters = {id(layer.get_base_layer()): name for name, layer in adapted_layers(model)}
    users: dict[int, str] = {}
    for name, module in sorted(model.named_modules(), key=lambda item: id(item[1]) not in adapters):
        weight = module._parameters.get("weight")
        if weight is None or (id(module) not in adapters and id(weight) not in users):
            continue
        name = adapters.get(id(module), name)
        if (other := users.setdefault(id(weight), name)) != name:
            raise UsageError(
                f"lora_targets = {lora.targets!r}: {other} and {name} share one weight, to which an export"
                " would add the adapters of both; give layers that share none, or --lora-rank 0, which trains"
                " all weights"
            )


def _check_every_name(model: Any, names: list[str]) -> None:
    """Raise UsageError for a name that no adapted layer has: peft says so only where none of them is one."""
    layers = [name for name, _ in adapted_layers(model)]
    if missing := [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        raise UsageError(
            f"lora_targets = {','.join(names)!r}: no layer is called {missing[0]!r}; give names, or their"
            f" ends, such as {layers[0].rpartition('.')[2]} of {layers[0]}"
        )


def _as_adapter_takes_it(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In place of peft's cast: under autocast, x as it is, which casts the adapter's weights to it instead.

    Peft's goes to float32 first, and the backward pass would keep what autocast then makes of that: a copy
    of x for each adapter in place of one for all, half as much memory again.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _leave_bare_weights_alone(model: Any, lora: Lora) -> None:
    """Unwrap experts and routers, whose weights are no layers: peft wraps them unasked, in a way of its own.

    Raises:
        UsageError: they were asked for by name.
    """
    from peft.tuners.lora.layer import ParamWrapper

    wrapped = [name for name, layer in adapted_layers(model) if isinstance(layer, ParamWrapper)]
    if wrapped and lora.targets != ALL_LINEAR:
        raise UsageError(
            f"lora_targets = {lora.targets!r} reaches {wrapped[0]}, whose weights are no linear layers; give"
            " layers of the attention, or all-linear, which leaves them as they are"
        )
    for name in wrapped:
        if not name.endswith(".base_layer"):  # several weights of one module are wrapped one in the other
            layer = model.get_submodule(name)
            while isinstance(layer, ParamWrapper):
                layer = layer.get_base_layer()
            model.set_submodule(name, layer)


def has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


def merge_adapters(model: Any, converted: Callable[[str, Tensor], Tensor]) -> list[Tensor]:
    """W + alpha / rank B A in place of each weight, and no adapter any more; these weights.

    Args:
        model: may share the memory of its weights with another, which keeps its own.
        converted: from a weight's name and the float32 sum to what is kept of it.
    """
    merged = []
    for name, layer in list(adapted_layers(model)):
        base = layer.get_base_layer()
        base.weight.data = base.weight.data.to(torch.float32, copy=True)
        layer.merge()
        base.weight.data = converted(f"{name}.weight", base.weight.data)
        model.set_submodule(name, base)
        merged.append(base.weight)
    _forget_adapters(model)
    return merged


def drop_adapters(model: Any) -> None:
    """The model without its adapters, as if there had been none."""
    for name, layer in list(adapted_layers(model)):
        model.set_submodule(name, layer.get_base_layer())
    _forget_adapters(model)


def _forget_adapters(model: Any) -> None:
    del model.peft_config  # injecting leaves it, and saving would take the model for an adapter


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, peft's layer) of each that has an adapter beside it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
