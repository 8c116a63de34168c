"""How many bytes rows take that are sampled, read or scored, by a model's shape; how many free memory holds.

Written for decoders such as Llama: attention of heads that may share keys, a gated feed-forward layer. For
others it is a guide, and halving where memory runs out (``runtime.memory.within_memory``) has the last word.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from quark_fast.model.cache import ROOM
from quark_fast.runtime.memory import free_memory

# Of free memory that is planned with: kernels' workspaces and the allocator's fragments need the rest.
SHARE = 0.9
MOST_ROWS = 512  # read side by side; more are no faster


@dataclass(frozen=True)
class Shape:
    """What the bytes depend on; ``key_width`` and ``query_width``: of all heads of a token together."""

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_width: int
    query_width: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """By a transformers config; None: it does not name layers, width and heads as a decoder's does."""
        config = config.get_text_config()
        layers, width, heads = (
            getattr(config, name, None)
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        if not (isinstance(layers, int) and isinstance(width, int) and isinstance(heads, int)):
            return None
        size = getattr(config, "head_dim", None) or width // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        if not isinstance(inner, int) or not isinstance(keys, int):  # another one in each layer
            return None
        return cls(layers, width, inner, heads, keys * size, heads * size, config.vocab_size)


# ------------------------------------------------------------- bytes of rows that are sampled or read


def cache_bytes(shape: Shape, tokens: int, item: int = 2) -> int:
    """Keys and values of a row: 2 x layers x key heads x head size x tokens x bytes of a number."""
    return 2 * shape.layers * shape.key_width * tokens * item


def layer_bytes(shape: Shape, tokens: int, item: int = 2) -> int:
    """What exists of one layer at a time without a gradient: (4 d + 3 f) numbers a token."""
    return tokens * (4 * shape.width + 3 * shape.feed_forward) * item


def sampling_bytes(shape: Shape, tokens: int, item: int = 2) -> int:
    """A row while it is sampled: cache, one layer of it a second time, a layer's work, logits of one token.

    cache (1 + 1 / layers) + tokens (4 d + 3 f) item + 3 tokens^2 + V (item + 4): the cache has room for 64
    tokens more (``cache.ROOM``), a layer of it is there twice while it moves, the prompt has a mask and a
    bias made of it, and logits may be turned to float32.
    """
    cache = cache_bytes(shape, tokens + ROOM, item)
    logits, mask = shape.vocabulary * (item + 4), 3 * tokens**2
    return cache + cache // shape.layers + layer_bytes(shape, tokens, item) + mask + logits


def reading_bytes(shape: Shape, tokens: int, item: int = 2) -> int:
    """A row whose every token's probability is read: cache, a layer's work, logits of all tokens.

    cache + tokens ((4 d + 3 f) item + V (item + 16)): beside the logits up to four float32 tensors like them,
    of two models, or of two streams and their mixture.
    """
    logits = tokens * shape.vocabulary * (item + 4 * 4)
    return cache_bytes(shape, tokens, item) + layer_bytes(shape, tokens, item) + logits


def scoring_bytes(shape: Shape, tokens: int, item: int = 4) -> int:
    """A text that a classifier scores: a layer's work, and scores of its attention twice (softmax)."""
    return layer_bytes(shape, tokens, item) + 2 * shape.heads * tokens**2 * item


# ------------------------------------------------------------- rows that free memory holds


def halved_to_fit(most: int, row: int, free: int) -> int:
    """The first of most, its half, the half's half ... whose rows fit; 1 where none does.

    ``within_memory`` halves alike: both come to the same sizes.
    """
    size = most
    while size > 1 and size * row > free * SHARE:
        size = (size + 1) // 2
    return size


def rows_that_fit(row: int, free: int) -> int:
    """As many rows as fit, from 1 to ``MOST_ROWS``."""
    return max(1, min(MOST_ROWS, int(free * SHARE) // max(1, row)))


def rows_sampled(model: Any, asked: int, tokens: int, streams: int) -> int:
    """``asked`` completions side by side, or on a GPU with less free memory a half, a quarter ...; says so.

    Args:
        tokens: of the longest prompt and its completion together. streams: caches of each completion.
    """
    free, shape = free_memory(model.device), Shape.of(model.config)
    if free is None or shape is None:
        return asked
    size = halved_to_fit(asked, streams * sampling_bytes(shape, tokens, model.dtype.itemsize), free)
    if size < asked:
        logging.getLogger(__name__).warning(
            "%.1f GB of free memory hold %d completions of %d tokens side by side, not %d; --sample-at-once"
            " sets another number",
            free / 1e9,
            size,
            tokens,
            asked,
        )
    return size


def rows_read(
    model: Any, tokens: int, usual: int, bytes_of: Callable[[Shape, int, int], int] = reading_bytes
) -> int:
    """Texts of so many tokens that are read side by side: what a GPU's free memory holds.

    Args:
        usual: what they are on a CPU, and for a model of unknown shape.
        bytes_of: what a text takes; ``scoring_bytes`` where a classifier reads it.
    """
    free, shape = free_memory(model.device), Shape.of(model.config)
    if free is None or shape is None:
        return usual
    return rows_that_fit(bytes_of(shape, tokens, model.dtype.itemsize), free)
