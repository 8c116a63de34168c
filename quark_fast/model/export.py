"""The trained model as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def never_win(model: Any, ids: range, rare: Tensor, untie: bool) -> None:
    """Give these ids the mean of the rare tokens' rows in the head, which is untied from the embeddings.

    Their logit is the mean of the rare ones, so it is below the highest whatever the hidden state, and their
    probability the geometric mean of the rare ones'.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head is None or not ids or (head.weight is table and not untie):
        return
    if head.weight is table:
        head.weight = nn.Parameter(table.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    wanted = torch.tensor(list(ids), device=head.weight.device)
    for parameter in (head.weight, getattr(head, "bias", None)):
        if parameter is not None:
            mean = parameter.data[rare.to(wanted.device)].float().mean(0)
            parameter.data[wanted] = mean.to(parameter.dtype)


def as_token_0(model: Any, name: str, ids: Sequence[int], size: int) -> None:
    """Give these ids token 0's row in a table, which gets ``size`` rows if it has fewer."""
    module = model.get_submodule(name)
    table, before = module.weight, len(module.weight)
    if before < size:
        more = table.data[:1].expand(size - before, -1)
        module.weight = nn.Parameter(torch.cat([table.data, more]), requires_grad=False)
        module.num_embeddings = size
        # Some setting has the number of rows; what else it may be called, an export that is loaded shows.
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            for key, value in config.to_dict().items():
                if "vocab" in key and value == before:
                    setattr(config, key, size)
    module.weight.data[list(ids)] = module.weight.data[0].clone()
