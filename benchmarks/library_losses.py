"""The loss by libraries that people would use instead: which of its terms each has, and where it runs.

    nll + KL_COEF KL - ENTROPY_COEF H

Few libraries have all three; a row without one does less work, and every table says so. Before a library is
timed, `check` compares its loss and its gradients with eager PyTorch in float64, of the terms that it claims.

As of quack-kernels 0.6, liger-kernel 0.8, trl 1.16 and torch 2.13. All take the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from losses import ENTROPY_COEF, KL_COEF
from torch import Tensor
from torch.nn.functional import log_softmax

from quark_fast.ops import eager
from quark_fast.ops.eager import Kl

TERMS = ("nll", "KL", "H")
# (logits, ref_logits, labels, kl), or (hidden, weight, ref_hidden, ref_weight, labels, kl) -> loss
Loss = Callable[..., Tensor]


class Library(NamedTuple):
    """A loss of a library.

    Attributes:
        install: what pip calls it.
        load: imports it and returns its loss; ImportError where it, or its version, does not have that.
        terms: of TERMS, those that the loss has.
        needs: "any" device, a kernel in "Triton" (or its interpreter), or "cuda".
    """

    install: str
    load: Callable[[], Loss]
    terms: Sequence[str]
    needs: str = "any"

    @property
    def lacks(self) -> list[str]:
        return [term for term in TERMS if term not in self.terms]


def of_terms(nll: Tensor, divergence: Tensor, entropy: Tensor, terms: Sequence[str]) -> Tensor:
    """The terms added up, each with its coefficient; whatever is not in `terms` is left out."""
    parts = {"nll": nll, "KL": KL_COEF * divergence, "H": -ENTROPY_COEF * entropy}
    return torch.stack([parts[term] for term in terms]).sum(0)


def _divergence_end(kl: Kl) -> float:
    """The end of the generalised Jensen-Shannon divergence that is kl: 1 is KL(policy || reference)."""
    return {"policy_ref": 1.0, "ref_policy": 0.0}[kl]


# --- From logits -------------------------------------------------------------------------------


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda z, r, labels, kl: cross_entropy(z, labels)


def _liger_nll() -> Loss:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # It writes its gradient over the logits, so it gets a view, which no leaf is.
    return lambda z, r, labels, kl: LigerCrossEntropyFunction.apply(z.view_as(z), labels, None)[0]


def _liger_divergence() -> Loss:
    from liger_kernel.ops.jsd import LigerJSDFunction

    def loss(z: Tensor, r: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        logp, logq = (log_softmax(x, -1, dtype=torch.float32) for x in (z, r))
        return KL_COEF * LigerJSDFunction.apply(logp, logq, None, _divergence_end(kl))

    return loss


def _liger() -> Loss:
    nll, divergence = _liger_nll(), _liger_divergence()

    def loss(z: Tensor, r: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        held = divergence(z, r, labels, kl)
        logp = log_softmax(z, -1, dtype=torch.float32)  # it has no entropy of logits
        entropy = -(logp.exp() * logp).sum(-1).mean()
        # Last, since it overwrites the logits.
        return nll(z, r, labels, kl) + held - ENTROPY_COEF * entropy

    return loss


FROM_LOGITS = {
    "quack": Library("quack-kernels", _quack, ["nll"], "cuda"),
    "liger-nll": Library("liger-kernel", _liger_nll, ["nll"], "Triton"),
    "liger-jsd": Library("liger-kernel", _liger_divergence, ["KL"], "Triton"),
    "liger": Library("liger-kernel", _liger, TERMS, "Triton"),
}


# --- From hidden states ------------------------------------------------------------------------


def _torch_linear() -> Loss:
    try:  # since torch 2.13
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy; 2.13 has") from error

    def loss(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        return linear_cross_entropy(h, w, labels, options=LinearCrossEntropyOptions())

    return loss


def _quack_linear() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, ref_h, ref_w, labels, kl: chunked_linear_cross_entropy(h, w, labels)


def _liger_linear_nll() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda h, w, ref_h, ref_w, labels, kl: LigerFusedLinearCrossEntropyFunction.apply(h, w, labels)[0]


def _liger_linear_entropy() -> Loss:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def loss(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, labels, return_entropy=True)
        return nll.mean() - ENTROPY_COEF * entropy.mean()

    return loss


def _liger_linear_divergence() -> Loss:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    def loss(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        return KL_COEF * LigerFusedLinearJSDFunction.apply(h, w, ref_h, ref_w, None, _divergence_end(kl))

    return loss


def _trl_logprobs() -> Loss:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        # 8192 columns at a time is what TRL's trainers take.
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
            h, w, None, labels, 1.0, 8192, None, 1.0, ("entropy",)
        )
        return -logprobs.mean() - ENTROPY_COEF * entropy.mean()

    return loss


def _trl_divergence() -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor, labels: Tensor, kl: Kl) -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(h, w, None, ref_h, ref_w, None, _divergence_end(kl))
        return KL_COEF * divergence.mean()

    return loss


def _both(first: Callable[[], Loss], second: Callable[[], Loss]) -> Callable[[], Loss]:
    """All terms from two losses of a library, which goes through the policy's head once for each."""

    def load() -> Loss:
        one, other = first(), second()
        return lambda *tensors: one(*tensors) + other(*tensors)

    return load


FROM_HIDDEN = {
    "torch-linear": Library("torch>=2.13", _torch_linear, ["nll"]),
    "quack-linear": Library("quack-kernels", _quack_linear, ["nll"], "cuda"),
    "liger-linear-nll": Library("liger-kernel", _liger_linear_nll, ["nll"], "Triton"),
    "liger-linear-nll-H": Library("liger-kernel", _liger_linear_entropy, ["nll", "H"]),
    "liger-linear-jsd": Library("liger-kernel", _liger_linear_divergence, ["KL"], "Triton"),
    "liger-linear": Library(
        "liger-kernel", _both(_liger_linear_entropy, _liger_linear_divergence), TERMS, "Triton"
    ),
    "trl-nll-H": Library("trl>=1.16", _trl_logprobs, ["nll", "H"]),
    "trl-divergence": Library("trl>=1.16", _trl_divergence, ["KL"]),
    "trl": Library("trl>=1.16", _both(_trl_logprobs, _trl_divergence), TERMS),
}


# --- Is it here, and is it right? --------------------------------------------------------------

# (name, device, interpreted, kl) -> what check has found: a library is compared once in a process.
_found: dict[tuple[str, str, bool, Kl], str | None] = {}


def check(name: str, device: str, kl: Kl, *, interpreted: bool = False) -> str | None:
    """Why a library's row must be left out here, or None: it is here, it runs, and its terms are right."""
    key = (name, device, interpreted, kl)
    if key not in _found:
        library = {**FROM_LOGITS, **FROM_HIDDEN}[name]
        _found[key] = _not_here(library, device, interpreted) or _wrong(name, library, device, kl)
    return _found[key]


def _not_here(library: Library, device: str, interpreted: bool) -> str | None:
    if library.needs == "cuda" and device != "cuda":
        return "it runs on a GPU alone"
    if library.needs == "Triton" and device != "cuda" and not interpreted:
        return "its Triton kernels run on a GPU alone"
    try:
        library.load()
    except ImportError as error:
        return f"pip install '{library.install}' ({error})"
    return None


def _wrong(name: str, library: Library, device: str, kl: Kl) -> str | None:
    """On a small problem, in bfloat16 where a library refuses float32."""
    loss, refused = library.load(), ""
    for dtype in (torch.float32, torch.bfloat16):
        leaves, rest = _small_problem(name, dtype, device)
        try:
            value = loss(*_arranged(leaves, rest), kl)
            grads = torch.autograd.grad(value, leaves)
        except Exception as error:  # a library's own, of any kind: this row says why, the others go on
            refused = f"{type(error).__name__}: {str(error).strip()[:200]}"
            continue
        expected, expected_grads = exact(leaves, rest, library.terms, kl)
        pairs = [(value, expected), *zip(grads, expected_grads, strict=True)]
        # A term left out, or the other direction of the KL, moves a gradient by more than that.
        allowed = 1e-4 if dtype == torch.float32 else 2**-6
        errors = [distance(one, other) for one, other in pairs]
        if max(errors) > allowed:
            return f"not {' + '.join(library.terms)}: {max(errors):.1%} away from eager in float64"
        return None
    return refused


def distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, relative to the other's."""
    return float((one.double() - other).norm() / other.norm())


def _small_problem(name: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that get a gradient (logits; or hidden states and weight), and the rest, the labels last."""
    rows, width, vocab = 16, 64, 256
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    labels = torch.randint(0, vocab, (rows,), generator=g).to(device)
    if name in FROM_LOGITS:
        z = 2 * normal(rows, vocab)
        policy, reference = [z], [z + 2 * normal(rows, vocab)]
    else:
        hidden, weight = normal(rows, width), 2 * width**-0.5 * normal(vocab, width)
        policy, reference = [hidden, weight], [hidden + normal(rows, width), weight]
    leaves = [x.to(device, dtype).requires_grad_() for x in policy]
    return leaves, [*(x.to(device, dtype) for x in reference), labels]


def _arranged(leaves: Sequence[Tensor], rest: Sequence[Tensor]) -> list[Tensor]:
    # A library that writes over what it is given must not spoil what it is compared on.
    return [*leaves[:-1], leaves[-1] * 1, *rest] if len(leaves) == 1 else [*leaves, *rest]


def exact(
    leaves: Sequence[Tensor], rest: Sequence[Tensor], terms: Sequence[str], kl: Kl
) -> tuple[Tensor, list[Tensor]]:
    """The mean over rows of some terms, and the gradients of leaves, by eager PyTorch in float64."""
    *reference, labels = (x.double() if x.is_floating_point() else x for x in rest)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    z, r = wide[0], reference[0]
    if len(wide) == 2:
        z, r = wide[0] @ wide[1].t(), reference[0] @ reference[1].t()
    weights = torch.full_like(z[:, 0], 1 / len(labels)).detach()
    problem = (z, r, labels.long(), weights, r.shape[-1], KL_COEF, ENTROPY_COEF, kl)
    value = (weights * of_terms(*eager.quark_loss(*problem)[1:], terms)).sum()
    return value.detach(), list(torch.autograd.grad(value, wide))
