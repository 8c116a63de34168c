"""Which tables a model looks numbers up in, whatever its modules are called."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Lookup(NamedTuple):
    """A call of torch's ``embedding``, ``index``, ``index_select`` or ``gather``."""

    by: str
    table: Tensor
    numbers: Tensor


class Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it each lookup of integers in a table is noted, also one that fails."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Lookup] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by = func.overloadpacket.__name__
        if by in ("embedding", "index", "index_select", "gather"):
            listed = (value for value in args[1:] if isinstance(value, list | tuple))
            for value in itertools.chain(args[1:], *listed):
                if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
                    self.seen.append(Lookup(by, args[0], value))
                    if by == "embedding" and value.numel() and int(value.max()) >= len(args[0]):
                        # Before a GPU finds out, which ends the process.
                        raise IndexError(f"row {int(value.max())} of a table of {len(args[0])}")
        return func(*args, **(kwargs or {}))

    def counted(self, tokens: int) -> set[tuple[int, int]]:
        """(rows, start) of the embeddings that were asked for start, start + 1, ..., once a token.

        Positions are looked up so; some begin after rows for padding. The tokens themselves must not be
        such a run.
        """
        found = (
            (len(one.table), one.numbers.flatten()[:tokens].tolist())
            for one in self.seen
            if one.by == "embedding"
        )
        return {(rows, run[0]) for rows, run in found if run == [run[0] + i for i in range(tokens)]}
