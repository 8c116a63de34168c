"""The completions of a batch while they are drawn, and which of their rows are still decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quark_fast.rollout.tokens import check_finite

Ids = npt.NDArray[np.int32]
LogPs = npt.NDArray[np.float32]

# Rows that have ended are dropped where at most this share of the rows goes on. Counted for lengths that are
# geometric (docs/gpu.md): 16% more tokens are decoded than have to be (at a half 39%, at seven eighths 8%),
# and for each of them 2.4 cached tokens are copied (0.8, 4.7), where its attention reads a hundred or more.
WORTH_DROPPING = 0.75


class LiveRows:
    """Completions that are drawn a token at a time, side by side.

    A row is one of them. Those that have ended are decoded with the others until they are dropped; what is
    drawn for a row after its end is no part of it.

    Args:
        rows: how many there are.
        most: tokens of each at most.
        stop: ids that end one.
        told: how many log-probabilities of each token are kept.
    """

    def __init__(self, rows: int, most: int, stop: Tensor, told: int) -> None:
        self.stop = stop
        self._ids = torch.zeros(rows, most, dtype=torch.long, device=stop.device)
        self._told = torch.zeros(told, rows, most, dtype=torch.float32, device=stop.device)
        self._length = 0
        self._held = torch.arange(rows, device=stop.device)  # the rows that are decoded
        self._ended = torch.zeros(rows, dtype=torch.bool, device=stop.device)

    def __len__(self) -> int:
        return len(self._held)

    def add(self, tokens: Tensor, *told: Tensor) -> None:
        """The next token of each row that is decoded, -1 where there was none to draw; its log p's."""
        self._ids[:, self._length].index_copy_(0, self._held, tokens)
        for kept, log_p in zip(self._told, told, strict=True):
            kept[:, self._length].index_copy_(0, self._held, log_p)
        self._ended |= torch.isin(tokens, self.stop)
        self._length += 1

    def alive(self) -> int:
        """How many have not ended. The device is waited for."""
        return int((~self._ended).sum())

    def drop_ended(self, alive: int) -> Tensor:
        """Decode no more than the rows that have not ended, ``alive`` in number.

        Returns:
            (alive,) which of those decoded so far they are, ascending. The device is not waited for.
        """
        kept = self._ended.sort(stable=True).indices[:alive]
        self._held, self._ended = self._held[kept], self._ended[kept]
        return kept

    def completions(self, stop_ids: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Each row's ids up to its first stop id, that one included, and minus the sums of its log p's.

        The device is waited for, once.

        Args:
            stop_ids: those of ``stop``, which are not read from there.
        Raises:
            NotFinite: somewhere there was no token to draw.
        """
        ids, told = self._read()
        check_finite(not (ids < 0).any())
        every = [_until_stop(row, stop_ids) for row in ids.tolist()]
        # 0 - 0 is 0, and not -0.
        return [
            (one, [0.0 - math.fsum(log_p[: len(one)]) for log_p in row])
            for one, row in zip(every, told.swapaxes(0, 1).tolist(), strict=True)
        ]

    def _read(self) -> tuple[Ids, LogPs]:
        """(rows, length) ids and (told, rows, length) log p's, by one copy: as bits of one dtype."""
        ids, told = self._ids[:, : self._length], self._told[..., : self._length]
        held = torch.cat([ids.int().unsqueeze(0), told.view(torch.int32)]).cpu().numpy()
        return held[0], held[1:].view(np.float32)


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first stop id, that id included: ending there is learned, too."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens
