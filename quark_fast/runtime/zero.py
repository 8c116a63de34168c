"""ZeRO 1 and 2 of DeepSpeed: what accelerate leaves to whoever launches with ``--use_deepspeed``.

Weights stay whole and float32 on every process; gradients (ZeRO 2) and the optimizer's state are in flat
partitions, from and to which DeepSpeed's own functions bring the tensors of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from quark_fast.config import Config
from quark_fast.errors import UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")


def check(accelerator: Accelerator) -> None:
    """Raise UsageError for a configuration of DeepSpeed that a run cannot have."""
    plugin: Any = accelerator.state.deepspeed_plugin
    stage = plugin.zero_stage
    if stage not in (1, 2):
        instead = "--use_fsdp --fsdp_version 2 shards weights, too" if stage == 3 else "without it is DDP"
        raise UsageError(f"DeepSpeed's zero_stage = {stage} is not supported; give 1 or 2 ({instead})")
    if plugin.hf_ds_config.is_offload():
        raise UsageError("DeepSpeed's offload_optimizer and offload_param are not supported; give none")
    for name in ("optimizer", "scheduler", "fp16", "bf16"):
        if _asked(plugin.deepspeed_config.get(name)):
            raise UsageError(f"the DeepSpeed configuration has its own {name}; leave it out: the run has one")


def configure(accelerator: Accelerator, config: Config) -> None:
    """Configure what DeepSpeed does itself, before the model is prepared."""
    plugin: Any = accelerator.state.deepspeed_plugin
    # Losses are divided by the counts of the whole batch: to DeepSpeed each pass is one sample, not averaged.
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
    }


def optimizer_tensors(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """("index.name", whole tensor) of the optimizer's state, as without DeepSpeed; all have to ask."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = _states(optimizer)
    if not states:  # before the first step
        return
    for index, parameter in enumerate(parameters):
        yield f"{index}.step", states[0]["step"].clone()
        for name in MOMENTS:
            yield f"{index}.{name}", safe_get_full_optimizer_state(parameter, name)


def set_weights(parameters: Sequence[nn.Parameter]) -> None:
    """Have the partitions hold what the parameters do by now."""
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter in parameters:
        safe_set_full_fp32_param(parameter, parameter.detach())


def set_optimizer(
    optimizer: Any, parameters: Sequence[nn.Parameter], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Load ``optimizer_tensors``, whole on every process, into the state that a step has made."""
    from deepspeed.utils import safe_set_full_optimizer_state

    states = _states(optimizer)
    for key, value in tensors:
        index, _, name = key.partition(".")
        if name == "step":
            for state in states:
                state["step"].copy_(value)
        else:
            safe_set_full_optimizer_state(parameters[int(index)], value, name)


def _states(optimizer: Any) -> list[dict[str, Tensor]]:
    """The state of each partition, one for each group of parameters; none before the first step."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = optimizer.optimizer  # accelerate's is around DeepSpeed's, which is around PyTorch's
    states = zero.optimizer.state
    if not states:
        return []
    # DeepSpeed does so itself, but for the first group alone: the others have no state yet when it does.
    for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, partition, states)
    return [states[partition] for partition in zero.single_partition_of_fp32_groups]


def _asked(section: Any) -> bool:
    return bool(section) and (not isinstance(section, dict) or section.get("enabled", True) is not False)
