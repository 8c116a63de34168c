"""A cache of keys and values with room for the tokens to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens, at most; all that is held is copied when it is full
MULTIPLIED_ROOM = 16  # where ``with_room`` has all of it multiplied for every token


def decoding_cache(model: Any) -> DynamicCache:
    """An empty cache for the model, of which a new token's keys and values are all that is written.

    Layers that keep no more than a window, or something else than keys and values, are transformers' own.
    """
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _RoomyLayer()  # type: ignore[no-untyped-call]
    return cache


def keeps_all(layer: Any) -> bool:
    """Whether a layer of a ``decoding_cache`` that has read a prompt keeps every key and value of it.

    One of cross-attention has read nothing.
    """
    return type(layer) in (DynamicLayer, _RoomyLayer) and bool(layer.is_initialized)


def with_room(held: Tensor) -> Tensor:
    """(B, H, R, D) the memory that starts with the (B, H, L, D) keys or values, zeros behind them.

    A batch of matrices that lie back to back is multiplied as it is; of others oneDNN, which multiplies in 16
    bits, makes a copy first: a new token's scores take 3.7 ms a layer where this takes 0.9 (256 rows, 3 key
    heads of 64, 256 tokens held, room for 40). So in float32, on a GPU, and for what no ``decoding_cache``
    handed out, it is ``held`` itself.
    """
    room: Tensor = getattr(held, "room", held)
    return room if _is_copied_for_products(held) else held


def _is_copied_for_products(held: Tensor) -> bool:
    """Whether oneDNN multiplies it, and so what of it does not lie back to back as a copy."""
    return held.device.type == "cpu" and held.dtype != torch.float32


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that grows in place: transformers' copies all that it holds for each new token."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.key_room, self.value_room = self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_room = _behind(self.keys, key_states, self.key_room)
        self.values, self.value_room = _behind(self.values, value_states, self.value_room)
        for held, room in ((self.keys, self.key_room), (self.values, self.value_room)):
            held.room = room  # type: ignore[attr-defined]  # for ``with_room``
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        # Or else the room of all rows, in every layer, would be there until the next token.
        if self.is_initialized:
            self.key_room, self.value_room = self.keys, self.values


def _behind(held: Tensor, new: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """(..., L + l, D) ``new`` after ``held``, and the memory in which both lie.

    That is ``room``, unless what is held lies elsewhere, as after a change of order, or fills it.
    """
    count = held.shape[-2] if held.numel() else 0
    total = count + new.shape[-2]
    if held.data_ptr() != room.data_ptr() or room.shape[:-2] != new.shape[:-2] or total > room.shape[-2]:
        spare = MULTIPLIED_ROOM if _is_copied_for_products(new) else ROOM
        size = (*new.shape[:-2], total + spare, new.shape[-1])
        room = torch.empty(size, dtype=new.dtype, device=new.device)
        if count:
            room[..., :count, :] = held
        room[..., total:, :] = 0
    room[..., count:total, :] = new
    return room[..., :total, :], room
