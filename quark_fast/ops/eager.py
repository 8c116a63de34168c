"""The Quark loss in plain PyTorch: the equation, with its gradient by autograd.

Every kernel is judged by this file, so it knows none of their tricks. It runs for float64, on devices
without a kernel, and where ``impl="eager"`` asks for it.
"""

from typing import Literal

import torch
from torch import Tensor

Kl = Literal["policy_ref", "ref_policy", "sampled"]


def expectation(prob: Tensor, value: Tensor) -> Tensor:
    """sum_v prob_v value_v over the last dimension, where 0 times anything is 0."""
    # Not > 0, which a NaN is not, either: its gradient would be a finite one.
    return (prob * torch.where(prob != 0, value, 0)).sum(-1)


def quark_loss(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    kl_coef: float,
    entropy_coef: float,
    kl: Kl,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum_n w_n (nll_n + kl_coef KL_n - entropy_coef H_n), and nll, KL, H of every token.

    Computed in float64 for float64 logits, else in float32. Tokens of weight 0 are replaced before
    anything is computed, so that a NaN there reaches neither value nor gradient.

    Args:
        logits: (..., >= vocab_size) policy logits.
        ref_logits: (..., >= vocab_size) reference logits, or None for no KL.
        labels: (...) int64.
        weights: (...) w_n.
    Returns:
        The scalar loss, and nll, KL, H in nats, shaped like labels, 0 where the weight is 0.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    live = weights != 0
    live_row = live.unsqueeze(-1)

    z = torch.where(live_row, logits[..., :vocab_size].to(dtype), 0)
    label = torch.where(live, labels, 0).unsqueeze(-1)
    logp = z.log_softmax(-1)
    p = logp.exp()

    nll = -logp.gather(-1, label).squeeze(-1)
    entropy = -expectation(p, logp)
    if ref_logits is None:
        divergence = torch.zeros_like(nll)
    else:
        r = torch.where(live_row, ref_logits[..., :vocab_size].to(dtype), 0)
        logq = r.log_softmax(-1)
        if kl == "policy_ref":
            divergence = expectation(p, logp - logq)
        elif kl == "ref_policy":
            divergence = expectation(logq.exp(), logq - logp)
        else:
            log_ratio = -nll - logq.gather(-1, label).squeeze(-1)
            divergence = log_ratio.square() / 2

    nll, divergence, entropy = (torch.where(live, value, 0) for value in (nll, divergence, entropy))
    per_token = nll - entropy_coef * entropy
    if kl_coef != 0:  # 0 times an infinite KL would be NaN
        per_token = per_token + kl_coef * divergence
    # Rows of weight 0 hold 0 here, so that their product is 0 and not NaN.
    return (weights.to(dtype) * per_token).sum(), nll, divergence, entropy
