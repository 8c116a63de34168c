"""Hidden states to the loss and back, on the CPU: whole logits / torch.compile / chunks, time beside memory.

    pytest benchmarks/bench_linear.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=1 pytest benchmarks/bench_linear.py --benchmark-only \\
        --results benchmarks/results/linear-1-thread.json

Without QUARK_FAST_BENCH=full a small size runs, in seconds, to show that everything works. Each row is first
checked against float64. The clock covers the heads of policy and reference, the loss, and the gradients of
hidden states and weight. `autocast` is float32 weights under bfloat16 autocast, as the trainer has them.
Before every round the clock also runs over the roof: the four matrix products that no program can spare.
`extra_mb` is the most memory that a step holds beyond hidden states and weights, the two gradients included.

Then the same by libraries (benchmarks/library_losses.py), as far as they run on a CPU; one that is not
installed is skipped and says what to install. A row without KL, NLL or entropy does less work: `lacks` says
which, and its roof without a reference is three products. Under autocast each of them computes in something
else, so they are compared in float32 and bfloat16.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import peak_memory
from library_losses import FROM_HIDDEN, TERMS, check, distance, exact
from losses import ENTROPY_COEF, KL_COEF
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from quark_fast.ops.linear import linear_quark_loss
from quark_fast.ops.loss import quark_loss

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
DTYPES = ("float32", "autocast", "bfloat16")
# (rows, hidden size, vocabulary), dtype: SmolLM2-135M's head, and GPT-2's.
CASES = [((rows, 576, 49152), dtype) for rows in (320, 640) for dtype in DTYPES]
CASES += [((1280, 576, 49152), "autocast"), ((640, 768, 50257), "autocast")]
if not FULL:
    CASES = [((64, 32, 4099), dtype) for dtype in DTYPES]

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


@pytest.fixture(
    params=CASES,
    ids=lambda param: f"N{param[0][0]}-D{param[0][1]}-V{param[0][2]}-{param[1]}",
)
def inputs(request: pytest.FixtureRequest) -> tuple[str, tuple[Tensor, ...]]:
    (rows, width, vocab), dtype = request.param
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g)
    weight = 2 * width**-0.5 * torch.randn(vocab, width, generator=g)
    ref_hidden = hidden + 0.25 * torch.randn(rows, width, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    half = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    # The reference's weight is in the dtype of the products, also under autocast.
    ref = torch.float32 if dtype == "float32" else torch.bfloat16
    name = f"N{rows}-D{width}-V{vocab}-{dtype}"
    return name, (hidden.to(half), weight.to(half), ref_hidden.to(ref), weight.to(ref).clone(), labels)


def loss_and_terms(name: str, size: str) -> tuple[Loss, Sequence[str]]:
    """The loss of a row, and its terms. Skips a library that is not here."""
    if name in LOSSES:
        return LOSSES[name], TERMS
    if size.endswith("autocast"):
        pytest.skip("libraries are compared in float32 and bfloat16")
    with warnings.catch_warnings(action="ignore"):  # at their import
        missing = check(name, "cpu", "policy_ref")
    if missing is not None:
        pytest.skip(f"{name}: {missing}")
    library = FROM_HIDDEN[name]
    of_library = library.load()
    return lambda *tensors: of_library(*tensors, "policy_ref"), library.terms


def products(tensors: tuple[Tensor, ...], reference: bool) -> Callable[[], None]:
    """The matrix products that no program can spare; without a reference three."""
    hidden, weight, ref_hidden, ref_weight, _ = (
        t.to(tensors[3].dtype) if t.is_floating_point() else t for t in tensors
    )
    grad = hidden.new_empty(len(hidden), len(weight)).normal_()

    def run() -> None:
        hidden @ weight.t()
        if reference:
            ref_hidden @ ref_weight.t()
        grad @ weight
        grad.t() @ hidden

    return run


@pytest.mark.parametrize("name", [*LOSSES, *FROM_HIDDEN])
def bench_hidden_to_loss(
    benchmark: BenchmarkFixture, inputs: tuple[str, tuple[Tensor, ...]], name: str
) -> None:
    size, tensors = inputs
    loss, terms = loss_and_terms(name, size)
    benchmark.group = size
    benchmark.extra_info |= {"row": name, "lacks": [term for term in TERMS if term not in terms]}

    def run(of: tuple[Tensor, ...] = tensors) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=size.endswith("autocast")):
            return step(loss, of)

    torch.compiler.reset()  # past its limit of recompilations, torch.compile falls back to eager
    few = 64  # in float64, all rows would take longer than the benchmark
    some = (tensors[0][:few], tensors[1], tensors[2][:few], tensors[3], tensors[4][:few])
    expected, gradients = exact(some[:2], some[2:], terms, "policy_ref")
    # Half precision rounds logits of size 10 by 2^-6, and the gradients once more.
    tolerance = 1e-4 if size.endswith("float32") else 2**-5
    for mine, other in zip(run(some), (expected, *gradients), strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()
        assert distance(mine, other) <= tolerance
    del expected, gradients, mine, other

    roof: list[float] = []
    multiply = products(tensors, reference="KL" in terms)

    def setup() -> None:
        begun = time.perf_counter()
        multiply()
        roof.append(time.perf_counter() - begun)

    torch.compiler.reset()
    benchmark.extra_info["extra_mb"] = round(peak_memory(run) / 1e6, 1)
    benchmark.pedantic(run, setup=setup, rounds=5 if FULL else 3, warmup_rounds=2 if FULL else 1)
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = statistics.median(roof)
        benchmark.extra_info["roof_ms"] = round(median * 1e3, 4)
        benchmark.extra_info["to_roof"] = round(benchmark.stats.stats.median / median, 3)
