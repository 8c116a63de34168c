"""One run on several processes, as ``accelerate launch`` starts them: a part of the work each, one result.

The processes hold the same pool and make the same plan of steps from the same seeds. Sampling, scoring and
the evaluation are split by batches, a step by samples; what a process made is gathered in an order that does
not depend on how many there are. So any number of processes computes what one does, up to the rounding of
float32 sums, and checkpoints do not depend on the number of processes.

With one process the functions here only call the work: nothing is communicated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from quark_fast.config import Config
from quark_fast.errors import OtherProcessFailed, OutOfResources, UsageError
from quark_fast.runtime import zero
from quark_fast.runtime.machine import Precision

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Ints = npt.NDArray[np.int64]

# Gradients are sent from where they lie, not from a copy of 4 bytes a parameter. Buffers are constants, and
# a process that has to repeat a forward pass may not wait for the others in it.
REPLICATION = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
# How long a process waits for the others, which may have slow rewards; the launcher ends those whose sibling
# died long before.
PATIENCE = timedelta(days=1)


class Processes:
    """This process among those of the run.

    Attributes:
        count, index: how many there are (the world size), and which one this is (the rank).
        main: whether this is rank 0, which alone writes and shows.
        replicated, sharded, zero: whether each has the whole model (DDP), a part of it (FSDP2), or the whole
            and a part of the optimizer's state (DeepSpeed).
    """

    def __init__(self, count: int = 1, index: int = 0, device: torch.device | str = "cpu") -> None:
        self.count, self.index, self.main = count, index, index == 0
        self.device = torch.device(device)
        self.replicated = self.sharded = self.zero = False

    @classmethod
    def join(cls) -> Processes:
        """Join the processes that a launcher started with this one.

        Raises:
            UsageError: the launcher asked for an engine that is not installed.
        """
        asked = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if asked and importlib.util.find_spec("deepspeed") is None:
            raise UsageError("--use_deepspeed needs its package: pip install deepspeed")
        # With it, all processes but the first would load empty models, and sample from them.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        joined = cls(state.num_processes, state.process_index, state.device)
        joined.zero = asked
        return joined

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, world size): of a list of batches this process does every count-th, from its rank on."""
        return self.index, self.count

    @property
    def machines(self) -> int:
        """How many machines the processes are on, as far as the launcher shows."""
        return max(1, self.count // int(os.environ.get("LOCAL_WORLD_SIZE", self.count)))

    # ---------------------------------------------------------------- work and agreement

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Do the work on every process; the results of all, by index.

        An error of any ends all of them here: the first that failed raises its own, the others
        OtherProcessFailed. So ``work`` may not wait for other processes itself.
        """
        if self.count == 1:
            return [work()]
        failure: BaseException | None = None
        result: Any = None
        try:
            result = work()
        except BaseException as error:  # raised again below, once the others know
            failure = error
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, (_in_words(failure), None if failure else result))
        self._raise([words for words, _ in gathered], failure)
        return [found for _, found in gathered]

    def together(self, work: Callable[[], T]) -> T:
        """Do the work on every process; this one's result. An error of any ends all, as in ``all_gather``."""
        done: list[T] = []
        self.all_gather(lambda: done.append(work()))
        return done[0]

    def on_rank_0(self, work: Callable[[], T], send: Callable[[T], Any] = lambda result: result) -> T:
        """Do the work on rank 0; its result for all, of which the others get ``send(result)``.

        An error is rank 0's; the others raise OtherProcessFailed.
        """
        if self.count == 1:
            return work()
        failure: BaseException | None = None
        result: Any = None
        if self.main:
            try:
                result = work()
            except BaseException as error:  # raised again below, once the others know
                failure = error
        sent = [(_in_words(failure), send(result) if self.main and failure is None else None)]
        dist.broadcast_object_list(sent, src=0)
        self._raise([sent[0][0]], failure)
        found: Any = result if self.main else sent[0][1]
        return found  # type: ignore[no-any-return]

    def _raise(self, failures: Sequence[str | None], own: BaseException | None) -> None:
        failed = [index for index, words in enumerate(failures) if words is not None]
        if not failed:
            return
        if own is not None and self.index == failed[0]:
            raise own
        raise OtherProcessFailed(f"process {failed[0]} failed: {failures[failed[0]]}") from own

    @contextlib.contextmanager
    def same_error(self) -> Iterator[None]:
        """A block that ends alike on every process: an error is raised as itself on rank 0 alone."""
        try:
            yield
        except UsageError as error:
            if self.main:
                raise
            raise OtherProcessFailed(f"process 0 failed: {error}") from error

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.mean({"any": float(here)})["any"])

    def mean(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The mean over processes of each of the numbers, which all have under the same names."""
        if self.count == 1:
            return dict(numbers)
        total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(numbers, (total / self.count).tolist(), strict=True))

    def part(self, chosen: Ints) -> Ints:
        """This process's samples of a step: the index-th of count equal slices."""
        return np.split(chosen, self.count)[self.index]

    # ---------------------------------------------------------------- gradients and weights

    def check(self, accelerator: Accelerator, config: Config) -> None:
        """Raise UsageError for what a run on these processes cannot do."""
        if config.batch_size % self.count:
            raise UsageError(
                f"batch_size = {config.batch_size} does not divide among {self.count} processes; give"
                f" {-(-config.batch_size // self.count) * self.count}, or launch another --num_processes"
            )
        if config.reward_cache == "on" and self.machines > 1:
            raise UsageError(
                f"reward_cache = on, but the processes are on {self.machines} machines, and a file on a"
                " network loses its locks; give auto or off"
            )
        engines = {
            DistributedType.FSDP: ("fsdp", "FSDP2"),
            DistributedType.DEEPSPEED: ("deepspeed", "DeepSpeed"),
        }
        for engine, (flag, _) in engines.items():
            asked = parse_flag_from_env(f"ACCELERATE_USE_{flag.upper()}")
            if asked and accelerator.distributed_type != engine:  # accelerate itself would go on without
                raise UsageError(f"--use_{flag} needs GPUs, and here is none; launch without it")
        if accelerator.distributed_type not in engines:
            return
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            zero.check(accelerator)
        elif not accelerator.is_fsdp2:
            raise UsageError("FSDP version 1 is not supported; launch with --fsdp_version 2")
        flag, name = engines[accelerator.distributed_type]
        without = f"launch without --use_{flag}"
        if config.lora_rank:
            raise UsageError(
                f"lora_rank = {config.lora_rank} is not supported with {name}; {without}, since frozen"
                " weights have nothing to share out"
            )
        if config.optimizer != "adamw":
            raise UsageError(
                f"optimizer = {config.optimizer} is not supported with {name}, whose shards cut its blocks of"
                f" numbers; give adamw, whose state is shared out, or {without}"
            )
        if config.precision == "fp16":
            raise UsageError(f"precision = fp16 is not supported with {name}; give bf16 or fp32")

    def check_padding(self, accelerator: Accelerator, padding: bool) -> None:
        """Raise UsageError for a sharded model that reads rows of each length by themselves.

        Its processes would put the model together a different number of times, and wait for each other.
        """
        sharded = self.zero or accelerator.distributed_type == DistributedType.FSDP
        if sharded and not padding:
            raise UsageError(
                "this model's rows of different lengths must not stand together (padding changes its logits),"
                " which FSDP2 and DeepSpeed cannot wait for; launch without --use_fsdp or --use_deepspeed"
            )

    def autocast(self, accelerator: Accelerator, precision: Precision) -> Callable[[], Any]:
        """What the precision of a forward pass is chosen by, around float32 weights."""
        if self.zero and precision == "bf16":  # DeepSpeed's own would make the weights bf16
            return functools.partial(torch.autocast, self.device.type, torch.bfloat16)
        own: Callable[[], Any] = accelerator.autocast
        return own

    def mixed_precision(self, precision: Precision) -> str:
        """accelerate's own word for it; DeepSpeed's engine has none, see ``autocast``."""
        return "no" if precision == "fp32" or self.zero else precision

    def take_over(self, accelerator: Accelerator, precision: Precision) -> None:
        """Make this run's own what accelerate keeps once for all trainings of a process.

        A launcher's accumulation steps would divide every loss again, and transformers' trainer, stopped
        between two steps of its own, leaves optimizers that make none.
        """
        accelerator.state._mixed_precision = self.mixed_precision(precision)
        accelerator.gradient_accumulation_steps = 1
        accelerator.sync_gradients = True

    def prepare(
        self, accelerator: Accelerator, model: Any, optimizer: Any, config: Config
    ) -> tuple[LossModule, Any]:
        """The model as accelerate's launcher wants it: as it is, replicated (DDP) or sharded (FSDP2).

        Returns:
            (what a loss is to be computed inside of; the optimizer).
        """
        wrapped = LossModule(model)
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.replicated = self.count > 1 and not self.sharded and not self.zero
        if self.zero:
            zero.configure(accelerator, config)
        if self.sharded:
            plugin = accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:
                # accelerate's would add up gradients in bf16, where DDP has float32.
                plugin.mixed_precision_policy = dataclasses.replace(
                    plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
                )
        if accelerator.distributed_type == DistributedType.NO:
            return wrapped, accelerator.prepare(optimizer)
        prepared: tuple[LossModule, Any] = accelerator.prepare(wrapped, optimizer)
        return prepared

    def accumulating(self, accelerator: Accelerator, wrapped: LossModule) -> AbstractContextManager[None]:
        """Around the loss and the backward of a micro-batch: gradients stay here until they are averaged.

        FSDP2 adds up shards instead, for which it does communicate: gradients of all parameters on every
        process are what it is there to avoid.
        """
        if self.sharded:
            return contextlib.nullcontext()
        if self.zero:
            return _no_step(accelerator)
        context: AbstractContextManager[None] = accelerator.no_sync(wrapped)
        return context

    def average_gradients(self, accelerator: Accelerator, wrapped: LossModule, finite: bool) -> None:
        """Have DDP average the gradients that each process has accumulated, by the backward of a zero loss.

        Not in the backward pass of the last micro-batch: a process that waits there for the others' gradients
        cannot learn that one of them has run out of memory. DeepSpeed also makes its step here, or skips it
        if the gradients, or the losses before (``finite``), are not finite.
        """
        if self.replicated or self.zero:
            trained = [p for p in wrapped.parameters() if p.requires_grad]
            zero_loss = wrapped(lambda: torch.stack([p.reshape(-1)[:0].sum().float() for p in trained]).sum())
            accelerator.backward(zero_loss if finite else zero_loss * math.nan)

    def lacked_memory(self, here: str | None) -> bool:
        """Whether any process ran out of memory, given what this one did, in words; if so, all try again.

        Raises:
            UsageError: this one did, in the middle of a pass for which the engine needs all.
        """
        if (self.sharded or self.zero) and here is not None:
            raise OutOfResources(
                f"process {self.index} ran out of memory ({here}); with FSDP2 or DeepSpeed the others cannot"
                " repeat the step with it: go on from the last checkpoint with --resume and a smaller"
                " --micro-batch"
            )
        return self.any(here is not None)

    def gather(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors whole and in RAM on rank 0, nothing on the others, which have to call this, too."""
        found = {}
        for name, tensor in tensors:
            complete = whole(tensor.detach())
            if self.main:
                found[name] = complete.cpu().contiguous()
        return found

    def distribute(self, value: Tensor, like: Tensor) -> Tensor:
        """Rank 0's tensor on every process, sharded as ``like`` is; elsewhere ``value`` has no data."""
        if self.count == 1 and not isinstance(like, DTensor):
            return value
        on_device = value.to(like.device) if self.main else torch.empty_like(value, device=like.device)
        if isinstance(like, DTensor):
            return distribute_tensor(on_device, like.device_mesh, like.placements)
        dist.broadcast(on_device, src=0)
        return on_device


class LossModule(nn.Module):
    """A module whose forward computes the loss: this is what DDP and FSDP2 wrap.

    They act before and after a module's forward, and the loss needs more than the model's own forward.
    Inside of it the parameters of a sharded model are whole.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Here accelerate looks for the layers that FSDP2 is to shard one by one.
        self._no_split_modules = model._no_split_modules

    def forward(self, work: Callable[[], T]) -> T:
        # accelerate's own autocast would take in the reference; the objective has its own where it belongs.
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return work()


@contextlib.contextmanager
def _no_step(accelerator: Accelerator) -> Iterator[None]:
    """What accelerate hands to DeepSpeed's backward pass meanwhile is not followed by its step."""
    accelerator.sync_gradients = False
    try:
        yield
    finally:
        accelerator.sync_gradients = True


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one all of it, which every process has to ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a whole tensor, which every process has; of a sharded one each sets its shard."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def without_data(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shapes and dtypes alone."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def process_count() -> int:
    """How many processes the run has, for code that is not handed its ``Processes``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def in_batch_order(shards: Sequence[Sequence[tuple[K, T]]]) -> Iterator[tuple[K, T]]:
    """What the processes made of their shards of one list after another, in the order of the lists.

    Args:
        shards: of each process, (which list, one item).
    """
    for key in dict.fromkeys(key for shard in shards for key, _ in shard):
        parts = [[item for item in shard if item[0] == key] for shard in shards]
        for i in range(max(map(len, parts))):
            yield from (part[i] for part in parts if i < len(part))


def _in_words(error: BaseException | None) -> str | None:
    return None if error is None else str(error) or type(error).__name__
