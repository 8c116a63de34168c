"""The input embedding with one more row for each reward token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RewardEmbedding(nn.Module):
    """The model's own input embedding with K more rows, held as a parameter of their own.

    Being apart, the rows learn at their own rate, and the output head, tied or not, keeps the base
    vocabulary: a reward token has no logit, so it is neither sampled nor counted in any loss term.
    """

    def __init__(self, base: nn.Module, first_id: int, rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.first_id = first_id
        self.rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """The base table: what transformers ties the head to and reads dtype and device from."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        is_reward = ids >= self.first_id
        embedded: Tensor = self.base(ids.masked_fill(is_reward, 0))
        own = nn.functional.embedding((ids - self.first_id).clamp(min=0), self.rows)
        # Gemma's embedding scales what it looks up: the reward rows with it.
        own = own * getattr(self.base, "embed_scale", 1.0)
        return torch.where(is_reward.unsqueeze(-1), own.to(embedded.dtype), embedded)
