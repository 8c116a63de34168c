"""What can be found out about a model's structure: its positions, its head, its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from quark_fast.errors import UsageError
from quark_fast.model.lookups import Lookups

LONGEST_PROMPT = 1024  # unless a run asks for longer ones, tokens


def positions(config: Any) -> int | None:
    """How many tokens a model can read, by its config or its text model's; None: no limit is given."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


@torch.no_grad()
def learned_positions(model: Any) -> int | None:
    """How many positions a table has in which the model looks them up; None: it has no such table."""
    if sum(isinstance(module, nn.Embedding) for module in model.modules()) < 2:
        return None
    token = len(model.get_input_embeddings().weight) // 2  # no padding
    found = []
    # By two lengths: a table of something else may be asked for 0, 1 and 2 by chance.
    for tokens in (3, 7):
        with Lookups() as lookups:
            try:
                model(torch.full((1, tokens), token, device=model.device))
            except Exception:  # foreign code fails in any way; check_reading.py reports it
                return None
        found.append(lookups.counted(tokens))
    return min((rows - start for rows, start in set.intersection(*found)), default=None)


def recompute_layers(model: Any) -> None:
    """Keep a layer's input alone for the backward pass, which computes the rest of the layer again.

    Raises:
        UsageError: no layer can, such as those of a model's own code, which only do it in training mode.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    refusal = UsageError(f"{type(model).__name__} does not support gradient checkpointing; leave it out")
    if not layers:
        raise refusal
    # transformers 5.24 calls it by another name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise refusal from error
    for layer in layers:
        # A layer does it while it is in training, but dropout, its own or a part's, is to stay off.
        layer.training = True
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)


@torch.no_grad()
def linear_head(model: Any) -> nn.Linear | None:
    """The layer W, b for which the model's logits are exactly W h + b, h its body's last hidden states.

    None for a model that does more: cap or scale its logits (Gemma 2, Granite, Cohere), or change the
    hidden states on their way to the head (MiniCPM). Both are tried out on a few tokens, with numbers in
    place of the head's output that no cap or scale leaves alone, since those of a small model may be too
    small to show it.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or body is model:
        return None
    ids = torch.arange(min(4, len(head.weight)), device=head.weight.device).unsqueeze(0)
    ramp = torch.linspace(-100, 100, len(head.weight), device=head.weight.device, dtype=head.weight.dtype)
    taken: list[Tensor] = []

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        taken.append(inputs[0])
        return ramp.expand_as(output)

    hook = head.register_forward_hook(watch)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or len(taken) != 1 or taken[0].shape != hidden.shape:
        return None
    same = (taken[0] - hidden).abs().max() <= 1e-3 * hidden.abs().max()
    return head if same and torch.equal(logits, ramp.expand_as(logits).to(logits.dtype)) else None
