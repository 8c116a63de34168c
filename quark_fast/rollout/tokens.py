"""One token a row: from the logits of all streams to the ids.

``draw_by_equation`` is the equation in PyTorch. ``draw_tokens`` calls kernels that read the logits once. On
the CPU, csrc/sampling_rows.cpp: from the same generator it draws the same tokens, but where a uniform number
falls within rounding of the border between two. On a GPU, ops/token_kernel.py: it draws from the same
distribution by other uniform numbers, and the GPU is not waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quark_fast.errors import UsageError
from quark_fast.ops import cpp
from quark_fast.ops.loss import quark_loss
from quark_fast.ops.rows import KERNEL_DTYPES, TRITON, Nucleus


@dataclass(frozen=True)
class NextToken:
    """What the next token of each row is drawn from, given the logits of all streams.

    Attributes:
        weights: (streams,) float32, of each stream's log-probabilities.
        vocabulary: how many columns of the logits are tokens.
        suppressed: int64 ids that are not drawn.
        temperature: 0 takes the most probable token, the lowest id among equals.
        top_p: mass of the nucleus, as ``sample_tokens`` has it; greedy tokens need not be in it.
        nucleus_of: the stream whose nucleus it is, at this temperature; None: that of what is drawn from.
    """

    weights: Tensor
    vocabulary: int
    suppressed: Tensor
    temperature: float
    top_p: float
    nucleus_of: int | None = None

    def nucleus(self) -> Nucleus:
        """As the kernels take it."""
        if self.nucleus_of is None or self.temperature == 0:
            return Nucleus(self.top_p)
        return Nucleus(self.top_p, self.nucleus_of, 1 / self.temperature)


class NotFinite(UsageError):
    """A model's logits are NaN or infinite."""


def check_finite(finite: bool) -> None:
    """Raise NotFinite where a model's logits are not."""
    if not finite:
        raise NotFinite(
            "the model's logits are NaN or infinite, so there is nothing to sample from: its weights have"
            " diverged, or it overflows in this precision; give sound weights, or --precision fp32"
        )


def check_top_p(top_p: float) -> None:
    """Raise ValueError for a nucleus that no token is in."""
    if not top_p > 0:
        raise ValueError(f"top_p = {top_p}; it must be above 0, 1 for the whole vocabulary")


def draw_tokens(
    logits: Tensor, wanted: NextToken, generator: torch.Generator, log_q: Tensor | None = None
) -> Tensor:
    """One token a row.

    Args:
        logits: (streams N, >= V), all rows of the first stream, then those of the next; any float dtype.
            They stay as they are.
        generator: on the device of the logits.
        log_q: (N,) float32, contiguous, on that device: where the log-probability of each token goes, in the
            distribution that it is drawn from (0 where that is greedy); None: it is not computed.
    Returns:
        (N,) token ids. On a GPU, which is not waited for, -1 marks a row that raises NotFinite elsewhere.
    Raises:
        NotFinite: a row has a NaN or +inf, or no token of a probability above 0.
        ValueError: no token is in a nucleus of ``top_p`` <= 0.
    """
    if wanted.temperature == 0:  # where the nucleus does not matter
        wanted = replace(wanted, top_p=1.0)
    check_top_p(wanted.top_p)
    if logits.dtype in KERNEL_DTYPES:
        if logits.device.type == "cpu":
            return _draw_by_kernel(logits, wanted, generator, log_q)
        if logits.device.type == "cuda" and TRITON:
            return draw_on_gpu(logits, wanted, generator, log_q)
    return draw_by_equation(logits, wanted, generator, log_q)


def draw_by_equation(
    logits: Tensor, wanted: NextToken, generator: torch.Generator, log_q: Tensor | None = None
) -> Tensor:
    """``draw_tokens`` in PyTorch, on any device."""
    scores = scores_of(logits, wanted)
    if wanted.temperature != 0:
        top_p = wanted.top_p
        if wanted.nucleus_of is not None and top_p < 1:
            scores = scores.masked_fill(_outside_stream(logits, wanted, wanted.nucleus_of), -torch.inf)
            top_p = 1.0
        tokens = sample_tokens(scores, top_p, generator)
        if log_q is not None:
            log_q.copy_(log_probabilities(scores, tokens, top_p))
        return tokens
    highest, tokens = scores.max(-1)
    check_finite(bool(highest.isfinite().all()))
    if log_q is not None:
        log_q.zero_()
    return tokens


def scores_of(logits: Tensor, wanted: NextToken) -> Tensor:
    """(N, V) float32, whose softmax the tokens are drawn from, before the nucleus; may be the logits.

    scores = sum over streams s of weights_s log p_s / temperature, or the logits themselves of one stream.
    """
    scores = logits[:, : wanted.vocabulary].float()
    streams = len(wanted.weights)
    if streams > 1:
        by_stream = scores.log_softmax(-1).view(streams, -1, scores.shape[-1])
        scores = (by_stream * wanted.weights.view(-1, 1, 1)).sum(0)
    if len(wanted.suppressed):
        scores = scores.index_fill(1, wanted.suppressed, -torch.inf)
    if wanted.temperature not in (0, 1):  # a division by 1 would read and write a vocabulary a row
        scores = scores / wanted.temperature
    return scores


def _outside_stream(logits: Tensor, wanted: NextToken, stream: int) -> Tensor:
    """(N, V) bool: the tokens outside the nucleus of one stream's own distribution."""
    own = logits.view(len(wanted.weights), -1, logits.shape[-1])[stream]
    alone = replace(wanted, weights=torch.ones_like(wanted.weights[:1]))
    return outside_nucleus(scores_of(own, alone).log_softmax(-1), wanted.top_p)


def sample_tokens(logits: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token a row from softmax(logits) restricted to its nucleus.

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p`` (Holtzman et al.
    2020), so a token belongs to it when the tokens more probable than it hold less than ``top_p``. A draw
    from the whole distribution is therefore kept if that holds, and redrawn if not: exact, without
    sorting the vocabulary, 1 / top_p draws on average.

    Args:
        logits: (N, V) float32.
    Returns:
        (N,) token ids.
    Raises:
        NotFinite: a row has a NaN or +inf.
        ValueError: no token is in a nucleus of ``top_p`` <= 0.
    """
    check_top_p(top_p)
    probs = logits.softmax(-1)
    # Inverse CDF takes one uniform number a row; torch.multinomial draws an exponential for each of V.
    cdf = probs.cumsum(-1)
    check_finite(bool(cdf[:, -1].isfinite().all()))
    tokens = torch.empty(len(probs), dtype=torch.long, device=probs.device)
    open_rows = torch.arange(len(probs), device=probs.device)  # those that probs and cdf hold
    while len(open_rows):
        uniform = torch.rand(len(open_rows), 1, generator=generator, dtype=torch.float32, device=probs.device)
        total = cdf[:, -1:]
        # Below the total also where the product rounds to it: after it there may be tokens of mass 0.
        target = (uniform * total).minimum(total.nextafter(torch.zeros_like(total)))
        # right=True: the first token whose cumulative mass is above the target.
        draw = torch.searchsorted(cdf, target, right=True).clamp(max=probs.shape[1] - 1)
        tokens[open_rows] = draw.squeeze(1)
        mass = probs.gather(1, draw)
        # A GPU adds up in parts, whose rounding may have the sum rise at a token of mass 0.
        again = mass.squeeze(1) == 0
        if top_p < 1.0:
            again |= (probs * (probs > mass)).sum(-1) >= top_p
        outside = again.nonzero().squeeze(1)  # indices: as a mask a GPU is waited for at each use
        open_rows, probs, cdf = open_rows[outside], probs[outside], cdf[outside]
    return tokens


def log_probabilities(scores: Tensor, tokens: Tensor, top_p: float) -> Tensor:
    """log q of one token a row, where q is softmax(scores) restricted to its nucleus.

    log q(token) = score(token) - log(sum of exp(score) over the nucleus); the nucleus as in
    ``sample_tokens``, here by a sort.

    Args:
        scores: (N, V) of any float dtype, in which it is computed.
        tokens: (N,) ids in the nucleus.
    Returns:
        (N,) of that dtype, at most 0 up to rounding.
    """
    log_p = scores.log_softmax(-1)
    own = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if top_p >= 1.0:
        return own
    return own - log_p.masked_fill(outside_nucleus(log_p, top_p), -torch.inf).logsumexp(-1)


def outside_nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """(N, V) bool: the tokens outside the nucleus of these log-probabilities."""
    falling = log_p.sort(-1, descending=True).values
    # The token at which the mass reaches top_p is the last of the nucleus, with all that tie with it.
    last = (falling.exp().cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=log_p.shape[-1] - 1)
    return log_p < falling.gather(-1, last)


def model_log_p(logits: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """log p of one token a row, p = softmax(logits[:, :vocabulary]), whatever distribution drew it.

    By the loss's kernels, as ``perplexity.completion_nll`` has it: another read of the logits.

    Args:
        logits: (N, >= V), any float dtype.
        tokens: (N,) ids below V; on a GPU, which is not waited for, also -1, whose log p means nothing.
    Returns:
        (N,) float32.
    """
    out = quark_loss(
        logits,
        None,
        tokens.clamp(min=0),
        kl_coef=0.0,
        entropy_coef=0.0,
        normalizer=1.0,
        vocab_size=vocabulary,
    )
    return -out.nll.float()


def draw_on_gpu(
    logits: Tensor, wanted: NextToken, generator: torch.Generator, log_q: Tensor | None = None
) -> Tensor:
    """``draw_tokens`` with the Triton kernel, -1 for a row that is not finite."""
    from quark_fast.ops import token_kernel

    greedy = wanted.temperature == 0
    weights = wanted.weights if greedy else wanted.weights / wanted.temperature
    rows = len(logits) // len(weights)
    uniform = None
    if not greedy:
        draws = (rows, token_kernel.DRAWS)
        uniform = torch.rand(draws, generator=generator, dtype=torch.float32, device=logits.device)
    return token_kernel.sample_tokens(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        weights,
        wanted.suppressed,
        wanted.nucleus(),
        uniform,
        wanted.vocabulary,
        log_p=log_q,
    )


def _draw_by_kernel(
    logits: Tensor, wanted: NextToken, generator: torch.Generator, log_q: Tensor | None
) -> Tensor:
    """The same with the C++ kernel, which takes the uniform numbers in the order of ``sample_tokens``."""
    greedy = wanted.temperature == 0
    weights = wanted.weights if greedy else wanted.weights / wanted.temperature
    logits = logits[:, : wanted.vocabulary]
    tokens = torch.empty(len(logits) // len(weights), dtype=torch.long, device="cpu")
    open_rows = torch.arange(len(tokens), device="cpu")
    numbers: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    while len(open_rows):
        # (N, 1), as there: a generator may fill another shape in another order.
        uniform = None if greedy else torch.rand(len(open_rows), 1, generator=generator, **numbers)
        found = None if log_q is None else torch.empty(len(open_rows), **numbers)
        drawn, inside, finite = cpp.sample_tokens(
            logits, weights, wanted.suppressed, wanted.nucleus(), open_rows, uniform, found
        )
        check_finite(finite)
        tokens[open_rows] = drawn
        if log_q is not None and found is not None:
            log_q[open_rows] = found  # those outside the nucleus are drawn again
        open_rows = open_rows[~inside]
    return tokens
