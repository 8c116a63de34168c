"""How likely text is to a model: perplexity, KL and the fit of held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quark_fast.data.row import Rendered
from quark_fast.errors import UsageError
from quark_fast.model.batch import Batch, completion_hidden, completion_logits, make_batch, shared_logits
from quark_fast.model.policy import Policy
from quark_fast.model.sizes import rows_read
from quark_fast.model.structure import linear_head
from quark_fast.ops.loss import NLL_ALONE, QuarkLoss, quark_loss
from quark_fast.rollout.sampling import Conditioning
from quark_fast.runtime.memory import by_parts

Nll = Callable[[Sequence[int], Sequence[list[int]], Sequence[str]], list[tuple[float, int]]]
"""(index of each completion's prompt, completions as ids, as texts) -> (-log p in nats, tokens) of each."""


def id_nll(policy: Policy, model: Any, prompts: Sequence[Sequence[int]], rows: int = 0) -> Nll:
    """Of the sampled ids under ``model``, which has the policy's vocabulary; prefix and prompt in front.

    ``rows`` of them side by side, as in ``completion_nll``.
    """

    def measure(
        indices: Sequence[int], completions: Sequence[list[int]], texts: Sequence[str]
    ) -> list[tuple[float, int]]:
        nll = completion_nll(policy, model, [prompts[i] for i in indices], completions, rows=rows)
        return [(total, len(ids)) for total, ids in zip(nll, completions, strict=True)]

    return measure


def text_nll(policy: Policy, model: Any, prompts: Sequence[str], max_tokens: int, rows: int = 0) -> Nll:
    """Of the text under ``model``, by the policy's tokenizer, whoever wrote it.

    Prompt and completion are tokenised together, since what a tokenizer makes of a word depends on what
    stands before it, and a chat (``Rendered``) as ``Policy.encode`` does. A token that holds any of the
    completion counts to it; in front are the prefix and the last ``max_tokens`` tokens of the prompt, fewer
    where the model has no more positions.

    Raises (what is returned):
        UsageError: a completion is longer than the model has positions.
    """
    limit = policy.positions

    def split(prompt: str, text: str) -> tuple[list[int], list[int]]:
        front = policy.in_front(isinstance(prompt, Rendered))
        whole = front + prompt + text
        made = policy.text_tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        own = slice(1 if front else 0, None)
        ids, ends = made.input_ids[own], [end - len(front) for _, end in made.offset_mapping[own]]
        first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
        if not policy.prefix:
            first = max(first, 1)  # something must stand in front of the first token that counts
        completion = ids[first:]
        room = max_tokens if limit is None else min(max_tokens, limit - len(policy.prefix) - len(completion))
        if room < (0 if policy.prefix else 1):
            raise UsageError(
                f"a completion of {len(completion)} tokens is longer than the {limit} positions of the model"
                " that measures the perplexity; lower max_new_tokens, or name another by --ppl-model"
            )
        return ids[max(0, first - room) : first], completion

    def measure(
        indices: Sequence[int], completions: Sequence[list[int]], texts: Sequence[str]
    ) -> list[tuple[float, int]]:
        pairs = [split(prompts[i], text) for i, text in zip(indices, texts, strict=True)]
        kept = [pair for pair in pairs if pair[1]]  # a completion may be nothing but its end
        fronts, written = [front for front, _ in kept], [ids for _, ids in kept]
        nll = iter(completion_nll(policy, model, fronts, written, rows=rows))
        return [(next(nll), len(ids)) if ids else (0.0, 0) for _, ids in pairs]

    return measure


@torch.inference_mode()
def completion_nll(
    policy: Policy,
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantile: int | None = None,
    rows: int = 0,
) -> list[float]:
    """-log p of each completion under ``model``, nats, given the quantile's token (None: no token).

    A prompt is read once for all its completions that are neighbours, where the model can be read so.
    ``rows`` completions are read side by side, half as many where the memory does not suffice; 0: so many
    that they hold 1280 tokens, on a GPU what its free memory holds. They change the rounding alone.
    """
    parts = _losses(policy, model, None, prompts, completions, quantile, rows)
    return [total for out, _ in parts for total in out.nll.sum(-1).tolist()]


class ReferenceLogits:
    """What the reference, given no token, predicts completions with, any number of times.

    It does not change, so its hidden states of the completions are kept, 2 bytes x D a token in bfloat16,
    and only its head is computed again. Where its logits are not its hidden states times one matrix,
    everything is.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Any,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
    ) -> None:
        self.policy, self.reference = policy, reference
        self.prompts, self.completions = prompts, completions
        self._head = linear_head(reference)
        self._hidden: dict[int, Tensor] = {}  # (its tokens, D) of a completion

    @torch.inference_mode()
    def __call__(self, part: slice) -> Tensor:
        """(N, C, >= V) logits of these completions; beyond the end of one they mean nothing."""
        rows = range(len(self.completions))[part]
        if self._head is None:
            return completion_logits(self.reference, self._batch(part))
        if any(i not in self._hidden for i in rows):
            found = completion_hidden(self.reference, self._batch(part))
            for i, hidden in zip(rows, found, strict=True):
                self._hidden[i] = hidden[: len(self.completions[i])].clone()
        logits: Tensor = self._head(pad_sequence([self._hidden[i] for i in rows], batch_first=True))
        return logits

    def _batch(self, part: slice) -> Batch:
        prompts, completions = self.prompts[part], self.completions[part]
        return make_batch(self.policy, prompts, completions, [None] * len(prompts), self.reference.device)


@torch.inference_mode()
def completion_nll_and_kl(
    policy: Policy, model: Any, reference: ReferenceLogits, quantile: int, rows: int = 0
) -> tuple[list[float], float]:
    """Of the reference's completions under ``model``, given the quantile's token; ``rows`` side by side.

    Returns:
        (-log p of each, nats; KL(model || reference), nats, the mean over all completions' tokens, exact
        over the base vocabulary at every token, NaN without completions).
    """
    nll, total, tokens = [], 0.0, 0
    parts = _losses(policy, model, reference, reference.prompts, reference.completions, quantile, rows)
    for out, count in parts:
        nll += out.nll.sum(-1).tolist()
        total, tokens = total + float(out.kl.sum()), tokens + count
    return nll, total / tokens if tokens else float("nan")


def _losses(
    policy: Policy,
    model: Any,
    reference: ReferenceLogits | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    quantile: int | None,
    rows: int,
) -> Iterator[tuple[QuarkLoss, int]]:
    """(NLL and KL at every token, how many tokens) of some completions at a time; without reference no KL."""
    models = 1 if reference is None else 2  # as many hold the logits of 1280 tokens together
    longest = max(map(len, completions), default=1)
    if not rows:
        context = max((len(policy.conditioned(prompt, quantile)) for prompt in prompts), default=1)
        rows = rows_read(model, context + longest, max(1, 1280 // models // longest))

    def loss(part: slice) -> tuple[QuarkLoss, int]:
        quantiles = [quantile] * len(prompts[part])
        conditioned = make_batch(policy, prompts[part], completions[part], quantiles, model.device)
        out = quark_loss(
            shared_logits(model, conditioned),
            None if reference is None else reference(part),
            conditioned.labels,
            conditioned.mask,
            kl_coef=0.0 if reference is None else 1.0,
            entropy_coef=0.0,
            vocab_size=policy.vocabulary,
        )
        return out, int(conditioned.mask.sum())

    return by_parts(len(prompts), rows, loss)


TEXT_PROMPT = 32  # tokens


@torch.inference_mode()
def text_fit(
    policy: Policy,
    model: Any,
    texts: Sequence[Sequence[int]],
    conditioning: Conditioning,
    rows: int = 0,
    prompt: int = TEXT_PROMPT,
) -> list[tuple[float, int, int]]:
    """How ``model`` predicts texts: (nll in nats, tokens predicted right, tokens) of each.

    The first ``prompt`` tokens of a text, at most half of it and at least one, are its prompt: the
    conditioning stands before them, as where completions are sampled, and the tokens after them count.
    Right after a reward token, where no completion ever stands, the token's own words cost up to a sixth of
    the perplexity before any training (``benchmarks/token_in_front.py``). Guided conditioning mixes its two
    streams as sampling does, whole: a text may have words outside of any nucleus. ``rows`` texts are read
    side by side; 0: 4, on a GPU what its free memory holds.
    """
    quantiles = [quantile for quantile, _ in conditioning.streams()]
    longest = max((len(policy.conditioned(text, k)) for text in texts for k in quantiles), default=1)
    rows = rows or rows_read(model, longest, 4)

    def fit(part: slice) -> list[tuple[float, int, int]]:
        chosen = texts[part]
        given = [max(1, min(prompt, len(text) // 2)) for text in chosen]
        first = [text[:n] for text, n in zip(chosen, given, strict=True)]
        rest = [text[n:] for text, n in zip(chosen, given, strict=True)]
        mixed: Tensor | None = None
        for quantile, weight in conditioning.streams():
            batch = make_batch(policy, first, rest, [quantile] * len(chosen), model.device)
            logits = completion_logits(model, batch)
            # Logits are log p up to a constant of each row, and the mix of constants is one.
            stream = logits if weight == 1 else logits.float() * weight
            mixed = stream if mixed is None else mixed + stream
        assert mixed is not None  # there is always a stream
        found = quark_loss(mixed, None, batch.labels, batch.mask, **NLL_ALONE, vocab_size=policy.vocabulary)
        nll = found.nll.sum(-1)
        correct = ((mixed[..., : policy.vocabulary].argmax(-1) == batch.labels) & batch.mask).sum(-1)
        return list(zip(nll.tolist(), correct.tolist(), batch.mask.sum(-1).tolist(), strict=True))

    return [one for part in by_parts(len(texts), rows, fit) for one in part]
