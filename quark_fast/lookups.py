"""Which tables a model looks numbers up in, whatever its modules are called."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each table with the integers looked up in it, also where that fails: (table, integers)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("embedding", "index", "index_select", "gather"):
            listed = (value for value in args[1:] if isinstance(value, list | tuple))
            for value in itertools.chain(args[1:], *listed):
                if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
                    self.seen.append((args[0], value))
        return func(*args, **(kwargs or {}))
