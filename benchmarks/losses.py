"""The loss as others write it: what the benchmarks compare ours with, on the CPU and on the GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quark_fast.ops.eager import Kl

KL_COEF, ENTROPY_COEF = 0.05, 0.06


def authors(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
    """The operations of the authors' training step, each on a full-vocabulary tensor of its own."""
    nll = F.cross_entropy(z, labels, reduction="none")
    if kl == "policy_ref":
        divergence = F.kl_div(F.log_softmax(r, -1), F.softmax(z, -1), reduction="none").sum(-1)
    elif kl == "ref_policy":
        divergence = F.kl_div(F.log_softmax(z, -1), F.softmax(r, -1), reduction="none").sum(-1)
    else:
        divergence = (F.cross_entropy(r, labels, reduction="none") - nll).square() / 2
    probabilities = F.softmax(z, -1)
    entropy = torch.logsumexp(z, -1) - (probabilities * z).sum(-1)
    per_token = nll + KL_COEF * divergence - ENTROPY_COEF * entropy
    return (mask * per_token).sum() / mask.sum()


def lean(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
    """As few full-vocabulary tensors as eager PyTorch allows, in float32."""
    logp, logq = (
        F.log_softmax(z, -1, dtype=torch.float32),
        F.log_softmax(r, -1, dtype=torch.float32),
    )
    p = logp.exp()
    nll = -logp.gather(-1, labels[:, None]).squeeze(-1)
    if kl == "policy_ref":
        # kl_coef KL - entropy_coef H in one sum: both are expectations under p.
        terms = (p * ((KL_COEF + ENTROPY_COEF) * logp - KL_COEF * logq)).sum(-1)
    elif kl == "ref_policy":
        terms = (ENTROPY_COEF * p * logp + KL_COEF * logq.exp() * (logq - logp)).sum(-1)
    else:
        log_ratio = -nll - logq.gather(-1, labels[:, None]).squeeze(-1)
        terms = ENTROPY_COEF * (p * logp).sum(-1) + KL_COEF * log_ratio.square() / 2
    return (mask * (nll + terms)).sum() / mask.sum()


class _AsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        made = leaf.new_empty(0)
        return made.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def as_output(leaf: Tensor) -> Tensor:
    """The leaf's memory as the output of a model, without a copy: in place refuses a leaf and its views."""
    made: Tensor = _AsOutput.apply(leaf)  # type: ignore[no-untyped-call]
    return made
