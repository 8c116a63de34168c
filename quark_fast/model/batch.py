"""The collator: prefix + reward token + prompt + completion as padded tensors; a model's outputs on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from quark_fast.model.cache import decoding_cache
from quark_fast.model.policy import Policy
from quark_fast.model.reading import Reading, last_column, pad_left, positions_of, read


@dataclass(frozen=True)
class Batch:
    """N contexts and completions side by side, aligned where the completion starts.

    Contexts are padded on their left and completions on their right, so that the logits that predict a
    completion are the same columns in every row and the head runs on those alone.

    Attributes:
        ids, attention_mask: (N, P + C) what the policy reads: prefix, reward token, prompt, completion.
        labels: (N, C) completion ids, 0 beyond the end.
        mask: (N, C) bool, True on completion tokens.
        reading: how the policy's model is to be read.
        prompt_lengths: tokens of each prompt after its first one; empty where nothing asks what predicts
            them. Else those columns are read in front of the completion's, H = max(prompt_lengths) of them,
            the last prompt token's first.
    """

    ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    mask: Tensor
    reading: Reading
    prompt_lengths: Sequence[int] = ()


class Counts(NamedTuple):
    """What the sums over a batch are divided by: its completions' tokens, its samples, and the tokens of its
    prompts that stand after a prompt's first one."""

    tokens: float
    samples: float
    prompt_tokens: float

    @classmethod
    def of(cls, prompts: Sequence[Sized], completions: Sequence[Sized], share: float = 1.0) -> Self:
        """Those of so many samples, times ``share``."""
        prompt_tokens = sum(lengths_after_first(prompts))
        return cls(sum(map(len, completions)) * share, len(prompts) * share, prompt_tokens * share)


def lengths_after_first(prompts: Sequence[Sized]) -> list[int]:
    """Of each prompt, how many tokens stand after its first one."""
    return [max(0, len(prompt) - 1) for prompt in prompts]


def make_batch(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantiles: Sequence[int | None],
    device: torch.device,
    prompts_too: bool = False,
) -> Batch:
    """Condition each prompt on its quantile's token (None: no token) and put the completion after.

    With ``prompts_too`` the prompts' tokens are to be predicted, too, all but the first.
    """
    contexts = [policy.conditioned(p, k) for p, k in zip(prompts, quantiles, strict=True)]
    context, context_mask = pad_left(contexts, device)
    # Right-aligned and flipped is left-aligned: one padding function for both sides.
    labels, mask = (t.flip(1) for t in pad_left([row[::-1] for row in completions], device))
    return Batch(
        ids=torch.cat([context, labels], dim=1),
        attention_mask=torch.cat([context_mask, mask], dim=1),
        labels=labels,
        mask=mask.bool(),
        reading=policy.reading,
        prompt_lengths=lengths_after_first(prompts) if prompts_too else (),
    )


def completion_logits(model: Any, batch: Batch) -> Tensor:
    """(N, H + C, >= V) logits of each completion token, given everything before it; H is 0 but for
    ``Batch.prompt_lengths``."""

    def logits(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        columns = _before_completion(batch, ids)
        found: Tensor = read(model, ids, mask, positions, columns=columns).logits
        return found

    return _by_length(batch, logits)


def shared_logits(model: Any, batch: Batch) -> Tensor:
    """``completion_logits``, without gradients, for which neighbours with the same context read it once.

    Another order of the same sums: equal up to rounding.
    """
    if not (batch.reading.cache and batch.reading.many):
        return completion_logits(model, batch)
    length = batch.labels.shape[1]

    def logits(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        width = ids.shape[1] - length
        context = ids[:, :width] if mask is None else torch.cat([ids[:, :width], mask[:, :width]], 1)
        _, row_of, counts = torch.unique_consecutive(context, return_inverse=True, return_counts=True, dim=0)
        if len(counts) == len(ids):
            found: Tensor = read(model, ids, mask, positions, columns=_before_completion(batch, ids)).logits
            return found
        firsts = counts.cumsum(0) - counts

        def part(tensor: Tensor | None, rows: Any, columns: slice) -> Tensor | None:
            return None if tensor is None else tensor[rows, columns]

        cache, front = decoding_cache(model), slice(width)
        last = last_column(ids.device)
        inputs = (part(mask, firsts, front), part(positions, firsts, front))
        first: Tensor = read(model, ids[firsts, front], *inputs, columns=last, cache=cache).logits[row_of]
        if length == 1:
            return first
        # From here on each completion has its own.
        cache.reorder_cache(row_of)
        rest, every = slice(width, -1), slice(None)
        inputs = (part(mask, every, slice(-1)), part(positions, every, rest))
        return torch.cat([first, read(model, ids[:, rest], *inputs, cache=cache).logits], 1)

    return _by_length(batch, logits)


def completion_hidden(model: Any, batch: Batch) -> Tensor:
    """(N, H + C, D) what the model's head takes to predict each completion token (``structure.linear_head``);
    H is 0 but for ``Batch.prompt_lengths``."""

    def hidden(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        found: Tensor = read(model.base_model, ids, mask, positions).last_hidden_state
        return found[:, _before_completion(batch, ids)]

    return _by_length(batch, hidden)


def _by_length(batch: Batch, compute: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]) -> Tensor:
    """The rows together, or where the model reads no padding, contexts of one length at a time.

    What follows a completion needs no mask: a causal model reads it later.
    """
    if batch.reading.padding:
        return compute(batch.ids, batch.attention_mask, positions_of(batch.attention_mask))
    width = batch.ids.shape[1] - batch.labels.shape[1]
    starts = width - batch.attention_mask[:, :width].sum(1)
    parts, order = [], []
    for start in sorted({*starts.tolist()}):
        rows = (starts == start).nonzero().squeeze(1)
        parts.append(compute(batch.ids[rows, start:], None, None))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _before_completion(batch: Batch, ids: Tensor) -> Tensor:
    """The columns of ids that predict the completion; its last token predicts nothing that is trained on.

    In front of them those that predict the prompt, where they are asked for, from the last one back; a prompt
    that is shorter has any column in place of those that it has not.
    """
    length, width = batch.labels.shape[1], ids.shape[1]
    completion = torch.arange(width - length - 1, width - 1, device=ids.device)
    prompt = width - length - 2 - torch.arange(max(batch.prompt_lengths, default=0), device=ids.device)
    return torch.cat([prompt.clamp(min=0), completion])
