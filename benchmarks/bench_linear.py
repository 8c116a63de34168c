"""Hidden states to the loss and back, on the CPU: whole logits / torch.compile / chunks, time beside memory.

    pytest benchmarks/bench_linear.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=1 pytest benchmarks/bench_linear.py --benchmark-only

Without QUARK_FAST_BENCH=full a small size runs, in seconds, to show that everything works. Each row is first
checked against float64. The clock covers the heads of policy and reference, the loss, and the gradients of
hidden states and weight. `peak_mib` in the extra info is the most that tensors take at once in one step
beyond what they took before it (torch's profiler), the two gradients included.
"""

import os
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from quark_fast import _C
from quark_fast.ops.linear import linear_quark_loss
from quark_fast.ops.loss import quark_loss

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
# (rows, hidden size, vocabulary): SmolLM2-135M, GPT-2.
SIZES = (
    [(320, 576, 49152), (640, 576, 49152), (2560, 576, 49152), (640, 768, 50257)]
    if FULL
    else [(64, 32, 4099)]
)
KL_COEF, ENTROPY_COEF = 0.05, 0.06

# (hidden, weight, ref_hidden, ref_weight, labels) -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor) -> Tensor:
    """As few full-vocabulary tensors as eager PyTorch allows, in float32."""
    logp = log_softmax(linear(hidden, weight), -1, dtype=torch.float32)
    logq = log_softmax(linear(ref_hidden, ref_weight), -1, dtype=torch.float32)
    nll = -logp.gather(-1, labels[:, None]).squeeze(-1)
    return (nll + (logp.exp() * ((KL_COEF + ENTROPY_COEF) * logp - KL_COEF * logq)).sum(-1)).mean()


compiled = torch.compile(eager, dynamic=False, fullgraph=True)


def whole(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor) -> Tensor:
    logits, ref_logits = linear(hidden, weight), linear(ref_hidden, ref_weight)
    return quark_loss(
        logits, ref_logits, labels, kl_coef=KL_COEF, entropy_coef=ENTROPY_COEF, impl="cpp", inplace=True
    ).loss


def chunked(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor) -> Tensor:
    return linear_quark_loss(
        hidden, weight, ref_hidden, ref_weight, labels, kl_coef=KL_COEF, entropy_coef=ENTROPY_COEF, impl="cpp"
    ).loss


LOSSES: dict[str, Loss] = {
    "eager": eager,
    "compile": compiled,
    "quark_loss": whole,
    "linear_quark_loss": chunked,
}


def step(loss: Loss, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (t.detach().requires_grad_() for t in tensors[:2])
    value = loss(hidden, weight, *tensors[2:])
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


def peak_mib(function: Callable[[], object]) -> float:
    """The most that tensors take at once while a function runs, above what they took before."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


@pytest.fixture(
    params=[(size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)], ids=str
)
def inputs(request: pytest.FixtureRequest) -> tuple[str, tuple[Tensor, ...]]:
    (rows, width, vocab), dtype = request.param
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g)
    weight = 2 * width**-0.5 * torch.randn(vocab, width, generator=g)
    ref_hidden = hidden + 0.25 * torch.randn(rows, width, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    name = f"N{rows}-D{width}-V{vocab}-{str(dtype).removeprefix('torch.')}"
    half = [t.to(dtype) for t in (hidden, weight, ref_hidden, weight.clone())]
    return name, (*half, labels)


@pytest.mark.parametrize("name", LOSSES)
def bench_hidden_to_loss(
    benchmark: BenchmarkFixture, inputs: tuple[str, tuple[Tensor, ...]], name: str
) -> None:
    size, tensors = inputs
    benchmark.group = size
    benchmark.extra_info.update(threads=torch.get_num_threads(), isa=_C.isa(), torch=torch.__version__)

    torch.compiler.reset()  # past its limit of recompilations, torch.compile falls back to eager
    few = 64  # in float64, all rows would take longer than the benchmark
    some = (tensors[0][:few], tensors[1], tensors[2][:few], tensors[3], tensors[4][:few])
    exact = step(eager, tuple(t.double() if t.is_floating_point() else t for t in some))
    ours = step(LOSSES[name], some)
    # Half precision rounds logits of size 10 by 2^-6, and the gradients once more.
    tolerance = 2**-5 if tensors[0].dtype == torch.bfloat16 else 1e-4
    for mine, other in zip(ours, exact, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()
    del ours, exact

    torch.compiler.reset()
    step(LOSSES[name], tensors)
    benchmark.extra_info["peak_mib"] = round(peak_mib(lambda: step(LOSSES[name], tensors)), 1)
    benchmark.pedantic(
        lambda: step(LOSSES[name], tensors), rounds=10 if FULL else 5, warmup_rounds=2 if FULL else 1
    )
