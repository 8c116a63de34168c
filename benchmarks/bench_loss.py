"""The loss, forward and backward, on the CPU: eager / torch.compile / ours, one table a size.

    pytest benchmarks/bench_loss.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=1 pytest benchmarks/bench_loss.py --benchmark-only

Without QUARK_FAST_BENCH=full a small size runs, in seconds, to show that everything works. Each
row is first checked against the others' answer. The clock covers the loss and the gradient of the
logits, from logits that exist. Page faults decide the time of whatever makes tensors of 100 MB;
with MALLOC_TOP_PAD_, MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 4294967296 in the
environment the process keeps its freed memory. Publish both settings.
"""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from quark_fast import _C
from quark_fast.ops.eager import Kl
from quark_fast.ops.loss import quark_loss

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
SIZES = [(320, 50257), (640, 50257), (320, 49152)] if FULL else [(64, 32768)]
KL_COEF, ENTROPY_COEF = 0.05, 0.06

# (logits, ref_logits, labels, mask, kl) -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Kl], Tensor]


def authors(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
    """The operations of the authors' training step, each on a full-vocabulary tensor of its own."""
    nll = F.cross_entropy(z, labels, reduction="none")
    if kl == "policy_ref":
        divergence = F.kl_div(F.log_softmax(r, -1), F.softmax(z, -1), reduction="none").sum(-1)
    else:
        divergence = F.kl_div(F.log_softmax(z, -1), F.softmax(r, -1), reduction="none").sum(-1)
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
    else:
        terms = (ENTROPY_COEF * p * logp + KL_COEF * logq.exp() * (logq - logp)).sum(-1)
    return (mask * (nll + terms)).sum() / mask.sum()


compiled = torch.compile(lean, dynamic=False, fullgraph=True)


def ours(inplace: bool) -> Loss:
    def loss(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
        if inplace:
            z = z.view_as(z)  # in place refuses a leaf; a view is no copy
        return quark_loss(
            z,
            r,
            labels,
            mask,
            kl_coef=KL_COEF,
            entropy_coef=ENTROPY_COEF,
            kl=kl,
            impl="cpp",
            inplace=inplace,
        ).loss

    return loss


LOSSES: dict[str, Loss] = {
    "eager-authors": authors,
    "eager-lean": lean,
    "compile": compiled,
    "ours-fresh": ours(inplace=False),
    "ours-inplace": ours(inplace=True),
}


def forward_backward(loss: Loss, z: Tensor, *rest: Tensor, kl: Kl) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of z; z itself is used up by ours-inplace."""
    leaf = z.detach().requires_grad_()
    value = loss(leaf, *rest, kl=kl)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.fixture(
    params=[(size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)],
    ids=lambda p: f"N{p[0][0]}-V{p[0][1]}-{str(p[1]).removeprefix('torch.')}",
)
def inputs(request: pytest.FixtureRequest) -> tuple[str, tuple[Tensor, ...]]:
    (rows, vocab), dtype = request.param
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(rows, vocab, generator=g)
    r = z + 0.5 * torch.randn(rows, vocab, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    name = f"N{rows}-V{vocab}-{str(dtype).removeprefix('torch.')}"
    return name, (z.to(dtype), r.to(dtype), labels, torch.ones(rows))


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("name", LOSSES)
def bench_forward_backward(
    benchmark: BenchmarkFixture,
    inputs: tuple[str, tuple[Tensor, ...]],
    name: str,
    kl: Kl,
) -> None:
    size, tensors = inputs
    benchmark.group = f"{size}-{kl}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), isa=_C.isa(), torch=torch.__version__)

    torch.compiler.reset()  # past its limit of recompilations, torch.compile falls back to eager
    exact, exact_grad = forward_backward(lean, *(t.clone() for t in tensors), kl=kl)
    value, grad = forward_backward(LOSSES[name], *(t.clone() for t in tensors), kl=kl)
    # Half a unit of the last place of bfloat16, on numbers whose size the mean over rows sets.
    half = tensors[0].dtype == torch.bfloat16
    tolerance = (2**-6 if name == "eager-authors" else 2**-8) if half else 1e-5
    torch.testing.assert_close(value.float(), exact.float(), rtol=tolerance, atol=0)
    assert (grad - exact_grad).abs().max() <= tolerance * exact_grad.abs().max()
    del value, grad, exact_grad

    z, *rest = tensors
    work = z.clone()

    def restore() -> None:
        work.copy_(z)

    def step() -> None:
        forward_backward(LOSSES[name], work, *rest, kl=kl)

    benchmark.pedantic(step, setup=restore, rounds=10 if FULL else 5, warmup_rounds=2)
