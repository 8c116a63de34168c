"""The loss, forward and backward, on the CPU: the authors' eager / lean eager / torch.compile / ours.

    pytest benchmarks/bench_loss.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=1 pytest benchmarks/bench_loss.py --benchmark-only \\
        --results benchmarks/results/loss-1-thread.json

Without QUARK_FAST_BENCH=full a small size runs, in seconds, to show that everything works. The clock covers
the loss and the gradient of the logits, from logits that exist; each row's answer is checked first. Before
every round the clock also runs over the roof: one plain pass g = z + r over three tensors of that size and
dtype. Rows that ran minutes apart on a noisy machine are compared by their multiples of it, `to_roof`.
`extra_mb` is the most memory that a row holds beyond logits and reference, its gradient included.

Page faults decide the time of whatever makes tensors of 100 MB. With MALLOC_TOP_PAD_,
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 4294967296 in the environment the process keeps its
freed memory. Publish both settings. Liger's kernels run on GPUs alone: benchmarks/gpu.py has them.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch
from conftest import peak_memory
from losses import ENTROPY_COEF, KL_COEF, as_output, authors, lean
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from quark_fast.ops.eager import Kl
from quark_fast.ops.loss import quark_loss

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
# (rows, vocabulary): GPT-2's and SmolLM2's, then those of Llama 3 and Qwen 2.5.
SIZES = [*[(rows, 50257) for rows in (320, 640)], *[(320, vocab) for vocab in (49152, 128256, 151936)]]
CASES = [(size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]
CASES.append(((320, 50257), torch.float16))
# 2560 rows are for benchmarks/gpu.py: the eager rows do not fit into the 24 GB of a small machine.
if not FULL:
    CASES = [((64, 32768), dtype) for dtype in (torch.float32, torch.bfloat16)]

# (logits, ref_logits, labels, mask, kl) -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Kl], Tensor]


compiled = torch.compile(lean, dynamic=False, fullgraph=True)


def ours(inplace: bool) -> Loss:
    def loss(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
        if inplace:
            z = as_output(z)
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


def case_name(case: tuple[tuple[int, int], torch.dtype]) -> str:
    (rows, vocab), dtype = case
    return f"N{rows}-V{vocab}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module", params=CASES, ids=case_name)
def inputs(request: pytest.FixtureRequest) -> tuple[str, tuple[Tensor, ...]]:
    (rows, vocab), dtype = request.param
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(rows, vocab, generator=g)
    r = z + 0.5 * torch.randn(rows, vocab, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    return case_name(request.param), (z.to(dtype), r.to(dtype), labels, torch.ones(rows))


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("name", LOSSES)
def bench_forward_backward(
    benchmark: BenchmarkFixture, inputs: tuple[str, tuple[Tensor, ...]], name: str, kl: Kl
) -> None:
    size, tensors = inputs
    benchmark.group = f"{size}-{kl}"
    benchmark.extra_info["row"] = name
    loss = LOSSES[name]
    z, *rest = tensors
    work = z.clone()

    if name == "eager-authors" and z.dtype == torch.float16:
        pytest.skip("the authors' formulation gives NaN in float16")

    torch.compiler.reset()  # past its limit of recompilations, torch.compile falls back to eager
    exact, exact_grad = forward_backward(lean, z, *rest, kl=kl)
    value, grad = forward_backward(loss, work, *rest, kl=kl)
    # Half a unit of the last place of the dtype, on numbers whose size the mean over rows sets.
    half = z.dtype != torch.float32
    tolerance = (2**-6 if name == "eager-authors" else 2**-8) if half else 1e-5
    torch.testing.assert_close(value.float(), exact.float(), rtol=tolerance, atol=0)
    assert (grad - exact_grad).abs().max() <= tolerance * exact_grad.abs().max()
    del value, grad, exact_grad

    roof: list[float] = []
    total = torch.zeros_like(z)

    def setup() -> None:
        begun = time.perf_counter()
        torch.add(z, rest[0], out=total)
        roof.append(time.perf_counter() - begun)
        work.copy_(z)

    def step() -> None:
        forward_backward(loss, work, *rest, kl=kl)

    benchmark.extra_info["extra_mb"] = round(peak_memory(step) / 1e6, 1)
    benchmark.pedantic(step, setup=setup, rounds=8 if FULL else 5, warmup_rounds=2)
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = statistics.median(roof)
        benchmark.extra_info["roof_ms"] = round(median * 1e3, 4)
        benchmark.extra_info["to_roof"] = round(benchmark.stats.stats.median / median, 3)


def smoke_bound() -> None:
    """Exit with an error if ours in place is not twice as fast as torch.compile, in turns, on one thread.

    Far below what holds on a quiet machine, and far above what is left when a compiler stops vectorising.
    """
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for kl in ("policy_ref", "ref_policy"):
            g = torch.Generator().manual_seed(0)
            z = (2 * torch.randn(64, 32768, generator=g)).to(dtype)
            r = z + 0.5 * torch.randn(64, 32768, generator=g).to(dtype)
            rest = (r, torch.randint(0, 32768, (64,), generator=g), torch.ones(64))
            work = z.clone()
            best = {"compile": math.inf, "ours-inplace": math.inf}
            for turn in range(22):
                for name in best:
                    work.copy_(z)
                    begun = time.perf_counter()
                    forward_backward(LOSSES[name], work, *rest, kl=kl)
                    if turn > 1:  # the first ones compile
                        best[name] = min(best[name], time.perf_counter() - begun)
            ratio = best["compile"] / best["ours-inplace"]
            print(f"{dtype}, {kl}: torch.compile takes {ratio:.1f} times as long as ours in place")
            if ratio < 2:
                sys.exit("expected at least 2: is the C++ built with optimisation, is it still vectorised?")


if __name__ == "__main__":
    smoke_bound()
