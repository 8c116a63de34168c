"""The contrast term: a completion should name the reward token it was filed under.

With equal priors for a sample's own token r_k and the mirror token r_{K-1-k} (best against worst), Bayes'
rule makes the two conditional models a classifier of completions y:

    p(r_k | y, x) = sigma(delta),   delta = log p(y | x, r_k) - log p(y | x, r_{K-1-k})

and the term is its log loss, -log sigma(delta). The true conditionals of Quark's pool minimise both this and
the ordinary LM loss, so it aims where Quark aims; but in delta everything that the two conditionals share,
which is nearly all of the LM loss and its noise, cancels. It is the discriminative loss of GeDi (Krause et
al. 2021, arXiv 2009.06367) without the length normalisation.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quark_fast.ops.loss import Implementation, quark_loss


def contrast_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    samples: float,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """-log sigma(delta) of each sample, and a scalar whose gradient is that of their sum / ``samples``.

    d(-log sigma(delta)) = -(1 - sigma(delta)) (d log p_own - d log p_mirror): an ordinary NLL gradient in
    which the tokens of the own row weigh 1 - sigma(delta) and those of the mirror row minus that. So the
    fused loss does the work, and only the gradient of the returned scalar means anything, not its value.

    Args:
        logits: (2, N, T, >= V), the own rows first, then the same completions under the mirror token.
        labels, mask: (N, T) as for ``quark_loss``.
        vocab_size: V.
        samples: number of samples in the whole batch, of which N may be a part; or what else to divide by.
    Returns:
        ((N,) detached values in nats, float32 but for float64 logits; scalar to call backward on).
    """
    both_labels, both_mask = (t.expand(2, *t.shape) for t in (labels, mask))
    nll_alone = partial(
        quark_loss, logits, None, both_labels, kl_coef=0.0, entropy_coef=0.0, vocab_size=vocab_size, impl=impl
    )
    with torch.no_grad():
        own, mirror = nll_alone(both_mask).nll.sum(-1)
    delta = mirror - own
    # Logits that are not finite make the values so, which the trainer sees; a NaN weight would be refused.
    weight = torch.sigmoid(-delta).nan_to_num(nan=1.0).unsqueeze(-1) * mask
    surrogate = nll_alone(torch.stack([weight, -weight]), normalizer=float(samples)).loss
    return torch.nn.functional.softplus(-delta), surrogate
