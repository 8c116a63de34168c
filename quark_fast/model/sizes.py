"""How many bytes a model's work takes, by arithmetic on its shapes; how many rows free memory holds.

Written for decoders such as Llama: attention of heads that may share keys, a gated feed-forward layer. For
others it is a guide, and halving where memory runs out (``runtime.memory.within_memory``) has the last word.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from quark_fast.model.cache import ROOM
from quark_fast.ops.linear import chunk_rows
from quark_fast.runtime.memory import free_memory

# Of free memory that is planned with: kernels' workspaces and the allocator's fragments need the rest.
SHARE = 0.9
MOST_ROWS = 512  # read side by side; more are no faster


@dataclass(frozen=True)
class Shape:
    """What the bytes depend on; ``key_width`` and ``query_width``: of all heads of a token together.

    ``adapted`` is the sum of inputs and outputs of all linear layers of one layer, which adapters of rank r
    multiply: r x adapted parameters a layer.
    """

    layers: int
    width: int
    feed_forward: int
    heads: int
    key_width: int
    query_width: int
    vocabulary: int
    parameters: int = 0

    @classmethod
    def of(cls, config: Any, parameters: int = 0) -> Shape | None:
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
        return cls(layers, width, inner, heads, keys * size, heads * size, config.vocab_size, parameters)

    @property
    def adapted(self) -> int:
        attention = 2 * (self.width + self.query_width) + 2 * (self.width + self.key_width)
        return attention + 3 * (self.width + self.feed_forward)


def shape_on_meta(config: Any) -> Shape:
    """The shape with its parameters counted, tied ones once, from a model on the meta device: no weights.

    Raises:
        ValueError: the config is no decoder's.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    shape = Shape.of(config, sum(weight.numel() for weight in model.parameters()))
    if shape is None:
        raise ValueError(f"the config of {type(config).__name__} names no layers, width and heads")
    return shape


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


# ------------------------------------------------------------- bytes of a training step


def saved_bytes(shape: Shape, lora_rank: int) -> int:
    """Bytes a token and layer that the backward pass needs; bfloat16, fused attention with a mask.

    All weights, float32 under autocast:  26 d + 8 q + 4 h + 8 f + 8.  Both norms keep input and output in
    float32 (16 d), each of five linear layers after a norm a bfloat16 copy of its input (10 d).
    Adapters of rank r, under autocast:  12 d + 8 q + 4 h + 8 f + 14 r + 8.  Both norms keep float32 copies of
    their input (8 d), adapters share bfloat16 inputs (4 d) and keep their r numbers (seven layers).
    Both: rotated queries, keys and values repeated for each head, attention's output (2 q each), its
    normaliser (4 h); gate, up, silu, their product (2 f each); the norms' scales (8). q = heads x head size.
    Left out: the mask, 2 x row's tokens a token and layer.
    """
    own = 12 * shape.width + 14 * lora_rank if lora_rank else 26 * shape.width
    return own + 8 * shape.query_width + 4 * shape.heads + 8 * shape.feed_forward + 8


def activation_bytes(shape: Shape, tokens: int, lora_rank: int, recompute: bool) -> int:
    """Of a forward pass of so many tokens: tokens x layers x ``saved_bytes``.

    Recomputed: tokens (layers x input of one + ``saved_bytes``); the input has 4 d bytes in float32, 2 d in
    bfloat16 beside adapters.
    """
    saved = saved_bytes(shape, lora_rank)
    if not recompute:
        return tokens * shape.layers * saved
    return tokens * (shape.layers * shape.width * (2 if lora_rank else 4) + saved)


def optimizer_bytes(shape: Shape, lora_rank: int, optimizer: str = "adamw") -> int:
    """AdamW's two moments of all that is trained, reward tokens' rows left out.

    adamw, float32: 8 P; 8 bytes for each of r x adapted x layers of adapters.
    adamw-8bit: 2 + 8 / 256 bytes each, two codes and their share of two float32 scales; but 8 for each
    number of the embedding table. Norms and other parameters below 4096 numbers, with 8, are left out.
    """
    adapters = lora_rank * shape.adapted * shape.layers
    if optimizer == "adamw":
        return 8 * (adapters if lora_rank else shape.parameters)
    table = shape.vocabulary * shape.width
    coded = adapters if lora_rank else shape.parameters - table
    return 2 * coded + coded // 32 + (0 if lora_rank else 8 * table)


def state_bytes(shape: Shape, lora_rank: int, optimizer: str = "adamw") -> int:
    """Weights, gradients, AdamW's two moments, the reference.

    All weights: 8 P of weights and gradients in float32, autocast's bfloat16 copies (2 P), the bfloat16
    reference (2 P), ``optimizer_bytes``. Adapters: 2 P, which the reference shares, 10 bytes for each of
    r x adapted x layers (weight, gradient, autocast's copy), ``optimizer_bytes``.
    """
    moments = optimizer_bytes(shape, lora_rank, optimizer)
    if not lora_rank:
        return 12 * shape.parameters + moments
    return 2 * shape.parameters + 10 * lora_rank * shape.adapted * shape.layers + moments


def loss_bytes(shape: Shape, completion_tokens: int, lora_rank: int) -> int:
    """bfloat16 logits of a chunk, and the head's float32 gradient (4 V d).

    Of n rows, half of a chunk, there are five: both streams' logits, the reference's, and two gradients. A
    chunk is the linear loss's on a GPU. The frozen head of adapters has no gradient.
    """
    head = 0 if lora_rank else 4 * shape.vocabulary * shape.width
    return 5 * chunk_rows(completion_tokens) * shape.vocabulary + head


def step_bytes(
    shape: Shape,
    samples: int,
    tokens: int,
    completion: int,
    lora_rank: int,
    recompute: bool,
    optimizer: str = "adamw",
) -> int:
    """Peak of a step of ``samples`` x ``tokens`` a forward pass, each under two reward tokens (contrast).

    state + activations of 2 x samples x tokens + loss of 2 x samples x completion tokens.
    """
    activations = activation_bytes(shape, 2 * samples * tokens, lora_rank, recompute)
    loss = loss_bytes(shape, 2 * samples * completion, lora_rank)
    return state_bytes(shape, lora_rank, optimizer) + activations + loss


def held_while_sampling(shape: Shape, lora_rank: int, optimizer: str = "adamw") -> int:
    """Beside the rows: the state without gradients and autocast's copies, and the copy that is sampled (2 P).

    All weights: 4 P + 2 P (reference) + 2 P; adapters: 2 P + 2 P + 4 bytes for each of theirs; and
    ``optimizer_bytes``.
    """
    moments = optimizer_bytes(shape, lora_rank, optimizer)
    if not lora_rank:
        return 8 * shape.parameters + moments
    return 4 * shape.parameters + 4 * lora_rank * shape.adapted * shape.layers + moments


# ------------------------------------------------------------- rows that free memory holds


def halved_to_fit(most: int, row: int, free: int) -> int:
    """The first of most, its half, the half's half ... whose rows fit; 1 where none does.

    ``within_memory`` halves alike: both come to the same sizes.
    """
    size = most
    while size > 1 and size * row > free * SHARE:
        size = (size + 1) // 2
    return size


def rows_that_fit(row: int, free: int, most: int = MOST_ROWS) -> int:
    """As many rows as fit, from 1 to ``most``."""
    return max(1, min(most, int(free * SHARE) // max(1, row)))


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


def rows_read(model: Any, tokens: int, usual: int) -> int:
    """Texts of so many tokens whose probabilities are read side by side: what a GPU's free memory holds.

    ``usual`` on a CPU, and for a model of unknown shape.
    """
    free, shape = free_memory(model.device), Shape.of(model.config)
    if free is None or shape is None:
        return usual
    return rows_that_fit(reading_bytes(shape, tokens, model.dtype.itemsize), free)


def rows_scored(model: Any, tokens: int, usual: int) -> int:
    """The same of texts that a classifier scores."""
    free, shape = free_memory(model.device), Shape.of(model.config)
    if free is None or shape is None:
        return usual
    return rows_that_fit(scoring_bytes(shape, tokens, model.dtype.itemsize), free)
