"""The sequence-level unlikelihood term: what a completion says twice should have been less likely.

Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020 (arXiv 1908.04319), equations
7 and 8: over the model's own completions,

    1 / T  sum_t  c_t * -log(1 - p(y_t | y_<t, x)),

where c_t is 1 for a token of an n-gram that the completion held before, else 0, and T counts all tokens.
The paper's equation looks for the earlier n-gram in all that came before; its code, like this one, in the
completion alone, which is also where rep-n is measured: a name of the prompt may be said again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quark_fast.ops.loss import QuarkLoss

# The smallest nll that counts. float32 holds lse - logit to about 2e-6, and the weight below amplifies its
# error by 1 / nll; a token surer than this gets a gradient that shrinks with 1 - p instead of one of noise.
SUREST = 2.0**-16


def repeated_ngrams(completion: Sequence[int], n: int) -> list[bool]:
    """Whether each token belongs to an n-gram that stands in the completion a second time or more.

    All n tokens of the later occurrence count, also where it overlaps the earlier one.
    """
    if n < 1:
        raise ValueError(f"n = {n}: an n-gram has at least 1 token")
    repeated = [False] * len(completion)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(completion) - n + 1):
        gram = tuple(completion[start : start + n])
        if gram in seen:
            repeated[start : start + n] = [True] * n
        seen.add(gram)
    return repeated


def unlikelihood_loss(weighted_nll: Callable[[Tensor], QuarkLoss], repeated: Tensor) -> tuple[Tensor, Tensor]:
    """-log(1 - p) of the repeated tokens, and a scalar whose gradient is that of their normalised sum.

    d(-log(1 - p)) = p / (1 - p) d log p: an NLL gradient in which a token weighs -p / (1 - p), which is
    -1 / expm1(nll). So the fused loss does the work, and only the gradient of the returned scalar means
    anything, not its value. That gradient is bounded, as d log p has a factor 1 - p; nll is kept at 2^-16 or
    above, for rounding's sake.

    Args:
        weighted_nll: weights -> ``quark_loss`` of the tokens in question with them for a mask, no KL, no
            entropy, and a ``normalizer``; from logits or from hidden states.
        repeated: (...) bool, shaped as these weights.
    Returns:
        ((...) detached values in nats, 0 where not repeated; scalar to call backward on).
    """
    with torch.no_grad():
        nll = weighted_nll(repeated).nll.clamp(min=SUREST)
        value = torch.where(repeated, -torch.log(-torch.expm1(-nll)), 0)
        # As in contrast.py: what is not finite shows in the values, and is no faulty mask.
        weights = torch.where(repeated, -1 / torch.expm1(nll), 0).nan_to_num(nan=-1.0)
    return value, weighted_nll(weights).loss
