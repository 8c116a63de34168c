"""Everything about the loss on a GPU in one call: is it right, how fast is it, how much memory does it take.

    PYTHONPATH=. python benchmarks/gpu.py --edges            # correctness where random inputs do not show it
    PYTHONPATH=. python benchmarks/gpu.py --output benchmarks/results/h100.json
    PYTHONPATH=. python benchmarks/gpu.py --quick            # one size
    PYTHONPATH=. python benchmarks/gpu.py --tune             # blockings of every kernel, best first
    PYTHONPATH=. python benchmarks/gpu.py --interpret        # on a CPU, tiny: does this file still run?

It needs torch, Triton and this source tree; the C++ extension need not be built. Every row's gradient is
compared with float64 before it is timed.

A time is the GPU's own, between two events, the median of rounds in which every row takes its turn, with the
L2 cache full of something else before each: logits that a large matrix product wrote are not in it. `wall` is
a step of a loop of them, Python and autograd included. The roof is a device-to-device copy in the same
rounds. The least traffic of the loss is one read of policy and reference and one write of the gradient, so
with b and c bytes an element of policy and reference

    GB/s = N V (2 b + c) / time     for every row, whatever it moves in truth
    x roof = time / (N V (2 b + c) / the copy's bytes a second)

and 2 b alone for a row without KL. Rows of libraries (benchmarks/library_losses.py) are there where they are
installed; beside a row stand the terms that it lacks, and in place of one that is left out, why.

Two passes (float16, and bfloat16 in place, whose gradient waits for the loss's scale) read both once more:
5/3 of the roof at best. `extra` is the most memory that a step holds beyond logits and reference, with the
gradient.

The second kind of table starts from hidden states and the heads' weights: there the roof is the four matrix
products that no program can spare, three for a row without KL, with logits of the vocabulary's columns or
of the next multiple of 8, whichever is faster; and `extra` includes the gradients of hidden states and
weight.

The third is a whole training step beside the authors' eager loop (benchmarks/training_step.py), where the
extension is built.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

parser = argparse.ArgumentParser(description="Correctness, time and memory of quark_loss on a GPU.")
parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
parser.add_argument("--quick", action="store_true", help="one size")
parser.add_argument("--edges", action="store_true", help="masks, strides and infinities; no times")
parser.add_argument("--tune", action="store_true", help="time blockings instead of implementations")
parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
parser.add_argument("--minutes", type=float, default=7.5, help="start nothing new after this long")
parser.add_argument("--rounds", type=int, default=15, help="turns of every row")
parser.add_argument("--without", default="", metavar="NAME,...", help="rows of libraries to leave out")
arguments = parser.parse_args()
if arguments.interpret:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from library_losses import FROM_HIDDEN, FROM_LOGITS, TERMS, Library, check, of_terms  # noqa: E402
from losses import ENTROPY_COEF, KL_COEF, as_output, authors, lean  # noqa: E402
from torch import Tensor  # noqa: E402

from quark_fast.ops import eager, triton_kernels  # noqa: E402
from quark_fast.ops.eager import Kl  # noqa: E402
from quark_fast.ops.linear import linear_quark_loss  # noqa: E402
from quark_fast.ops.loss import quark_loss  # noqa: E402
from quark_fast.ops.triton_kernels import Blocking  # noqa: E402

BEGUN = time.monotonic()
DEVICE = "cpu" if arguments.interpret else "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (logits, ref_logits, labels, mask, kl) -> loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Kl], Tensor]


class Case(NamedTuple):
    rows: int
    vocab: int
    dtype: torch.dtype = BF16
    kl: Kl = "policy_ref"

    def __str__(self) -> str:
        return f"N{self.rows}-V{self.vocab}-{str(self.dtype).removeprefix('torch.')}-{self.kl}"

    def least_bytes(self, terms: Sequence[str] = TERMS) -> int:
        return (3 if "KL" in terms else 2) * self.rows * self.vocab * self.dtype.itemsize

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = torch.Generator(DEVICE).manual_seed(0)
        shape = (self.rows, self.vocab)
        z = torch.empty(shape, dtype=self.dtype, device=DEVICE).normal_(0, 2, generator=g)
        r = torch.empty(shape, dtype=self.dtype, device=DEVICE).normal_(0, 0.5, generator=g).add_(z)
        labels = torch.randint(0, self.vocab, (self.rows,), generator=g, device=DEVICE)
        return z, r, labels, torch.ones(self.rows, device=DEVICE)


# The most telling first: time may run out. Then GPT-2's, SmolLM2's, Llama 3's and Qwen 2.5's vocabularies.
CASES = [
    *[Case(2560, vocab) for vocab in (50257, 49152, 151936, 128256)],
    *[Case(2560, 50257, kl=kl) for kl in ("ref_policy", "sampled")],
    *[Case(2560, 50257, dtype, kl) for dtype in (FP32, FP16) for kl in get_args(Kl)],
    *[Case(rows, 50257) for rows in (320, 640, 8192)],
    *[Case(rows, vocab) for rows in (320, 640, 8192) for vocab in (151936, 49152, 128256)],
    *[Case(320, 50257, dtype, kl) for dtype in (BF16, FP32) for kl in ("ref_policy", "sampled")],
    Case(2560, 151936, FP32),
    *[Case(rows, 50257) for rows in (8, 64)],
]
COMPILED = {str(case) for case in (*CASES[:6], CASES[6], CASES[12])}
if arguments.quick:
    CASES = CASES[:1]
if arguments.interpret:
    CASES = [Case(2, 37, dtype, kl) for dtype, kl in zip((BF16, FP16, FP32), get_args(Kl), strict=True)]
    COMPILED = {str(CASES[0])}


# --- The rows of the table ---------------------------------------------------------------------


def ours(inplace: bool) -> Loss:
    def loss(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
        z = as_output(z) if inplace else z
        options = {"kl_coef": KL_COEF, "entropy_coef": ENTROPY_COEF, "kl": kl}
        return quark_loss(z, r, labels, mask, **options, impl="triton", inplace=inplace).loss

    return loss


def forward_backward(loss: Loss, z: Tensor, *rest: Tensor, kl: Kl) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf, *rest, kl)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def one_pass(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> tuple[Tensor, Tensor]:
    """The kernels alone: sums, and the gradient in the forward, whatever the dtype."""
    problem = (z, r, labels, mask / mask.sum(), r.shape[-1], KL_COEF, ENTROPY_COEF, kl)
    grad = triton_kernels.new_gradient(z)
    return triton_kernels.forward(*problem, grad=grad)[0], grad


class Row(NamedTuple):
    """What is timed, and the terms of the loss that it has."""

    run: Callable[..., Any]
    terms: Sequence[str] = TERMS


Work = tuple[Callable[[], Any], Callable[[], Any]]  # what is done before, and what is timed


def rows_of(case: Case, alone: bool) -> dict[str, Row]:
    """Name -> (z, r, labels, mask) -> loss and gradient; with ``alone`` ours."""

    def with_autograd(loss: Loss) -> Row:
        return Row(lambda *tensors: forward_backward(loss, *tensors, kl=case.kl))

    own = {
        "ours-fresh": with_autograd(ours(inplace=False)),
        "ours-inplace": with_autograd(ours(inplace=True)),
        "ours-one-pass": Row(lambda *tensors: one_pass(*tensors, case.kl)),
    }
    if alone:
        return own
    found = {"eager-authors": with_autograd(authors), "eager-lean": with_autograd(lean)}
    if str(case) in COMPILED:
        # Past its limit of recompilations, torch.compile falls back to eager.
        torch.compiler.reset()
        backend = "eager" if arguments.interpret else "inductor"
        found["compile"] = with_autograd(torch.compile(lean, dynamic=False, fullgraph=True, backend=backend))
        if case == Case(2560, 50257) and not arguments.quick:
            found["compile-max-autotune"] = with_autograd(
                torch.compile(lean, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs")
            )
    return found | own


def of_libraries(
    libraries: Mapping[str, Library], kl: Kl
) -> tuple[dict[str, tuple[Library, Callable[..., Tensor]]], dict[str, str]]:
    """Those that run here and compute what they claim, with their losses; why the others are left out."""
    here, left_out = {}, {}
    for name, library in libraries.items():
        if kl == "sampled" or (kl != "policy_ref" and "KL" not in library.terms):
            continue  # no library has it; or the row is that of policy_ref
        if name in arguments.without.split(","):
            left_out[name] = "--without"
            continue
        with warnings.catch_warnings(action="ignore"):  # at their import
            why = check(name, DEVICE, kl, interpreted=arguments.interpret)
        if why is None:
            here[name] = library, library.load()
        else:
            left_out[name] = why
    return here, left_out


def row_of_library(library: Library, loss: Callable[..., Tensor], kl: Kl) -> Row:
    def of_ones(z: Tensor, r: Tensor, labels: Tensor, mask: Tensor, kl: Kl) -> Tensor:
        return loss(z, r, labels, kl)

    return Row(lambda *tensors: forward_backward(of_ones, *tensors, kl=kl), library.terms)


# --- Is it right? ------------------------------------------------------------------------------


def exact(
    case: Case, tensors: tuple[Tensor, ...], rows: Tensor, which: Sequence[str] = TERMS
) -> tuple[Tensor, Tensor]:
    """The whole loss's gradient at some rows, and nll, KL, H there (3, rows), in float64.

    The loss has the terms of `which` alone.
    """
    z, r, labels, mask = (tensor[rows].double() for tensor in tensors)
    leaf = z.requires_grad_()
    weights = mask / tensors[3].double().sum()
    problem = (leaf, r, labels.long(), weights, case.vocab, KL_COEF, ENTROPY_COEF, case.kl)
    _, *terms = eager.quark_loss(*problem)
    (weights * of_terms(*terms, which)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad, torch.stack(terms).detach()


def gradient_error(case: Case, grad: Tensor, expected: Tensor, rows: Tensor) -> tuple[float, bool]:
    """The largest error relative to the largest gradient, and whether the dtype's rounding explains it."""
    difference = (grad[rows].double() - expected).abs()
    largest = float(expected.abs().max())
    # Authors' rows compute in half precision, too: what is compared with is not on trial.
    limits = torch.finfo(case.dtype)
    # Below the normal numbers, which is where a mean over many rows lies in float16, rounding is absolute.
    allowed = limits.eps * expected.abs() + 2e-6 * largest + limits.smallest_normal * limits.eps
    return float(difference.max()) / largest, bool((difference <= allowed).all())


def check_edges() -> list[str]:
    """What large random inputs do not show, in the blockings that the GPU gets. What is wrong, by name."""
    wrong = []

    def expect(name: str, condition: Tensor | bool) -> None:
        if not bool(condition):
            wrong.append(name)
            print(f"WRONG: {name}")

    # Programs that share a row, then a row a program.
    cases = [Case(5, 50257, dtype, kl) for dtype in (BF16, FP16, FP32) for kl in get_args(Kl)]
    cases += [Case(600, 50257, dtype, kl) for dtype, kl in ((BF16, "policy_ref"), (FP32, "ref_policy"))]
    for case in [Case(4, 37)] if arguments.interpret else cases:
        z, r, labels, mask = case.inputs()
        count, vocab = z.shape
        mask[1], labels[1], r[1] = 0, -100, math.nan
        # Rows of 5 reward tokens more, every other row of a larger tensor.
        wide = torch.full((count, 2, vocab + 5), math.nan, dtype=case.dtype, device=DEVICE)
        wide[:, 0, :vocab] = z
        wide[1] = math.nan
        options = {"kl": case.kl, "impl": "triton", "vocab_size": vocab}
        options |= {"kl_coef": KL_COEF, "entropy_coef": ENTROPY_COEF}
        some = torch.tensor([0, 2, count - 1], device=DEVICE)
        expected, terms = exact(case, (z, r, labels, mask), some)
        for strided in (False, True):
            for inplace in (False, True):
                name = f"{case}, {'strided' if strided else 'plain'}, {'in place' if inplace else 'fresh'}"
                leaf = (wide if strided else wide[:, 0, :vocab]).clone().requires_grad_()
                logits = (leaf * 1)[:, 0] if strided else leaf * 1
                out = quark_loss(logits, r, labels, mask, **options, inplace=inplace)
                (out.loss * 2).backward()
                assert leaf.grad is not None
                grad = leaf.grad[:, 0] if strided else leaf.grad
                expect(f"{name}: gradient", gradient_error(case, grad[:, :vocab] / 2, expected, some)[1])
                got = torch.stack([out.nll, out.kl, out.entropy])
                close = torch.allclose(got[:, some].double(), terms, atol=2e-5, rtol=2e-6)
                expect(f"{name}: nll, KL, H", close)
                expect(f"{name}: masked row", not grad[1].any() and not got.isnan().any())
                expect(f"{name}: columns beyond V", not grad[:, vocab:].any())
        labels[2] = vocab  # no token of the base vocabulary
        r[0, 7] = -math.inf  # KL(p || p_ref) is infinite
        leaf = z.clone().requires_grad_()
        out = quark_loss(leaf, r, labels, mask, **options)
        out.loss.backward()
        assert leaf.grad is not None
        expect(f"{case}: bad label", out.nll[2].isnan() & leaf.grad[2].isnan().all())
        expect(f"{case}: other rows", out.nll[3:].isfinite().all() & leaf.grad[3:].isfinite().all())
        if case.kl == "policy_ref":
            expect(f"{case}: infinite KL", (out.kl[0] == math.inf) & leaf.grad[0].isnan().all())
    print(f"edges: {f'{len(wrong)} wrong' if wrong else 'all right'}")
    return wrong


# --- How fast is it? ---------------------------------------------------------------------------


class Clock:
    """Times on the GPU with a cold L2; on the CPU, to try this file out, whatever it takes."""

    def __init__(self) -> None:
        self.other = torch.zeros(1 if arguments.interpret else 64 << 20, device=DEVICE)  # 256 MB

    def seconds(self, works: dict[str, Work], rounds: int) -> dict[str, float]:
        """name -> (before, work) -> name -> the median of work's times, all taking turns."""
        times: dict[str, list[Any]] = {name: [] for name in works}
        warm = 0 if arguments.interpret else 2
        for turn in range(warm + rounds):
            for name, (before, work) in works.items():
                before()
                # Read, not written: what is written would still have to leave the cache while work is timed.
                self.other.sum()
                pair = self._timed(work)
                if turn >= warm:
                    times[name].append(pair)
        if arguments.interpret:
            return {name: statistics.median(each) for name, each in times.items()}
        torch.cuda.synchronize()
        return {
            name: statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in each)
            for name, each in times.items()
        }

    def _timed(self, work: Callable[[], Any]) -> Any:
        if arguments.interpret:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        # Some 2 ms of nothing, in which Python gets ahead: the kernels must not wait for their launches.
        torch.cuda._sleep(4_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        return begin, end

    @staticmethod
    def wall(work: Callable[[], Any], count: int) -> float:
        """Seconds a step of a loop, everything included."""
        synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            work()
        synchronize()
        return (time.perf_counter() - begun) / count


def synchronize() -> None:
    if not arguments.interpret:
        torch.cuda.synchronize()


def extra_memory(work: Callable[[], Any]) -> int:
    if arguments.interpret:
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, clock: Clock, alone: bool) -> list[dict[str, Any]]:
    """A dict for every row of a case's table; with ``alone`` of ours."""
    tensors = case.inputs()
    z, *rest = tensors
    rows = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0))[:32].to(DEVICE)
    work, target = z.clone(), torch.empty_like(z)
    here, left_out = ({}, {}) if alone else of_libraries(FROM_LOGITS, case.kl)
    every = rows_of(case, alone) | {name: row_of_library(*one, case.kl) for name, one in here.items()}
    about = {"case": named(case, alone), **case._asdict(), "dtype": str(case.dtype)}
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Work] = {}
    for name, row in every.items():

        def run(row: Row = row) -> tuple[Tensor, Tensor]:
            return row.run(work, *rest)

        def right(run: Callable[[], tuple[Tensor, Tensor]] = run, row: Row = row) -> dict[str, Any]:
            work.copy_(z)
            error, right = gradient_error(case, run()[1], exact(case, tensors, rows, row.terms)[0], rows)
            return {"error": error, "right": right}

        found[name] = about | tried(name, row, right, run)
        if "failed" not in found[name]:
            runs[name] = ((lambda: work.copy_(z)), run)
    runs["roof"] = ((lambda: None), (lambda: target.copy_(z)))
    seconds = clock.seconds(runs, arguments.rounds)
    roof = 2 * z.nbytes / seconds.pop("roof")
    for name, taken in seconds.items():
        work.copy_(z)
        least = case.least_bytes(every[name].terms)
        found[name] |= {
            "us": taken * 1e6,
            "wall_us": clock.wall(runs[name][1], 1 if arguments.interpret else 10) * 1e6,
            "gb_per_s": least / taken / 1e9,
            "to_roof": taken / (least / roof),
            "roof_gb_per_s": roof / 1e9,
        }
    return [*found.values(), *(about | {"row": name, "left_out": why} for name, why in left_out.items())]


def named(case: Case | HeadCase, alone: bool) -> str:
    return f"{case}, ours alone" if alone else str(case)


def tried(name: str, row: Row, right: Callable[[], dict[str, Any]], run: Callable[[], Any]) -> dict[str, Any]:
    """A row's error and memory; or why it failed. Of the errors only ours are on trial here."""
    lacks = [term for term in TERMS if term not in row.terms]
    found: dict[str, Any] = {"row": name, "lacks": lacks}
    try:
        found |= right()
        found["extra_mb"] = extra_memory(run) / 1e6
    except Exception as error:  # time on a GPU is scarce: the other rows go on, and this one says why
        return found | failure(error)
    found["right"] = found["right"] or not name.startswith("ours")
    return found


def failure(error: Exception) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}", "right": False}


def show(rows: list[dict[str, Any]]) -> None:
    timed = next((row for row in rows if "us" in row), {})
    products = f"products: {timed.get('roof_us', math.nan):.0f} us"
    copy = f"copy: {timed.get('roof_gb_per_s', math.nan):.0f} GB/s"
    print(f"\n{rows[0]['case']}    {products if 'roof_us' in timed else copy}")
    print(f"{'':24}{'us':>10}{'wall us':>10}{'GB/s':>8}{'x roof':>8}{'extra MB':>10}{'error':>10}")
    for row in rows:
        if "us" not in row:
            print(f"{row['row']:24}{row.get('failed') or 'left out: ' + row['left_out']}")
            continue
        speed, to_roof = (row.get(name, math.nan) for name in ("gb_per_s", "to_roof"))
        wrong = "" if row["right"] else "  WRONG"
        lacks = f"  no {', no '.join(row['lacks'])}" if row["lacks"] else ""
        print(
            f"{row['row']:24}{row['us']:10.1f}{row['wall_us']:10.1f}{speed:8.0f}{to_roof:8.2f}"
            f"{row['extra_mb']:10.1f}{row['error']:10.1e}{wrong}{lacks}"
        )


# --- From hidden states ------------------------------------------------------------------------


class HeadCase(NamedTuple):
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        return f"N{self.rows}-D{self.width}-V{self.vocab}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight, ref_hidden, ref_weight, labels; logits of standard deviation 2."""
        g = torch.Generator(DEVICE).manual_seed(0)

        def normal(rows: int, deviation: float) -> Tensor:
            made = torch.empty(rows, self.width, dtype=self.dtype, device=DEVICE)
            return made.normal_(0, deviation, generator=g)

        hidden, weight = normal(self.rows, 2), normal(self.vocab, self.width**-0.5)
        labels = torch.randint(0, self.vocab, (self.rows,), generator=g, device=DEVICE)
        return hidden, weight, hidden + normal(self.rows, 0.5), weight, labels


# GPT-2, Qwen 2.5 1.5B, Llama 3 8B, and a batch as large as training takes.
HEAD_CASES = [HeadCase(2560, 768, 50257), HeadCase(2560, 1536, 151936), HeadCase(2560, 4096, 128256)]
HEAD_CASES += [HeadCase(8192, 4096, 128256)]
if arguments.quick:
    HEAD_CASES = HEAD_CASES[:1]
if arguments.interpret:
    HEAD_CASES = [HeadCase(3, 5, 37)]


def head_rows(alone: bool) -> dict[str, Row]:
    """name -> (hidden, weight, ref_hidden, ref_weight, labels) -> loss; with ``alone`` ours."""
    options = {"kl_coef": KL_COEF, "entropy_coef": ENTROPY_COEF, "impl": "triton"}

    def from_logits(loss: Loss) -> Callable[..., Tensor]:
        def step(
            hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor
        ) -> Tensor:
            ones = torch.ones(len(labels), device=DEVICE)
            return loss(hidden @ weight.t(), ref_hidden @ ref_weight.t(), labels, ones, "policy_ref")

        return step

    own = {
        "ours-whole": Row(from_logits(ours(inplace=False))),
        "ours-linear": Row(lambda *tensors: linear_quark_loss(*tensors, **options).loss),
    }
    if alone:
        return own
    torch.compiler.reset()
    backend = "eager" if arguments.interpret else "inductor"
    compiled = torch.compile(from_logits(lean), dynamic=False, fullgraph=True, backend=backend)
    return {"eager-lean": Row(from_logits(lean)), "compile": Row(compiled)} | own


def head_row_of_library(library: Library, loss: Callable[..., Tensor]) -> Row:
    return Row(lambda *tensors: loss(*tensors, "policy_ref"), library.terms)


def exact_head_logits(
    case: HeadCase, tensors: Sequence[Tensor], some: Tensor, terms: Sequence[str]
) -> Tensor:
    """The gradient of the logits of some rows, in float64."""
    hidden, weight, ref_hidden, ref_weight, labels = (tensor.detach() for tensor in tensors)
    logits = [h[some].double() @ w.double().t() for h, w in ((hidden, weight), (ref_hidden, ref_weight))]
    grad_logits, _ = exact(
        Case(case.rows, case.vocab, FP32),
        (*logits, labels[some], torch.ones(len(some), device=DEVICE)),
        torch.arange(len(some), device=DEVICE),
        terms,
    )
    return grad_logits * (len(some) / case.rows)  # of the mean over all rows, not over some


def head_errors(
    case: HeadCase, tensors: Sequence[Tensor], found: Sequence[Tensor], some: Tensor, terms: Sequence[str]
) -> tuple[float, float]:
    """By how much the gradients of hidden states and weight miss those of float64, as a share of them.

    Of the hidden states of some rows, the largest miss; of the weights of the same rows' labels, by norm.
    """
    hidden, weight, *_, labels = (tensor.detach() for tensor in tensors)
    expected = exact_head_logits(case, tensors, some, terms) @ weight.double()
    of_hidden = (found[0][some].double() - expected).abs().max() / expected.abs().max()
    columns = labels[some].unique()
    of_columns = torch.zeros(len(columns), hidden.shape[1], dtype=torch.float64, device=DEVICE)
    for rows in torch.arange(case.rows, device=DEVICE).split(128):  # all rows' logits would be too many
        of_columns += exact_head_logits(case, tensors, rows, terms)[:, columns].t() @ hidden[rows].double()
    return float(of_hidden), float((found[1][columns].double() - of_columns).norm() / of_columns.norm())


def products(tensors: Sequence[Tensor], vocab: int, reference: bool, columns: int) -> Callable[[], None]:
    """The matrix products that no program can spare; without a reference three.

    Args:
        columns: from the start of a row of logits to that of the next: a GPU is slow where they are odd.
    """
    hidden, weight, ref_hidden, ref_weight, _ = (tensor.detach() for tensor in tensors)
    z = hidden.new_empty(len(hidden), columns).normal_()[:, :vocab]

    def run() -> None:
        torch.mm(hidden, weight.t(), out=z)
        if reference:
            torch.mm(ref_hidden, ref_weight.t(), out=z)
        torch.mm(z, weight)
        torch.mm(z.t(), hidden)

    return run


def measure_head(case: HeadCase, clock: Clock, alone: bool) -> list[dict[str, Any]]:
    hidden, weight, *rest = case.inputs()
    leaves = [hidden.requires_grad_(), weight.detach().clone().requires_grad_()]
    some = torch.randperm(case.rows, generator=torch.Generator().manual_seed(0))[:32].to(DEVICE)
    here, left_out = ({}, {}) if alone else of_libraries(FROM_HIDDEN, "policy_ref")
    every = head_rows(alone) | {name: head_row_of_library(*one) for name, one in here.items()}
    about = {"case": named(case, alone), **case._asdict(), "dtype": str(case.dtype)}
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Work] = {}
    for name, row in every.items():

        def run(row: Row = row) -> tuple[Tensor, ...]:
            return torch.autograd.grad(row.run(*leaves, *rest), leaves)

        def right(run: Callable[[], tuple[Tensor, ...]] = run, row: Row = row) -> dict[str, Any]:
            error, of_weight = head_errors(case, [*leaves, *rest], run(), some, row.terms)
            # Logits and their gradient are rounded to the dtype, in sums of many.
            eps = torch.finfo(case.dtype).eps
            right = error < 8 * eps and of_weight < 2 * eps
            return {"error": error, "weight_error": of_weight, "right": right}

        found[name] = about | tried(name, row, right, run)
        if "failed" not in found[name]:
            runs[name] = ((lambda: None), run)
    roofs = {
        (reference, columns): products([*leaves, *rest], case.vocab, reference, columns)
        for reference in (True, False)
        for columns in {case.vocab, -(-case.vocab // 8) * 8}
    }
    runs |= {f"roof {which}": ((lambda: None), run) for which, run in roofs.items()}
    seconds = clock.seconds(runs, min(arguments.rounds, 9))
    taken_by = {which: seconds.pop(f"roof {which}") for which in roofs}
    for name, taken in seconds.items():
        wanted = "KL" in every[name].terms
        roof_seconds = min(taken for (reference, _), taken in taken_by.items() if reference == wanted)
        found[name] |= {
            "us": taken * 1e6,
            "wall_us": clock.wall(runs[name][1], 1 if arguments.interpret else 5) * 1e6,
            "to_roof": taken / roof_seconds,
            "roof_us": roof_seconds * 1e6,
        }
    return [*found.values(), *(about | {"row": name, "left_out": why} for name, why in left_out.items())]


# --- A whole training step ---------------------------------------------------------------------


def measure_steps(about: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """A table for every case."""
    try:
        from training_step import CASES, TINY, measure_step
    except ImportError as error:  # a machine that is lent for minutes may have torch and Triton alone
        yield [{"case": "training step", "row": "ours-step", "left_out": str(error), "right": True}]
        return
    for case in [TINY] if arguments.interpret else CASES[:1] if arguments.quick else CASES:
        rounds = min(arguments.rounds, 9)
        yield measure_step(case, DEVICE, rounds, extra_memory, about.get("bf16_tflop_per_s"))


# --- Which blocking? ---------------------------------------------------------------------------


def blockings(kernel: str) -> Iterator[Blocking]:
    for splits in (1,) if kernel != "split" else (2, 4, 8, 12, 24):
        for warps in (8, 16, 32) if kernel != "split" else (4, 8):
            for per_thread in (8, 16, 32):
                for stages in (1, 3):
                    yield Blocking(splits, warps, per_thread, stages)


def launcher(kernel: str, tensors: tuple[Tensor, ...], case: Case) -> Callable[[Blocking], Any]:
    problem = (*tensors, case.vocab, KL_COEF, ENTROPY_COEF, case.kl)
    grad = torch.empty_like(tensors[0])
    if kernel == "sums":
        return lambda cut: triton_kernels.forward(*problem, cut=cut)
    if kernel == "gradient":
        stats, one = triton_kernels.forward(*problem)[-1], torch.ones((), device=DEVICE)
        return lambda cut: triton_kernels.backward(one, stats, *problem, grad=grad, cut=cut)
    return lambda cut: triton_kernels.forward(*problem, grad=grad, cut=cut)


def tune(clock: Clock) -> list[dict[str, Any]]:
    """Every blocking of every kernel: one pass ("row", "split"), sums alone, gradient alone."""
    results = []
    tuned = [
        ("row", Case(2560, 50257)),
        ("row", Case(2560, 151936)),
        ("row", Case(2560, 50257, FP32)),
        ("row", Case(320, 50257)),
        ("sums", Case(2560, 50257)),
        ("gradient", Case(2560, 50257)),
        # Between one row for each multiprocessor and two.
        *[(kernel, Case(rows, 50257)) for rows in (132, 200, 264) for kernel in ("row", "split")],
        ("split", Case(320, 50257)),
        ("split", Case(64, 50257)),
        ("split", Case(8, 151936)),
    ]
    if arguments.interpret:
        tuned = [(kernel, Case(2, 67)) for kernel in ("row", "sums", "gradient", "split")]
    for kernel, case in tuned:
        z, r, labels, mask = case.inputs()
        call = launcher(kernel, (z, r, labels, mask / mask.sum()), case)
        runs: dict[str, Work] = {}
        cuts = {}
        for cut in list(blockings(kernel))[: 2 if arguments.interpret else None]:
            if (time.monotonic() - BEGUN) / 60 > arguments.minutes:
                break
            try:
                call(cut)
                synchronize()
            except Exception as error:  # registers or shared memory, as a rule
                print(f"{kernel} {case} {cut}: {failure(error)['failed']}")
                continue
            cuts[str(cut)] = cut
            runs[str(cut)] = ((lambda: None), partial(call, cut))
        target = torch.empty_like(z)
        runs["roof"] = ((lambda: None), partial(target.copy_, z))
        seconds = clock.seconds(runs, min(arguments.rounds, 9))
        roof = 2 * z.nbytes / seconds.pop("roof")
        print(f"\n{kernel}, {case}; copy: {roof / 1e9:.0f} GB/s")
        for name, taken in sorted(seconds.items(), key=lambda item: item[1]):
            row = {"kernel": kernel, "case": str(case), **cuts[name]._asdict(), "us": taken * 1e6}
            row |= {"gb_per_s": case.least_bytes() / taken / 1e9, "roof_gb_per_s": roof / 1e9}
            results.append(row)
            if len([r for r in results if r["kernel"] == kernel and r["case"] == str(case)]) <= 8:
                print(f"{row['us']:10.1f} us {row['gb_per_s']:8.0f} GB/s  {cuts[name]}")
    return results


# --- The machine -------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    about: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "Triton's interpreter: the times mean nothing",
    }
    if arguments.interpret:
        return about
    properties = torch.cuda.get_device_properties(0)
    about |= {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
    }
    return about | ceilings() | {"nvidia-smi": clocks_at_work()}


def ceilings() -> dict[str, float]:
    """What everything else is held against: a large copy, and a large product in bfloat16."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    side = 8192
    matrices = [torch.randn(side, side, dtype=BF16, device=DEVICE) for _ in range(3)]

    def seconds(work: Callable[[], Any]) -> float:
        work()
        return Clock.wall(work, 20)

    copied = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    multiplied = 2 * side**3 / seconds(lambda: torch.mm(matrices[0], matrices[1], out=matrices[2]))
    return {"copy_gb_per_s": round(copied / 1e9), "bf16_tflop_per_s": round(multiplied / 1e12, 1)}


def clocks_at_work() -> dict[str, str] | str:
    """nvidia-smi's word while products run: an idle GPU has its clocks down."""
    wanted = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    matrix = torch.randn(8192, 8192, dtype=BF16, device=DEVICE)
    result = torch.empty_like(matrix)
    for _ in range(900):  # a second and more; about a thousand launches may wait
        torch.mm(matrix, matrix, out=result)
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    finally:
        torch.cuda.synchronize()
    return dict(zip(wanted.split(","), answer.stdout.split("\n")[0].split(", "), strict=False))


# --- All together ------------------------------------------------------------------------------


def cases(about: Mapping[str, Any], clock: Clock) -> Iterator[tuple[str, Callable[[], Iterator[Any]]]]:
    """Name -> its tables, the most telling first."""

    def of_logits(case: Case, alone: bool = False) -> Callable[[], Iterator[Any]]:
        return lambda: iter([measure(case, clock, alone)])

    def of_head(case: HeadCase, alone: bool = False) -> Callable[[], Iterator[Any]]:
        return lambda: iter([measure_head(case, clock, alone)])

    # Ours first, and saved: compilers and libraries may take minutes.
    yield from ((named(case, True), of_logits(case, True)) for case in CASES[:1])
    yield from ((named(case, True), of_head(case, True)) for case in HEAD_CASES[:1])
    yield "training step", lambda: measure_steps(about)
    yield from ((str(case), of_logits(case)) for case in CASES[:1])
    yield from ((str(case), of_head(case)) for case in HEAD_CASES)
    yield from ((str(case), of_logits(case)) for case in CASES[1:])


def measured(name: str, call: Callable[[], Iterator[Any]]) -> Iterator[list[dict[str, Any]]]:
    """The tables of a case; where it fails, as of inputs that do not fit, one row that says so.

    Time on a GPU is scarce: whatever it is, the other cases are still measured.
    """
    try:
        yield from call()
    except Exception as error:
        lacking = isinstance(error, torch.OutOfMemoryError)  # which is no fault
        yield [{"case": name, "row": "all", **failure(error), "broken": not lacking}]


def tables(about: dict[str, Any], clock: Clock) -> tuple[list[str], list[dict[str, Any]]]:
    """What is wrong, and the rows of every case, saved after each."""
    wrong: list[str] = []
    rows: list[dict[str, Any]] = []
    for name, call in cases(about, clock):
        if (time.monotonic() - BEGUN) / 60 > arguments.minutes:
            print(f"{name}: left out, {arguments.minutes} minutes are over")
            continue
        for found in measured(name, call):
            show(found)
            rows += found
            wrong += [
                f"{row['case']}, {row['row']}"
                for row in found
                if (row["row"].startswith("ours") and not row["right"]) or row.get("broken")
            ]
            if not arguments.interpret:
                torch.cuda.empty_cache()
            save(about | {"wrong": wrong, "rows": rows})
    return wrong, rows


def main() -> None:
    if not arguments.interpret and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --interpret tries this file out on the CPU")
    about = machine()
    print(json.dumps(about, indent=1))
    wrong: list[str] = []
    rows: list[dict[str, Any]] = []
    if arguments.edges:
        wrong = check_edges()
    elif arguments.tune:
        rows = tune(Clock())
    else:
        wrong, rows = tables(about, Clock())
    save(about | {"wrong": wrong, "rows": rows})
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


def save(results: dict[str, Any]) -> None:
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
