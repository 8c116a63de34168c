"""The contrast: what tells completions apart, learned directly.

Two comparisons of a completion y, each a classifier made of two language models (Bayes' rule with equal
priors) and its log loss, at a margin of m nats:

    -log sigma(delta / m) m,   delta = log p(y | x, r_k) - log p(y | x, r_{K-1-k})   with the mirror token
    -log sigma(s gain / m) m,  gain = log p(y | x, r) - log p_ref(y | x)             with the base model

In the first, r_k is the token that the completion was filed under and r_{K-1-k} its mirror token (best
against worst). In delta everything that the two conditionals share, which is nearly all of the LM loss and
its noise, cancels. At m = 1 the true conditionals of Quark's pool minimise both this and the LM loss; it is
the discriminative loss of GeDi (Krause et al. 2021, arXiv 2009.06367) without the length normalisation.

In the second, r is the better of these two tokens, and s = 1 for completions that were filed under it, -1 for
those of its mirror token: it raises the good ones above the base model's probability and lowers the bad ones
below it. At its minimum p(y | x, r) is proportional to p_ref(y | x) (p(good | y) / p(bad | y))^m: what guided
conditioning mixes while it samples, learned by one token. This is a DPO of unpaired completions (KTO,
Ethayarajh et al. 2024, arXiv 2402.01306; BCO, Jung et al. 2024, arXiv 2404.04656), m = 1 / beta there.

A larger margin asks for more: a completion weighs until its log-ratio is m nats and beyond, so that a few
tokens of noise settle nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quark_fast.ops.loss import NLL_ALONE, Implementation, quark_loss

softplus = torch.nn.functional.softplus


class ContrastWeights(NamedTuple):
    """Weights of the two comparisons, per nat and sample, and the margin of both, nats."""

    mirror: float | Tensor
    base: float | Tensor = 0.0
    margin: float = 1.0

    def total(self, values: Contrast) -> Tensor:
        """What the comparisons of these samples add to the loss, before it is divided by their number."""
        return self.margin * (self.mirror * values.mirror.sum() + self.base * values.base.sum())


class Contrast(NamedTuple):
    """The comparisons of each sample, -log sigma(...), detached; log 2 is chance, 0 one that is not made."""

    mirror: Tensor
    base: Tensor


def compare(
    own: Tensor, mirror: Tensor, reference: Tensor | None, better: Tensor | None, weights: ContrastWeights
) -> tuple[Contrast, Tensor, Tensor]:
    """Both comparisons, and how they weigh the NLL of the two rows.

    d(-log sigma(delta / m) m) = -sigma(-delta / m) (d log p_own - d log p_mirror): an NLL gradient in which
    the tokens of the own row weigh sigma(-delta / m) and those of the mirror row minus that. So the fused
    loss does the work.

    Args:
        own, mirror, reference: (N,) -log p of the completions, nats; the reference's for the second alone.
        better: (N,) 1 where the own token is the better one, -1 where its mirror is, 0 where it is neither.
    Returns:
        (the comparisons; (N,) weights of the own rows' NLL; of the mirror rows').
    """
    delta = (mirror - own) / weights.margin
    on_own = weights.mirror * _sigmoid(-delta)
    on_mirror = -on_own
    value, base = softplus(-delta), torch.zeros_like(delta)
    if reference is not None and better is not None:
        better = better.to(delta.dtype)
        gain = better * (reference - torch.where(better > 0, own, mirror)) / weights.margin
        base = softplus(-gain) * better.abs()
        weight = weights.base * better * _sigmoid(-gain)
        on_own = on_own + weight * (better > 0)
        on_mirror = on_mirror + weight * (better < 0)
    return Contrast(value, base), on_own, on_mirror


def _sigmoid(x: Tensor) -> Tensor:
    # Logits that are not finite make the values so, which the trainer sees; a NaN weight would be refused.
    return torch.sigmoid(x).nan_to_num(nan=1.0)


def contrast_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    mask: Tensor,
    better: Tensor | None,
    *,
    weights: ContrastWeights,
    vocab_size: int,
    samples: float,
    impl: Implementation = "auto",
) -> tuple[Contrast, Tensor]:
    """The comparisons of each sample, and a scalar with the gradient of m x their weighted sum / ``samples``.

    Only the gradient of that scalar means anything, not its value.

    Args:
        logits: (2, N, T, >= V), the own rows first, then the same completions under the mirror token.
        ref_logits: (N, T, >= V) of the reference; None without the comparison with it.
        labels, mask: (N, T) as for ``quark_loss``.
        better: as for ``compare``; None without the comparison with the base model.
        vocab_size: V.
        samples: number of samples in the whole batch, of which N may be a part; or what else to divide by.
    Returns:
        (the comparisons in float32, but for float64 logits; scalar to call backward on).
    """
    both_labels, both_mask = (t.expand(2, *t.shape) for t in (labels, mask))
    options: dict[str, Any] = {**NLL_ALONE, "vocab_size": vocab_size, "impl": impl}
    reference = None
    with torch.no_grad():
        own, mirror = quark_loss(logits, None, both_labels, both_mask, **options).nll.sum(-1)
        if ref_logits is not None and better is not None:
            reference = quark_loss(ref_logits, None, labels, mask, **options).nll.sum(-1)
    values, *weight = compare(own, mirror, reference, better, weights)
    token_weights = torch.stack(weight).unsqueeze(-1) * mask
    surrogate = quark_loss(logits, None, both_labels, token_weights, normalizer=float(samples), **options)
    return values, surrogate.loss
