"""The Triton kernels against the equation in float64: on a GPU where there is one, else interpreted.

The error budget is that of test_loss.py. The interpreter cuts float32 to bfloat16 instead of rounding it, so
that there one unit of the last place (2^-7) is allowed on top. It runs programs one after another, some
thousand times slower than a GPU: few rows, and tiles of one warp. On a GPU every test has these, at whose
borders it is made to look, and once more the blocking that the GPU gets.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import test_linear
import torch
import triton
from pairwise import pairwise
from test_loss import (
    DTYPES,
    SLACK,
    Inputs,
    Result,
    assert_compiles_whole,
    make,
    one_impossible,
    run,
    strided,
    truth,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quark_fast.errors import UsageError
from quark_fast.ops import loss, triton_kernels
from quark_fast.ops.eager import Kl
from quark_fast.ops.loss import quark_loss
from quark_fast.ops.triton_kernels import Blocking, blocking

KLS = get_args(Kl)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TILE = 512  # columns a program of one warp takes at once

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    # Infinities are computed with, in numpy.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]


def one_warp(splits: int, *_: Any, **__: Any) -> Blocking:
    return Blocking(splits=splits, warps=1, per_thread=16)


def as_on_a_gpu(splits: int, rows: int, vocab: int, logits: Tensor, **how: Any) -> Blocking:
    """What `blocking` chooses for many rows, or for few, of which it has programs share a row."""
    per_thread = 32 // logits.element_size()
    if splits > 1:
        return Blocking(splits, warps=4, per_thread=per_thread)
    if ON_GPU:
        return blocking(2**30, vocab, logits, **how)
    return Blocking(
        1, warps=16 if how["fused"] else 8, per_thread=per_thread, stages=3 if how["fused"] else 1
    )


@pytest.fixture(autouse=True, params=[one_warp, as_on_a_gpu] if ON_GPU else [one_warp])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A program for each row; call it to have `splits` of them share a row."""

    def splits(count: int) -> None:
        monkeypatch.setattr(triton_kernels, "blocking", partial(request.param, count))

    splits(1)
    return splits


def small(vocab: int = 1003, rows: int = 3, **options: object) -> Inputs:
    """Some rows, the last but one masked. Policy and reference start at the same columns of 16 bytes."""
    inputs = make(vocab, (rows,), **{"extra": 0, **options})
    return inputs._replace(mask=torch.arange(rows) != rows - 2)


def ours(inputs: Inputs, scale: float = 1.0, **options: object) -> Result:
    there = Inputs(*(value.to(DEVICE) for value in inputs))
    return Result(*(value.cpu() for value in run(there, scale, **{"impl": "triton", **options})))


def assert_as_accurate_as_eager(inputs: Inputs, **options: object) -> None:
    exact = truth(inputs, **options)
    eager = run(inputs, **{**options, "impl": "eager", "inplace": False})
    for name, x, e, t in zip(Result._fields, ours(inputs, **options), eager, exact, strict=True):
        assert x.shape == t.shape
        allowed = (e - t).abs().max() + SLACK * (1 + t.abs().max())
        if name == "grad":
            allowed = allowed + 2**-23 * options.get("kl_coef", 0.05) * exact.kl.max()
            if inputs.logits.dtype == torch.bfloat16 and not ON_GPU:
                allowed = allowed + 2**-7 * t.abs()
        excess = ((x - t).abs() - allowed).max()
        assert excess <= 0, f"{name}: {excess:.2e} beyond the allowed error"


COEFFICIENTS = {"kl_coef": 0.3, "entropy_coef": 0.2}


# --- The equation ------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_errs_no_more_than_eager(
    cut: Callable[[int], None], dtype: torch.dtype, kl: str, splits: int
) -> None:
    """2003 columns: head, three tiles, tail, last columns. float32 writes the gradient in the forward."""
    cut(splits)
    inplace = splits == 3  # the parts of a row must not read what another has overwritten
    assert_as_accurate_as_eager(small(2003, dtype=dtype), kl=kl, inplace=inplace, **COEFFICIENTS)


# 1 = no sum; less than 16 bytes; less than a tile; whole tiles; one column more.
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("vocab", [1, 7, 252, TILE, 2 * TILE, 2 * TILE + 1])
def test_any_vocabulary(cut: Callable[[int], None], vocab: int, splits: int) -> None:
    cut(splits)
    assert_as_accurate_as_eager(small(vocab), **COEFFICIENTS)


@pytest.mark.parametrize(
    ("dtype", "kl", "splits", "more"), pairwise(DTYPES, KLS, [1, 3], [-1, 0, 1, 9]), ids=str
)
def test_tiles_of_the_blocking_that_a_gpu_gets(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kl: str, splits: int, more: int
) -> None:
    """So many columns more than two tiles of the largest program."""
    monkeypatch.setattr(triton_kernels, "blocking", partial(as_on_a_gpu, splits))
    inputs = small(2 * 32 * 16 * 32 // dtype.itemsize + more, rows=2, dtype=dtype)
    assert_as_accurate_as_eager(inputs, kl=kl, **COEFFICIENTS)


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
def test_a_real_vocabulary(kl: str) -> None:
    """Long sums: what is added naively in float32 loses digits only here."""
    assert_as_accurate_as_eager(make(50257, shape=(1,), extra=0), kl=kl)


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_may_have_another_dtype(dtype: torch.dtype, ref_dtype: torch.dtype) -> None:
    inputs = small(rows=2, dtype=dtype)
    assert_as_accurate_as_eager(inputs._replace(ref_logits=inputs.ref_logits.to(ref_dtype)))


@pytest.mark.parametrize("splits", [1, 2])
def test_without_reference(cut: Callable[[int], None], splits: int) -> None:
    cut(splits)
    inputs = small()
    expected = truth(inputs, kl_coef=0.0)
    leaf = inputs.logits.to(DEVICE).requires_grad_()
    labels, mask = inputs.labels.to(DEVICE), inputs.mask.to(DEVICE)
    out = quark_loss(leaf, None, labels, mask, kl_coef=0.0, vocab_size=1003, impl="triton")
    out.loss.backward()
    torch.testing.assert_close(out.loss.cpu().double(), expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(leaf.grad.cpu().double(), expected.grad, atol=1e-6, rtol=0)
    assert not out.kl.any()


# --- Masks, labels, columns --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "inplace", "splits"), pairwise([torch.float32, torch.bfloat16], [False, True], [1, 3])
)
def test_masked_tokens_and_columns_beyond_the_vocabulary_are_never_read(
    cut: Callable[[int], None], dtype: torch.dtype, inplace: bool, splits: int
) -> None:
    cut(splits)
    inputs = small(extra=600, dtype=dtype)
    clean = ours(inputs, inplace=inplace)
    inputs.logits[~inputs.mask] = math.nan
    inputs.logits[..., 1003:] = math.nan
    inputs.ref_logits[~inputs.mask] = math.nan
    inputs.labels[~inputs.mask] = -100
    dirty = ours(inputs, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for value in dirty[1:]:
        assert not value[~inputs.mask].any()
    assert not dirty.grad[..., 1003:].any()
    assert dirty.grad[inputs.mask][..., :1003].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_masked_is_zero_and_not_nan(dtype: torch.dtype) -> None:
    inputs = small(dtype=dtype)
    out = ours(inputs._replace(mask=torch.zeros_like(inputs.mask)))
    assert all(not value.any() for value in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    out = ours(make(shape=(0,), dtype=dtype))
    assert out.loss == 0
    assert out.grad.shape == (0, 1008)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("label", [-100, -1, 1003, 1005, 10**12])
def test_label_outside_the_vocabulary_makes_its_token_nan(
    cut: Callable[[int], None], label: int, splits: int
) -> None:
    """Nobody looks at the labels before, which would make the GPU wait; no memory beyond the row is read."""
    cut(splits)
    inputs = small(rows=3, extra=5)._replace(mask=torch.ones(3))
    inputs.labels[1] = label
    out = ours(inputs)
    assert out.loss.isnan()
    assert out.nll.isnan().tolist() == [False, True, False]
    assert out.grad[1, :1003].isnan().all()
    assert out.grad[[0, 2]].isfinite().all()
    assert not out.grad[:, 1003:].any()


# --- Numbers at the edge -----------------------------------------------------------------------


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_impossible_for_both_are_left_out(dtype: torch.dtype, kl: str) -> None:
    """-inf in policy and reference is the same as a vocabulary without these tokens."""
    few = make(300, (2,), dtype=dtype, extra=0)
    where = torch.arange(300) + TILE + 100  # a whole tile, and most threads of the next, see only -inf
    logits = torch.full((2, 2003), -math.inf, dtype=dtype)
    ref_logits = logits.clone()
    logits[..., where], ref_logits[..., where] = few.logits, few.ref_logits
    many = ours(Inputs(logits, ref_logits, few.labels + TILE + 100, few.mask), kl=kl)
    expected = truth(few, kl=kl)
    for a, b in zip(many[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(many.grad[..., where], expected.grad, atol=tolerance, rtol=tolerance)
    assert many.grad.count_nonzero() <= expected.grad.count_nonzero()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
def test_minus_infinity_in_one_of_the_two(cut: Callable[[int], None], kl: str, splits: int) -> None:
    """0 log 0 = 0 where the first distribution has no mass; +inf where only the second has none."""
    cut(splits)
    logits, ref_logits, labels, _ = small(rows=2)
    labels[:] = 3
    logits[0, 100], ref_logits[1, 100] = -math.inf, -math.inf
    inputs = Inputs(logits, ref_logits, labels, torch.ones(2))
    finite, infinite = (0, 1) if kl == "policy_ref" else (1, 0)
    out, exact = ours(inputs, kl=kl), truth(inputs, kl=kl)
    assert out.kl[infinite] == math.inf
    assert out.loss == math.inf
    torch.testing.assert_close(out.kl[finite], exact.kl[finite], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy, exact.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.nll, exact.nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.grad[finite], exact.grad[finite], atol=1e-6, rtol=0)
    assert out.grad[infinite].isnan().all(), "no step on an infinite loss goes unnoticed"
    without = ours(inputs, kl=kl, kl_coef=0.0)
    assert without.kl[infinite] == math.inf
    assert without.loss.isfinite()
    assert without.grad.isfinite().all()


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
def test_an_infinite_term_that_a_later_maximum_makes_negligible(kl: str) -> None:
    """The factor 0 of the rescaling times that infinity must be 0."""
    inputs = small(rows=1)._replace(mask=torch.ones(1))
    # Every thread meets them in its first tile, and the real logits, e^300 times as large, in its second.
    first = torch.full((1, TILE), -300.0)
    infinite = torch.full((1, TILE), -math.inf)
    policy, ref = (first, infinite) if kl == "policy_ref" else (infinite, first)
    more = Inputs(
        torch.cat([policy, inputs.logits], -1),
        torch.cat([ref, inputs.ref_logits], -1),
        inputs.labels + TILE,
        inputs.mask,
    )
    out, expected = ours(more, kl=kl), truth(inputs, kl=kl)
    for a, b in zip(out[:4], expected[:4], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.grad[:, TILE:], expected.grad, atol=1e-6, rtol=0)
    assert not out.grad[:, :TILE].any()


@pytest.mark.parametrize(
    ("kl", "lift", "flip", "splits"),
    pairwise(["policy_ref", "ref_policy"], [20.0, 80.0], [False, True], [1, 3]),
)
def test_the_order_of_columns_does_not_decide_whether_a_kl_is_infinite(
    cut: Callable[[int], None], kl: str, lift: float, flip: bool, splits: int
) -> None:
    cut(splits)
    inputs, possible = one_impossible(3 * TILE + 7, kl, lift, flip)
    out = ours(inputs, kl=kl)
    if lift == 20:
        assert out.kl == math.inf and out.loss == math.inf and out.grad.isnan().all()
        return
    exact = truth(possible, kl=kl)
    torch.testing.assert_close(out.kl, exact.kl, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.loss, exact.loss, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.grad, exact.grad, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_huge_logits_keep_their_moments(dtype: torch.dtype, kl: str) -> None:
    """+-1e4: exponents underflow, but a KL of thousands of nats is a value like any other."""
    inputs = small(rows=2, dtype=dtype)._replace(mask=torch.ones(2))
    inputs.logits.mul_(1e4 / inputs.logits.abs().max())
    inputs.ref_logits.mul_(-1e4 / inputs.ref_logits.abs().max())
    assert truth(inputs, kl=kl).kl.max() > 1e3
    assert_as_accurate_as_eager(inputs, kl=kl)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_common_offset_of_all_logits_cancels(offset: float) -> None:
    inputs = small(rows=2)._replace(mask=torch.ones(2))
    assert_as_accurate_as_eager(inputs._replace(logits=inputs.logits + offset))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kl", KLS)
def test_growing_logits_rescale_the_sums(cut: Callable[[int], None], kl: str, splits: int) -> None:
    """Each tile's maximum is far above all before it in the policy, and far below in the reference."""
    cut(splits)
    inputs = small(2003, rows=1)._replace(mask=torch.ones(1))
    ramp = torch.linspace(-300, 300, 2003)
    grown = inputs._replace(logits=inputs.logits + ramp, ref_logits=inputs.ref_logits + ramp.flip(0))
    assert_as_accurate_as_eager(grown, kl=kl)


@pytest.mark.parametrize(
    ("side", "column", "value", "splits"),
    pairwise(["logits", "ref_logits"], [0, 700, 1002], [math.nan, math.inf], [1, 3]),
)
def test_nan_or_infinity_that_counts_is_not_hidden(
    cut: Callable[[int], None], side: str, column: int, value: float, splits: int
) -> None:
    cut(splits)
    inputs = small(rows=2)._replace(mask=torch.ones(2))
    getattr(inputs, side)[1, column] = value
    for kl in KLS:
        out = ours(inputs, kl=kl)
        assert out.loss.isnan()
        assert out.kl.isnan().tolist() == [False, True]
        assert out.nll.isnan().tolist() == [False, side == "logits"]
        assert out.grad[1].isnan().all()
        assert out.grad[0].isfinite().all()


@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("logit", [-1e4, -math.inf])
def test_a_nan_of_the_reference_is_not_hidden_where_the_policy_has_no_mass(logit: float, kl: str) -> None:
    inputs = small(rows=2)._replace(mask=torch.ones(2))
    inputs.labels[1] = 3
    inputs.logits[1, 700], inputs.ref_logits[1, 700] = logit, math.nan
    out = ours(inputs, kl=kl)
    assert out.kl.isnan().tolist() == [False, True]
    assert out.grad[1].isnan().all() and out.grad[0].isfinite().all()


# --- Memory layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shifted", "cut", "swapped", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_does_not_matter(dtype: torch.dtype, layout: str) -> None:
    """Equal but for the last bits: a thread adds up other columns of a row that starts elsewhere."""
    inputs = make(250, (2, 2), dtype=dtype)
    moved = inputs._replace(
        logits=strided(layout, inputs.logits),
        ref_logits=strided(layout, inputs.ref_logits),
        labels=inputs.labels.t().contiguous().t(),
    )
    there = Inputs(*(value.to(DEVICE) for value in moved))  # keeps the strides
    leaf = there.logits.detach().requires_grad_()
    out = quark_loss(leaf, *there[1:], impl="triton")
    out.loss.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for a, b in zip((*out, leaf.grad), ours(inputs), strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b, atol=2e-6, rtol=tolerance)


def tile(*tensors: Tensor) -> tuple[int, int, int]:
    """(E, UNIT, first) of tensors that are read or written together."""
    rows = [triton_kernels.rows_of(tensor) for tensor in tensors]
    assert None not in rows
    return tuple(triton_kernels._tile(list(tensors), rows))


def test_loads_are_wide_wherever_the_rows_allow_it() -> None:
    """16 bytes a load, after a head of single columns if rows start anywhere (UNIT 1)."""
    even, odd = torch.empty(3, 4, 1008), torch.empty(3, 4, 1003)
    assert tile(even, even) == (4, 4, 0)
    assert tile(even.half(), even.bfloat16()) == (8, 8, 0)
    assert tile(even.half(), even) == (4, 4, 0)
    assert tile(odd.half(), odd.half(), odd.half()) == (8, 1, 0)
    assert tile(odd[:, :-1].half(), odd[:, :-1].half()) == (8, 1, 0)
    assert tile(odd[:, :-1], odd[:, :-1], odd[:, :-1].contiguous()) == (1, 1, 0), "rows at other offsets"
    assert tile(even, odd) == (1, 1, 0)
    assert tile(even[..., 1:]) == (4, 1, 1), "the first row starts between two multiples of 16 bytes"
    assert tile(odd[:, 1:], odd[:, 1:]) == (4, 1, 3)
    assert tile(odd[:, 1:], odd[:, :-1]) == (1, 1, 0), "first rows at other offsets"
    memory = bytearray(4 * 1024)
    start = torch.frombuffer(memory, dtype=torch.float32).data_ptr() // 4 % 4
    between = torch.frombuffer(memory, dtype=torch.float32, offset=4 * ((5 - start) % 4), count=1008)
    assert tile(between.view(1, -1)) == (1, 1, 0), "nothing is read before the tensor's memory"


def slices(whole: Tensor) -> dict[str, Tensor]:
    """Views of (batch, time, columns) whose rows lie apart, or start between two multiples of 16 bytes."""
    return {
        "all but the last": whole[:, :-1],
        "all but the first": whole[:, 1:],
        "of one": whole[1],
        "fewer columns": whole[..., :-6],
        "time first": whole.transpose(0, 1),
    }


@pytest.mark.parametrize("name", slices(torch.empty(2, 3, 9)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_slice_and_of_its_gradient_are_moved_16_bytes_at_a_time(
    dtype: torch.dtype, name: str
) -> None:
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 3, 203, generator=g).to(dtype).to(DEVICE)
    ref = slices((whole + torch.randn(whole.shape, generator=g).to(DEVICE)).to(dtype))[name]
    z = slices(whole)[name]
    assert tile(z, ref, triton_kernels.new_gradient(z))[0] == 16 // z.itemsize
    labels = torch.randint(0, z.shape[-1], z.shape[:-1], generator=g).to(DEVICE)
    results = []
    for leaf, reference in ((z.clone(), ref.contiguous()), (whole.clone(), ref)):
        leaf.requires_grad_()
        logits = leaf * 1 if leaf.shape == z.shape else slices(leaf)[name]
        out = quark_loss(logits, reference, labels, impl="triton")
        (grad,) = torch.autograd.grad(out.loss, leaf)
        results.append((*out, grad if leaf.shape == z.shape else slices(grad)[name]))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # a thread adds up other columns
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), atol=2e-6, rtol=tolerance)


def test_a_gradient_follows_no_layout_that_wastes_memory_or_overlaps() -> None:
    room = torch.empty(4, 2, 1000)
    for logits in (room[:, 0], room[:1].expand(4, -1, -1), room.transpose(0, 2), room[:0]):
        assert triton_kernels.new_gradient(logits).is_contiguous()
    rows = torch.empty(6, 1008)[:, :1003]  # as the linear loss gives them room
    grad = triton_kernels.new_gradient(rows[:3])
    assert grad.stride() == (1008, 1) and grad.untyped_storage().nbytes() <= 4 * 3 * 1008


@pytest.mark.parametrize("vocab", [200, 203])  # 203: rows start at any remainder of 16 bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["logits", "ref_logits"])
def test_rows_of_a_whole_batch_may_be_one_expanded_view(vocab: int, dtype: torch.dtype, name: str) -> None:
    inputs = make(vocab, dtype=dtype, shape=(2, 3), extra=0)
    rows = {"logits": inputs.logits, "ref_logits": inputs.ref_logits}
    leaf = rows[name][:1].to(DEVICE).requires_grad_(name == "logits")

    def loss(view: Tensor) -> list[Tensor]:
        both = {key: view if key == name else tensor.to(DEVICE) for key, tensor in rows.items()}
        labels, mask = inputs.labels.to(DEVICE), inputs.mask.to(DEVICE)
        out = quark_loss(both["logits"], both["ref_logits"], labels, mask, impl="triton", **COEFFICIENTS)
        grad = torch.autograd.grad(out.loss, leaf) if leaf.requires_grad else ()
        return [*out, *grad]

    for one, same in zip(loss(leaf.expand(2, -1, -1)), loss(leaf.repeat(2, 1, 1)), strict=True):
        torch.testing.assert_close(one, same)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_writes_the_gradient_over_a_strided_view_and_nothing_else(
    cut: Callable[[int], None], dtype: torch.dtype, splits: int
) -> None:
    cut(splits)
    inputs = make(dtype=dtype, shape=(2, 2))._replace(mask=torch.tensor([[True, False], [True, True]]))
    width = inputs.logits.shape[-1]
    room = torch.full((2, 2, width + 13), math.nan, dtype=dtype, device=DEVICE)
    room[..., 2 : 2 + width] = inputs.logits
    whole = room.clone().requires_grad_() * 1
    logits = whole[..., 2 : 2 + width]
    rest = (value.to(DEVICE) for value in inputs[1:])
    quark_loss(logits, *rest, impl="triton", inplace=True).loss.backward()
    written = whole.detach().cpu()
    expected = ours(inputs).grad
    torch.testing.assert_close(written[..., 2 : 2 + width].double(), expected, atol=1e-8, rtol=2**-7)
    assert written[..., :2].isnan().all()
    assert written[..., 2 + width :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("column", [1, TILE, 2 * TILE + 7, 2002])
def test_in_place_parts_of_a_row_leave_its_label_to_one_of_them(
    cut: Callable[[int], None], column: int, dtype: torch.dtype
) -> None:
    """A likely label, whose gradient shows what its logit was taken for, in the head, each part, the tail."""
    cut(3)
    inputs = small(2003, rows=2, dtype=dtype)._replace(labels=torch.full((2,), column), mask=torch.ones(2))
    inputs.logits[:, column] = inputs.logits.amax(-1) + 2
    assert_as_accurate_as_eager(inputs, inplace=True)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_beyond_two_to_the_thirty_one(cut: Callable[[int], None], splits: int) -> None:
    """N * V passes 2^31 at 42,731 rows of GPT-2's vocabulary. Only the pages that are used cost memory."""
    cut(splits)
    inputs = small(64, rows=3, dtype=torch.bfloat16)._replace(mask=torch.ones(3))
    far = torch.empty(2**31 + 128, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (2**30 + 8, 1))
    far.copy_(inputs.logits)
    rest = [value.to(DEVICE) for value in inputs[1:3]]
    weights = torch.full((3,), 1 / 3, device=DEVICE)
    loss_value, *_ = triton_kernels.forward(far, *rest, weights, 64, 0.05, 0.06, "policy_ref", grad=far)
    expected = ours(inputs)
    torch.testing.assert_close(loss_value.cpu().double(), expected.loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(far.cpu().double(), expected.grad, atol=1e-8, rtol=2**-7)


# --- Autograd, torch.library, torch.compile ----------------------------------------------------


@pytest.mark.parametrize(("dtype", "inplace", "splits"), pairwise(DTYPES, [False, True], [1, 3]))
def test_incoming_scale_enters_before_the_rounding(
    cut: Callable[[int], None], dtype: torch.dtype, inplace: bool, splits: int
) -> None:
    """65536 / 25600 tokens: nearly all of an unscaled float16 gradient would underflow."""
    cut(splits)
    inputs = small(dtype=dtype, spread=1.0)
    tokens = {"normalizer": 25600.0}
    scaled, exact = ours(inputs, 65536.0, inplace=inplace, **tokens), truth(inputs, 65536.0, **tokens)
    unit = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-8 if ON_GPU else 2**-7}
    torch.testing.assert_close(scaled.grad, exact.grad, atol=1e-7, rtol=unit[dtype])
    if dtype == torch.float16:
        unscaled = ours(inputs, inplace=inplace, **tokens).grad[inputs.mask]
        assert (unscaled == 0).double().mean() > 0.3, "the case is chosen to underflow"
        assert ((scaled.grad == 0) & (exact.grad != 0)).double().mean() < 0.01


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_retained_graph_gives_the_same_gradient_twice(dtype: torch.dtype, inplace: bool) -> None:
    inputs = Inputs(*(value.to(DEVICE) for value in small(dtype=dtype)))
    leaf = inputs.logits.clone().requires_grad_()
    scaled = 2 * quark_loss(leaf * 1, *inputs[1:], impl="triton", inplace=inplace).loss
    first, second, third = (
        torch.autograd.grad(scaled, leaf, retain_graph=again)[0].clone() for again in (True, True, False)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_autocast_and_grad_scaler() -> None:
    inputs = Inputs(*(value.to(DEVICE) for value in make(301, shape=(4,), extra=0)))
    hidden = torch.randn(4, 16, device=DEVICE)
    grads = []
    for impl in ("eager", "triton"):
        torch.manual_seed(0)
        head = torch.nn.Linear(16, 301).to(DEVICE)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        with torch.autocast(DEVICE, dtype=torch.float16):
            out = quark_loss(head(hidden), *inputs[1:], impl=impl)
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        grads.append(head.weight.grad)
    assert grads[0].abs().max() > 0.01
    torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("operator", ["_one_pass", "_two_pass"])
def test_opcheck(operator: str, first: int) -> None:
    """Also of logits whose gradient does not start at a multiple of 16 bytes."""
    logits, ref_logits, labels, mask = (value.to(DEVICE)[first:] for value in small(33, rows=2 + first))
    logits = logits.detach()
    problem = (ref_logits, labels, mask / mask.sum(), 33, 0.05, 0.06, "policy_ref", "triton")
    torch.library.opcheck(getattr(loss, operator), (logits.requires_grad_(), *problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step_has_no_graph_break(dtype: torch.dtype) -> None:
    inputs = Inputs(*(value.to(DEVICE) for value in small(dtype=dtype, rows=3)))
    assert_compiles_whole(inputs, impl="triton")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # is a prototype
@pytest.mark.skipif(not ON_GPU, reason="only a GPU can be waited for")
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_gpu(dtype: torch.dtype, inplace: bool) -> None:
    inputs = Inputs(*(value.to(DEVICE) for value in small(dtype=dtype)))
    logits = inputs.logits.clone().requires_grad_() * 1
    try:
        torch.cuda.set_sync_debug_mode("error")
        quark_loss(logits, *inputs[1:], impl="triton", inplace=inplace).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- The choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_from_hidden_states_as_from_whole_logits(dtype: torch.dtype) -> None:
    """linear_quark_loss calls the kernels below autograd, in place, a chunk at a time."""
    inputs = test_linear.make((2, 4), dtype)
    there = test_linear.Inputs(*(value.to(DEVICE) for value in inputs))
    ours = test_linear.run(test_linear.chunked, there, chunk=3, impl="triton")
    eager = test_linear.run(test_linear.whole, there, impl="eager")
    rounding = 4 * torch.finfo(dtype).eps
    for name, value in eager.items():
        atol = rounding * value.abs().max().item() + SLACK
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol)
    assert eager["gradient of weight"].abs().max() > 1e-2


class Products(TorchDispatchMode):
    """Counts multiplications of whole tensors by PyTorch."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in ("aten::mul", "aten::mul_") and args[0].dim() > 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_hidden_states_only_a_scale_other_than_1_touches_the_gradients(dtype: torch.dtype) -> None:
    inputs = test_linear.make((2, 4), dtype)
    there = test_linear.Inputs(*(value.to(DEVICE) for value in inputs))
    found = {}
    for scale in (1.0, 0.3):
        leaves = {
            name: getattr(there, name).clone().requires_grad_() for name in ("hidden", "weight", "bias")
        }
        out = test_linear.chunked(there._replace(**leaves), chunk=3, impl="triton")
        with Products() as products:
            out.loss.backward(torch.full_like(out.loss, scale))
        assert products.count == 0, "it is the kernel's, which knows the scale"
        found[scale] = [leaf.grad.float() for leaf in leaves.values()]
    for once, scaled in zip(found[1.0], found[0.3], strict=True):
        # Of half precision each is rounded once, and what it is compared with, too.
        atol = torch.finfo(dtype).eps * once.abs().max().item() + 1e-12
        torch.testing.assert_close(scaled, 0.3 * once, rtol=0, atol=atol)
        assert once.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not ON_GPU, reason="waiting for the device can only be seen on one")
def test_from_hidden_states_nothing_waits_for_the_gpu_without_a_mask() -> None:
    inputs = test_linear.make((2, 4))._replace(mask=None)
    there = inputs._replace(**{k: v.to(DEVICE) for k, v in inputs._asdict().items() if v is not None})
    test_linear.run(test_linear.chunked, there, chunk=3)  # compiles
    leaf = there.weight.requires_grad_()
    try:
        torch.cuda.set_sync_debug_mode("error")
        test_linear.chunked(there, chunk=3).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad.isfinite().all()


def test_without_a_gpu_triton_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"takes CUDA tensors, not cpu; use .*TRITON_INTERPRET=1"):
        quark_loss(*small(), impl="triton")


def test_gpu_of_too_little_shared_memory_is_told_so_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooMuch:
        def __getitem__(self, grid: Any) -> Any:
            raise triton.OutOfResources(99_328, 65_536, "shared memory")

    monkeypatch.setattr(triton_kernels, "_row_kernel", TooMuch())
    with pytest.raises(UsageError, match=r"shared memory, 99328 bytes wanted, 65536 there; .*--impl eager"):
        quark_loss(*small(), impl="triton")


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler."), subprocess.CalledProcessError(1, "gcc x.c")]
)
def test_machine_without_a_compiler_is_told_so_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class NoLauncher:
        def __getitem__(self, grid: Any) -> Any:
            raise error

    monkeypatch.setattr(triton_kernels, "_row_kernel", NoLauncher())
    with pytest.raises(UsageError, match=r"cannot compile the launcher .*; install a C compiler"):
        quark_loss(*small(), impl="triton")


def test_float64_is_refused() -> None:
    inputs = small()
    with pytest.raises(ValueError, match=r"not torch\.float64; use impl='eager' or convert"):
        quark_loss(inputs.logits.double(), *inputs[1:], impl="triton")


@pytest.mark.skipif(not ON_GPU, reason="no CUDA tensors here")
def test_auto_takes_triton_for_cuda_tensors_and_eager_for_float64() -> None:
    logits, ref_logits = torch.zeros(1, 2, device="cuda"), torch.zeros(1, 2, device="cuda")
    assert loss._choose("auto", logits, ref_logits) == "triton"
    assert loss._choose("auto", logits.double(), ref_logits) == "eager"
