"""How many bytes a training step takes, by arithmetic on a model's shapes: what ``scale.py --plan`` shows.

For decoders such as Llama, as ``quark_fast/model/sizes.py`` has the bytes of rows that are sampled or read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from quark_fast.model.sizes import Shape
from quark_fast.ops.linear import LEAST_ROWS_ELSEWHERE, chunk_rows


@dataclass(frozen=True)
class TrainedShape(Shape):
    """A shape with what is trained of it: all ``parameters``, tied ones once, or adapters.

    ``adapted`` is the sum of inputs and outputs of all linear layers of one layer, which adapters of rank r
    multiply: r x adapted parameters a layer.
    """

    parameters: int = 0

    @property
    def adapted(self) -> int:
        attention = 2 * (self.width + self.query_width) + 2 * (self.width + self.key_width)
        return attention + 3 * (self.width + self.feed_forward)


def shape_on_meta(config: Any) -> TrainedShape:
    """The shape with its parameters counted, tied ones once, from a model on the meta device: no weights.

    Raises:
        ValueError: the config is no decoder's.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shape = TrainedShape.of(config)
    if shape is None:
        raise ValueError(f"the config of {type(config).__name__} names no layers, width and heads")
    return dataclasses.replace(shape, parameters=sum(weight.numel() for weight in model.parameters()))


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


def optimizer_bytes(shape: TrainedShape, lora_rank: int, optimizer: str = "adamw") -> int:
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


def state_bytes(shape: TrainedShape, lora_rank: int, optimizer: str = "adamw") -> int:
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
    return 5 * chunk_rows(completion_tokens, LEAST_ROWS_ELSEWHERE) * shape.vocabulary + head


def step_bytes(
    shape: TrainedShape,
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


def held_while_sampling(shape: TrainedShape, lora_rank: int, optimizer: str = "adamw") -> int:
    """Beside the rows: the state without gradients and autocast's copies, and the copy that is sampled (2 P).

    All weights: 4 P + 2 P (reference) + 2 P; adapters: 2 P + 2 P + 4 bytes for each of theirs; and
    ``optimizer_bytes``.
    """
    moments = optimizer_bytes(shape, lora_rank, optimizer)
    if not lora_rank:
        return 8 * shape.parameters + moments
    return 4 * shape.parameters + 4 * lora_rank * shape.adapted * shape.layers + moments
