"""The optimizers that there are, and their state as tensors of names, as checkpoints have it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quark_fast.config import Config
from quark_fast.errors import UsageError
from quark_fast.model.policy import Policy

# bitsandbytes keeps the moments of smaller parameters in 32 bits.
LEAST_IN_8_BITS = 4096
# Its tables from codes to numbers, one tensor in the state of all parameters.
TABLES = ("qmap1", "qmap2")


def check_optimizer(name: str, device: torch.device) -> None:
    """Try out a step of an optimizer that is not PyTorch's own.

    Raises:
        UsageError: its package is not installed, or makes no step on this device.
    """
    if name == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"optimizer = {name} needs its package: pip install 'bitsandbytes>=0.50', or give adamw"
        )
    parameter = nn.Parameter(torch.zeros(LEAST_IN_8_BITS, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        _adamw_8bit([{"params": [parameter], "lr": 1.0}], in_32_bits=()).step()
        moved = float(parameter.detach().mean())
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"optimizer = {name}: the bitsandbytes that is installed makes no step on {device}"
            f" ({reason[0][:200]}); install 'bitsandbytes>=0.50' for this device, or give adamw"
        ) from error
    if not abs(moved + 1) < 0.01:  # Adam's first step is the rate, whatever the gradient
        raise UsageError(
            f"optimizer = {name}: a first step of bitsandbytes on {device} moves weights by {moved:g}, not by"
            " -1; install 'bitsandbytes>=0.50' for this device, or give adamw"
        )


def make_optimizer(config: Config, policy: Policy) -> torch.optim.Optimizer:
    """AdamW, by which the reward tokens' rows learn at a rate of their own.

    adamw-8bit is bitsandbytes' (Dettmers et al. 2022): moments in codes of 8 bits, 256 of which share a
    scale. In 32 bits stay those of the rows, of embedding tables, whose tokens are unevenly frequent, as
    transformers' trainer has it, and of parameters below ``LEAST_IN_8_BITS``.
    """
    *body, rows = trained_parameters(policy.model)
    groups: list[dict[str, Any]] = [
        {"params": body, "lr": config.step_size},
        {"params": [rows], "lr": config.reward_token_lr},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    tables = [module.weight for module in policy.model.modules() if isinstance(module, nn.Embedding)]
    return _adamw_8bit(groups, [rows, *tables])


def _adamw_8bit(groups: list[dict[str, Any]], in_32_bits: Iterable[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes  # slow to import

    base: Any = bitsandbytes.optim.AdamW8bit
    kept = {id(parameter) for parameter in in_32_bits}

    class AdamW8bit(base):  # type: ignore[misc]
        """Its own way to choose bits is a table of ids for the whole process, which outlives a run."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            bits = 32 if id(group["params"][pindex]) in kept else 8
            return config | {"optim_bits": bits}

    made: torch.optim.Optimizer = AdamW8bit(groups, weight_decay=0.0)
    return made


def trained_parameters(model: Any) -> list[Any]:
    """What the optimizer has, in its order: the reward tokens' rows last."""
    rows = model.get_input_embeddings().rows
    return [*(p for p in model.parameters() if p.requires_grad and p is not rows), rows]


def state_tensors(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """("index of the parameter.name", tensor) of all that the optimizer has come to.

    A count that is no tensor becomes one of int64.
    """
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in _flat(values):
            tensor = torch.as_tensor(value)
            yield f"{index}.{name}", tensor.clone() if name in TABLES else tensor


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes puts what is shaped unlike its parameter one level deeper."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def load_state(optimizer: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Set the state to ``state_tensors``.

    Raises:
        ValueError: it is not of these parameters and this optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value.item() if value.dtype == torch.int64 else value
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around it
    if hasattr(inner, "init_state"):
        _check_8bit(inner, state)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_8bit(optimizer: Any, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise ValueError for tensors of other shapes than a step makes: its kernels do not look at sizes."""
    places = [
        (group, parameter, which, place)
        for which, group in enumerate(optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
    ]
    for index, found in state.items():
        group, parameter, which, place = places[index]
        optimizer.init_state(group, parameter, which, place)
        if _layout(found) != _layout(optimizer.state.pop(parameter)):
            raise ValueError(f"the optimizer's state of parameter {index} is not one of adamw-8bit")


def _layout(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
        for name, value in values.items()
    }
