"""The fused loss against the equation in float64, and the pitfalls of its inputs.

Error budget: against float64, an implementation may err as much as eager PyTorch does on the same
inputs in the same dtype, plus `SLACK`. Both compute in float32 and round the gradient once to the
dtype of the logits, so eager's own error already holds the dtype's rounding; the slack is for
float32 sums in another order.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import LEVELS, in_a_new_process, run_again_at
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch_defaults import OTHERS, defaults

from quark_fast import _C
from quark_fast.ops import loss
from quark_fast.ops.loss import quark_loss
from quark_fast.ops.rows import rows_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["policy_ref", "ref_policy"]
KLS = [*DIRECTIONS, "sampled"]
IMPLEMENTATIONS = ["eager", "cpp"]
SLACK = 2e-6
# Not multiples of a vector or of the kernels' block (2048), one below and one above it; 1 = no sum.
VOCABULARIES = [1, 7, 252, 1003, 2049, 5003]


class Inputs(NamedTuple):
    logits: Tensor
    ref_logits: Tensor
    labels: Tensor
    mask: Tensor


class Result(NamedTuple):
    """What quark_loss gave, and the gradient of the logits, in float64 to compare."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    entropy: Tensor
    grad: Tensor


def make(
    vocab: int = 1003,
    shape: tuple[int, ...] = (3, 4),
    extra: int = 5,
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    seed: int = 0,
) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(*shape, vocab + extra, generator=g)
    ref_logits = logits[..., :vocab] + 0.5 * torch.randn(*shape, vocab, generator=g)
    labels = torch.randint(0, vocab, shape, generator=g)
    mask = torch.rand(shape, generator=g) > 0.3
    mask.view(-1)[:1] = True
    return Inputs(logits.to(dtype), ref_logits.to(dtype), labels, mask)


def run(inputs: Inputs, scale: float = 1.0, **options: object) -> Result:
    leaf = inputs.logits.clone().requires_grad_()
    # Not a leaf, so that in place is allowed; a copy, so that the inputs survive it.
    out = quark_loss(leaf.clone(), *inputs[1:], **options)
    (scale * out.loss).backward()
    assert leaf.grad.dtype == inputs.logits.dtype
    return Result(*(value.detach().double() for value in (*out, leaf.grad)))


def truth(inputs: Inputs, scale: float = 1.0, **options: object) -> Result:
    options = {**options, "impl": "eager", "inplace": False}
    return run(
        inputs._replace(logits=inputs.logits.double(), ref_logits=inputs.ref_logits.double()),
        scale,
        **options,
    )


def assert_as_accurate_as_eager(inputs: Inputs, **options: object) -> None:
    exact = truth(inputs, **options)
    eager = run(inputs, **{**options, "impl": "eager", "inplace": False})
    ours = run(inputs, **options)
    for name, x, e, t in zip(Result._fields, ours, eager, exact, strict=True):
        assert x.shape == t.shape
        error, allowed = (x - t).abs().max(), (e - t).abs().max() + SLACK * (1 + t.abs().max())
        if name == "grad":  # it holds kl_coef (log-ratio - KL): two numbers of the size of the KL
            allowed += 2**-23 * options.get("kl_coef", 0.05) * exact.kl.max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# --- The equation ------------------------------------------------------------------------------


@pytest.mark.parametrize("rise", [12, -12])
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_block_of_a_row_may_have_maxima_of_its_own(dtype: torch.dtype, kl: str, rise: int) -> None:
    inputs = make(9001, spread=1.0)
    ramp = torch.linspace(0, rise, inputs.logits.shape[-1])
    logits = (inputs.logits + ramp).to(dtype)
    reference = (inputs.ref_logits - 0.3 * ramp[:9001]).to(dtype)
    inputs = inputs._replace(logits=logits, ref_logits=reference)
    assert_as_accurate_as_eager(inputs, impl="cpp", kl=kl, kl_coef=0.3, entropy_coef=0.2)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_errs_no_more_than_eager(dtype: torch.dtype, kl: str, vocab: int, inplace: bool) -> None:
    assert_as_accurate_as_eager(
        make(vocab, dtype=dtype), impl="cpp", kl=kl, inplace=inplace, kl_coef=0.3, entropy_coef=0.2
    )


@pytest.mark.parametrize("kl", KLS)
def test_cpp_errs_no_more_than_eager_on_a_real_vocabulary(kl: str) -> None:
    # Long sums: what is added naively in float32 loses digits only here.
    assert_as_accurate_as_eager(make(50257, shape=(4,)), impl="cpp", kl=kl)


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_may_have_another_dtype(dtype: torch.dtype, ref_dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype)
    assert_as_accurate_as_eager(inputs._replace(ref_logits=inputs.ref_logits.to(ref_dtype)), impl="cpp")


@pytest.mark.parametrize("kl", DIRECTIONS)
def test_eager_is_the_textbook_equation(kl: str) -> None:
    """The oracle itself, against torch's own cross entropy, divergence and distribution."""
    logits, ref_logits, labels, mask = make(40)
    z, r = logits[..., :40].double(), ref_logits.double()
    out = quark_loss(logits.double(), r, labels, mask, kl=kl, impl="eager")
    policy, ref = (
        torch.distributions.Categorical(logits=z),
        torch.distributions.Categorical(logits=r),
    )
    pair = (policy, ref) if kl == "policy_ref" else (ref, policy)
    nll = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="none")
    divergence = torch.distributions.kl_divergence(*pair)
    per_token = nll.view_as(labels) + 0.05 * divergence - 0.06 * policy.entropy()
    torch.testing.assert_close(out.loss, per_token[mask].mean())
    torch.testing.assert_close(out.kl[mask], divergence[mask])
    torch.testing.assert_close(out.entropy[mask], policy.entropy()[mask])


@pytest.mark.parametrize("kl", KLS)
def test_eager_gradient_is_the_derivative(kl: str) -> None:
    logits, ref_logits, labels, mask = make(11, shape=(3,), extra=2)
    torch.autograd.gradcheck(
        lambda z: quark_loss(z, ref_logits.double(), labels, mask, kl=kl, impl="eager").loss,
        logits.double().requires_grad_(),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sampled_kl_has_the_exact_gradient_on_average(impl: str) -> None:
    """Over labels drawn from the policy; here the sum over all labels, each with its probability."""
    vocab = 9
    logits, ref_logits, _, _ = make(vocab, shape=(), extra=2)
    every = Inputs(
        logits.expand(vocab, -1).clone(),
        ref_logits.expand(vocab, -1).clone(),
        torch.arange(vocab),
        logits[:vocab].softmax(-1),
    )
    options = {"impl": impl, "entropy_coef": 0.0, "normalizer": 1.0}
    estimate, exact = (
        (run(every, kl=kl, kl_coef=1.0, **options).grad - run(every, kl_coef=0.0, **options).grad).sum(0)
        for kl in ("sampled", "policy_ref")
    )
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(estimate, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sampled_kl_is_half_the_squared_log_ratio_of_the_label(impl: str) -> None:
    logits, ref_logits, labels, mask = make(dtype=torch.bfloat16)
    out = quark_loss(logits, ref_logits, labels, mask, kl="sampled", impl=impl)
    p, q = (
        torch.distributions.Categorical(logits=x[..., :1003].double()).log_prob(labels)
        for x in (logits, ref_logits)
    )
    torch.testing.assert_close(out.kl.double(), (p - q).square() / 2 * mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_real_weights_and_normalizer(impl: str) -> None:
    """Micro-batches that share one normalizer add up to the whole batch."""
    inputs = make(shape=(4, 3))
    weights = torch.rand(4, 3)
    whole = run(inputs._replace(mask=weights), impl=impl)
    parts = [
        run(
            Inputs(*(value[rows] for value in inputs[:3]), weights[rows]),
            impl=impl,
            normalizer=weights.sum().item(),
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-60, 1e300])
def test_float64_weights_beyond_the_range_of_float32_are_divided_before_they_are_cast(
    size: float, impl: str
) -> None:
    inputs = make(9, shape=(3,))
    weights = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    expected = run(inputs._replace(mask=weights.float()), impl=impl)
    for options in ({}, {"normalizer": 4 * size}):
        found = run(inputs._replace(mask=weights * size), impl=impl, **options)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_reference(impl: str) -> None:
    inputs = make(dtype=torch.bfloat16)
    expected = truth(inputs, kl_coef=0.0)
    leaf = inputs.logits.clone().requires_grad_()
    out = quark_loss(leaf, None, inputs.labels, inputs.mask, kl_coef=0.0, vocab_size=1003, impl=impl)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(leaf.grad.double(), expected.grad, atol=1e-3, rtol=0)
    assert not out.kl.any()


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(1, 300),
    rows=st.integers(0, 6),
    extra=st.integers(0, 9),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    kl=st.sampled_from(KLS),
    shift=st.floats(-50, 50),
)
def test_bounds_and_shift_invariance(
    vocab: int,
    rows: int,
    extra: int,
    spread: float,
    seed: int,
    dtype: torch.dtype,
    kl: str,
    shift: float,
) -> None:
    inputs = make(vocab, (rows,), extra, dtype, spread, seed)
    out = quark_loss(*inputs, kl=kl, impl="cpp")
    assert (out.kl >= -1e-5).all()
    assert (out.nll >= -1e-5).all()
    assert (out.entropy >= -1e-5).all()
    assert (out.entropy <= math.log(vocab) + 1e-5).all()
    shifted = quark_loss(inputs.logits.float() + shift, *inputs[1:], kl=kl, impl="cpp")
    for a, b in zip(out, shifted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    same = quark_loss(inputs.ref_logits, *inputs[1:], kl=kl, impl="cpp")
    assert (same.kl.abs() <= 1e-6).all()


# --- Masks, labels, columns --------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_beyond_the_vocabulary_are_in_no_term(dtype: torch.dtype, impl: str, inplace: bool) -> None:
    inputs = make(dtype=dtype)
    before = run(inputs, impl=impl, inplace=inplace)
    inputs.logits[..., 1003:] = 1000.0
    after = run(inputs, impl=impl, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not after.grad[..., 1003:].any()
    assert after.grad[..., :1003].any()


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_token_is_never_read(dtype: torch.dtype, impl: str, inplace: bool) -> None:
    inputs = make(dtype=dtype)
    clean = run(inputs, impl=impl, inplace=inplace)
    inputs.logits[~inputs.mask] = math.nan
    inputs.ref_logits[~inputs.mask] = math.nan
    inputs.labels[~inputs.mask] = -100
    dirty = run(inputs, impl=impl, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    for value in dirty[1:]:
        assert not value[~inputs.mask].any()


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_all_masked_is_zero_and_not_nan(impl: str, inplace: bool) -> None:
    inputs = make()
    out = run(inputs._replace(mask=torch.zeros_like(inputs.mask)), impl=impl, inplace=inplace)
    assert all(not value.any() for value in out)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype: torch.dtype, impl: str) -> None:
    out = run(make(shape=(0,), dtype=dtype), impl=impl)
    assert out.loss == 0
    assert out.grad.shape == (0, 1008)


def test_one_row() -> None:
    assert_as_accurate_as_eager(make(shape=(1,)), impl="cpp")
    assert_as_accurate_as_eager(make(shape=()), impl="cpp")


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("label", [-100, -1, 1003, 1005, 10**12])
def test_label_outside_the_vocabulary_is_refused(label: int, impl: str, inplace: bool) -> None:
    """Also in the reward-token columns, which exist in the logits but are no target."""
    inputs = make()
    inputs.labels[0, 0] = label
    logits = inputs.logits.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match=rf"labels\[0\] = {label} .*not masked; mask it"):
        quark_loss(logits, *inputs[1:], impl=impl, inplace=inplace)
    assert torch.equal(logits, inputs.logits), "refused inputs must not be overwritten"


# --- Numbers at the edge -----------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_impossible_for_both_are_left_out(dtype: torch.dtype, kl: str, impl: str) -> None:
    """-inf in policy and reference is the same as a vocabulary without these tokens."""
    small = make(500, dtype=dtype, extra=0)
    # Spread over a whole block from the first column on, so that a block has no finite maximum.
    where = torch.arange(500) + 2500
    logits = torch.full((3, 4, 5003), -math.inf, dtype=dtype)
    ref_logits = logits.clone()
    logits[..., where], ref_logits[..., where] = small.logits, small.ref_logits
    big = run(Inputs(logits, ref_logits, small.labels + 2500, small.mask), kl=kl, impl=impl)
    expected = truth(small, kl=kl)
    for ours, exact in zip(big[:4], expected[:4], strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(big.grad[..., where], expected.grad, atol=tolerance, rtol=tolerance)
    assert big.grad.count_nonzero() <= expected.grad.count_nonzero()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kl", DIRECTIONS)
def test_minus_infinity_in_one_of_the_two(kl: str, impl: str) -> None:
    """0 log 0 = 0 where the first distribution has no mass; +inf where only the second has none."""
    logits, ref_logits, labels, _ = make(shape=(2,))
    labels[:] = 3
    logits[0, 100], ref_logits[1, 100] = -math.inf, -math.inf
    inputs = Inputs(logits, ref_logits, labels, torch.ones(2))
    finite, infinite = (0, 1) if kl == "policy_ref" else (1, 0)
    out = run(inputs, kl=kl, impl=impl)
    exact = truth(inputs, kl=kl)
    assert out.kl[infinite] == math.inf
    assert out.loss == math.inf
    torch.testing.assert_close(out.kl[finite], exact.kl[finite], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy, exact.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.nll, exact.nll, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.grad[finite], exact.grad[finite], atol=1e-6, rtol=0)
    if impl == "cpp":  # no step on an infinite loss goes unnoticed
        assert out.grad[infinite, :1003].isnan().all()


def one_impossible(vocab: int, kl: str, lift: float, flip: bool) -> tuple[Inputs, Inputs]:
    """A row of which one distribution, whose last third is `lift` nats above the rest, has a token of a logit
    of -40 that is impossible in the other; and the same with that token possible."""
    inputs = make(vocab, shape=(1,), extra=0, spread=1.0)._replace(mask=torch.ones(1))
    first, second = inputs.logits.clone(), inputs.ref_logits.clone()
    first[:, 100] = second[:, 100] = -40
    first[:, -vocab // 3 :] += lift
    impossible = second.clone()
    impossible[:, 100] = -math.inf

    def row(first: Tensor, second: Tensor) -> Inputs:
        policy, ref = (first, second) if kl == "policy_ref" else (second, first)
        labels = torch.tensor([vocab // 2])
        if flip:
            policy, ref, labels = policy.flip(-1), ref.flip(-1), vocab - 1 - labels
        return Inputs(policy, ref, labels, inputs.mask)

    return row(first, impossible), row(first, second)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("lift", [20.0, 80.0, 900.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kl", DIRECTIONS)
def test_the_order_of_columns_does_not_decide_whether_a_kl_is_infinite(
    kl: str, impl: str, lift: float, flip: bool
) -> None:
    """Beside the first columns alone the token has a mass of e^-40; beside all, of e^-60, or of none to speak
    of, and then it counts for nothing."""
    inputs, possible = one_impossible(6200, kl, lift, flip)
    out = run(inputs, kl=kl, impl=impl)
    if lift == 20:
        assert out.kl == math.inf and out.loss == math.inf
        return
    exact = truth(possible, kl=kl)
    torch.testing.assert_close(out.kl, exact.kl, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.loss, exact.loss, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(out.grad, exact.grad, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_infinite_kl_without_coefficient_stays_out_of_loss_and_gradient(impl: str, inplace: bool) -> None:
    inputs = make()
    inputs.ref_logits[..., 100] = -math.inf
    out = run(inputs, kl_coef=0.0, impl=impl, inplace=inplace)
    assert (out.kl[inputs.mask] == math.inf).all()
    assert out.loss.isfinite()
    assert out.grad.isfinite().all()


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits_keep_their_moments(dtype: torch.dtype, kl: str) -> None:
    """+-1e4: exponents underflow, but a KL of thousands of nats is a value like any other."""
    inputs = make(dtype=dtype)
    inputs.logits.mul_(1e4 / inputs.logits.abs().max())
    inputs.ref_logits.mul_(-1e4 / inputs.ref_logits.abs().max())
    exact = truth(inputs, kl=kl)
    assert exact.kl.max() > 1e3
    assert_as_accurate_as_eager(inputs, impl="cpp", kl=kl)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_common_offset_of_all_logits_cancels(offset: float) -> None:
    inputs = make()
    assert_as_accurate_as_eager(inputs._replace(logits=inputs.logits + offset), impl="cpp")


def test_growing_logits_rescale_the_sums() -> None:
    """Each block's maximum is far above all before it, so that every one rescales."""
    inputs = make(9001)
    ramp = torch.linspace(-300, 300, 9001)
    grown = inputs._replace(
        logits=torch.cat([inputs.logits[..., :9001] + ramp, inputs.logits[..., 9001:]], -1),
        ref_logits=inputs.ref_logits + ramp.flip(0),
    )
    for kl in KLS:
        assert_as_accurate_as_eager(grown, impl="cpp", kl=kl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slowly_growing_logits_reach_beyond_the_range_of_the_exponential(dtype: torch.dtype) -> None:
    """Each block is 7 above the one before, which no block notices; the last is 100 above the first."""
    inputs = make(30001, shape=(3,), extra=0, dtype=dtype, spread=0.2)
    ramp = torch.linspace(0, 100, 30001).to(dtype)
    for kl in KLS:
        for z, r in ((inputs.logits + ramp, inputs.ref_logits), (inputs.logits, inputs.ref_logits + ramp)):
            assert_as_accurate_as_eager(inputs._replace(logits=z, ref_logits=r), impl="cpp", kl=kl)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, 0x7F800000], ids=hex)
@pytest.mark.parametrize("column", [0, 700, 1002])
@pytest.mark.parametrize("side", ["logits", "ref_logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_or_infinity_that_counts_is_not_hidden(
    dtype: torch.dtype, side: str, column: int, bits: int
) -> None:
    """NaNs of any payload, as in uninitialised memory: the kernels work on bits."""
    inputs = make(shape=(3,), dtype=dtype)._replace(mask=torch.ones(3))
    if side == "ref_logits":
        inputs = inputs._replace(ref_logits=inputs.ref_logits.float())
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    getattr(inputs, side)[1, column] = value
    for kl in KLS:
        out = run(inputs, impl="cpp", kl=kl)
        assert out.loss.isnan()
        assert out.kl.isnan().tolist() == [False, True, False]
        assert out.nll.isnan().tolist() == [False, side == "logits", False]
        assert out.grad[1, :1003].isnan().all()
        assert out.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, 0x7F800001], ids=hex)
@pytest.mark.parametrize("logit", [-1e4, -math.inf])
@pytest.mark.parametrize("kl", ["policy_ref", "ref_policy"])
def test_a_nan_of_the_reference_is_not_hidden_where_the_policy_has_no_mass(
    kl: str, logit: float, bits: int
) -> None:
    """It then reaches the KL by the reference's sum alone, whose exponential works on bits."""
    inputs = make(shape=(3,))._replace(mask=torch.ones(3))
    inputs.labels[1] = 3
    inputs.logits[1, 700] = logit
    inputs.ref_logits[1, 700] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = run(inputs, impl="cpp", kl=kl)
    assert out.kl.isnan().tolist() == [False, True, False]
    assert out.grad[1, :1003].isnan().all() and out.grad[[0, 2]].isfinite().all()


def test_no_call_looks_for_triton_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(fullgraph=True) of torch 2.11 fails at a search for a package."""

    def search(name: str) -> None:
        raise AssertionError(f"{name} was looked for")

    monkeypatch.setattr("importlib.util.find_spec", search)
    monkeypatch.setattr(loss, "_backend", lambda name: SimpleNamespace(INTERPRETED=True))
    logits = torch.zeros(1, 3)
    assert loss._choose("auto", logits, logits) == "cpp"
    if loss.TRITON:
        assert loss._choose("triton", logits, logits) == "triton"


def test_half_precision_is_read_and_rounded_as_torch_does() -> None:
    """Every finite float16, subnormals too, as a logit; gradients from 0 to overflow."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    vocab = every.numel()
    # Around -60000: only one logit counts, unless all are brought near each other.
    for logits in (every, every / 8192):
        for scale in (1.0, 1e3, 1e9):
            inputs = Inputs(logits[None], logits.flip(0)[None], torch.tensor([5]), torch.ones(1))
            half = run(inputs, scale, impl="cpp", kl_coef=0.01)
            single = run(
                inputs._replace(logits=inputs.logits.float(), ref_logits=inputs.ref_logits.float()),
                scale,
                impl="cpp",
                kl_coef=0.01,
            )
            torch.testing.assert_close(half.kl, single.kl, atol=0, rtol=1e-6)
            # float32 applies the scale after its own rounding: at most one float16 step apart.
            expected = single.grad.half().double()
            torch.testing.assert_close(half.grad, expected, rtol=2**-10, atol=2**-24)
    assert vocab == 2 * 31 * 1024


# --- Memory layout -----------------------------------------------------------------------------


def strided(name: str, tensor: Tensor) -> Tensor:
    """The same values, of three dimensions, in another layout."""
    first, second, width = tensor.shape
    if name == "shifted":  # logits[:, :-1], the usual shift of a language model
        room = torch.full((first, second + 1, width), math.nan, dtype=tensor.dtype)
        room[:, :-1] = tensor
        return room[:, :-1]
    if name == "cut":  # one column slice of something wider
        room = torch.full((first, second, width + 13), math.nan, dtype=tensor.dtype)
        room[..., 2 : 2 + width] = tensor
        return room[..., 2 : 2 + width]
    if name == "swapped":  # time before batch in memory
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.transpose(0, 2).contiguous().transpose(0, 2)  # columns are not adjacent


@pytest.mark.parametrize("layout", ["shifted", "cut", "swapped", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_does_not_matter(dtype: torch.dtype, layout: str) -> None:
    inputs = make(dtype=dtype)
    moved = Inputs(
        strided(layout, inputs.logits),
        strided(layout, inputs.ref_logits),
        inputs.labels.t().contiguous().t(),
        inputs.mask.t().contiguous().t(),
    )
    assert not moved.logits.is_contiguous()
    assert (rows_of(moved.logits) is None) == (layout == "columns"), "only this one is copied"
    expected = run(inputs, impl="cpp")
    leaf = moved.logits.detach().requires_grad_()
    out = quark_loss(leaf, *moved[1:], impl="cpp")
    out.loss.backward()
    for a, b in zip((*out, leaf.grad), expected, strict=True):
        assert torch.equal(a.detach().double(), b)


def test_one_reference_for_a_whole_batch_may_be_expanded() -> None:
    inputs = make()
    row = inputs.ref_logits[:1]
    a = run(inputs._replace(ref_logits=row.expand(3, -1, -1)), impl="cpp")
    b = run(inputs._replace(ref_logits=row.repeat(3, 1, 1)), impl="cpp")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_writes_the_gradient_over_a_strided_view_and_nothing_else(
    dtype: torch.dtype,
) -> None:
    inputs = make(dtype=dtype)
    room = strided("cut", inputs.logits)._base
    outside = torch.ones_like(room, dtype=torch.bool)
    outside[..., 2 : 2 + inputs.logits.shape[-1]] = False
    leaf = room.clone().requires_grad_()
    whole = leaf * 1
    logits = whole[..., 2 : 2 + inputs.logits.shape[-1]]
    quark_loss(logits, *inputs[1:], impl="cpp", inplace=True).loss.backward()
    expected = run(inputs, impl="cpp").grad
    assert torch.equal(logits.detach().double(), expected)
    assert whole.detach()[outside].isnan().all()


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extra_memory_is_one_gradient_or_none(dtype: torch.dtype, inplace: bool) -> None:
    """Autograd would add zeros or a clone as large as the logits if it had the chance."""
    inputs = make(5003, shape=(32,), dtype=dtype)
    leaf = inputs.logits.clone().requires_grad_()
    logits = leaf + 0  # whose backward makes nothing
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        quark_loss(logits, *inputs[1:], impl="cpp", inplace=inplace).loss.backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert round(allocated / leaf.nbytes, 1) == (0 if inplace else 1)


def test_threads_do_not_change_a_bit() -> None:
    inputs = make(20_011, shape=(64,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_incoming_scale_enters_before_the_rounding(dtype: torch.dtype, inplace: bool) -> None:
    """A factor of 3 must not round twice: late scaling changes 29% of bfloat16 roundings."""
    inputs = make(dtype=dtype)
    ours = run(inputs, 3.0, impl="cpp", inplace=inplace).grad
    exact = truth(inputs, 3.0).grad
    once = exact.to(dtype).double()
    differing = (ours != once).double().mean()
    # float32 is scaled late on purpose (one more rounding of 2^-24); ties of the others may flip.
    assert differing < (1.0 if dtype == torch.float32 else 0.002)
    # float32: the roundings of a few operations, more of them on processors without FMA.
    rtol = max(torch.finfo(dtype).eps, 2**-20)
    torch.testing.assert_close(ours, exact, atol=1e-7, rtol=rtol)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_float16_gradient_does_not_underflow_under_a_loss_scale(inplace: bool) -> None:
    inputs = make(5003, dtype=torch.float16, spread=1.0)
    tokens = {"normalizer": 25600.0}  # of a large batch of which these rows are a part
    exact = truth(inputs, 65536.0, **tokens).grad[inputs.mask]
    ours = run(inputs, 65536.0, impl="cpp", inplace=inplace, **tokens).grad[inputs.mask]
    unscaled = run(inputs, impl="cpp", inplace=inplace, **tokens).grad[inputs.mask]
    assert (unscaled == 0).double().mean() > 0.5, "the case is chosen to underflow"
    assert ((ours == 0) & (exact != 0)).double().mean() < 0.01
    torch.testing.assert_close(ours, exact, atol=1e-7, rtol=2**-10)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retained_graph_gives_the_same_gradient_twice(dtype: torch.dtype, inplace: bool) -> None:
    inputs = make(dtype=dtype)
    leaf = inputs.logits.clone().requires_grad_()
    scaled = 2 * quark_loss(leaf * 1, *inputs[1:], impl="cpp", inplace=inplace).loss
    first, second, third = (
        torch.autograd.grad(scaled, leaf, retain_graph=again)[0].clone() for again in (True, True, False)
    )
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_gradients_accumulate_over_steps(inplace: bool) -> None:
    """The second backward adds into .grad: it must not be memory that we still use."""
    inputs = make()
    leaf = inputs.logits.clone().requires_grad_()
    for _ in range(3):
        quark_loss(leaf * 1, *inputs[1:], impl="cpp", inplace=inplace).loss.backward()
    expected = run(inputs, impl="cpp").grad
    torch.testing.assert_close(leaf.grad.double(), 3 * expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_refused_to_whoever_needs_the_old_logits(dtype: torch.dtype) -> None:
    """tanh saves its output for its own backward; a wrong gradient there would be silent."""
    inputs = make(dtype=dtype)
    leaf = inputs.logits.clone().requires_grad_()
    out = quark_loss(leaf.tanh(), *inputs[1:], impl="cpp", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_per_token_values_are_detached() -> None:
    inputs = make()
    for impl in IMPLEMENTATIONS:
        out = quark_loss(inputs.logits.requires_grad_(), *inputs[1:], impl=impl)
        assert out.loss.requires_grad
        assert not any(term.requires_grad for term in out[1:])


def test_second_derivative_is_refused() -> None:
    inputs = make()
    leaf = inputs.logits.clone().requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        for inplace in (False, True):
            out = quark_loss(leaf.to(dtype) * 1, *inputs[1:], impl="cpp", inplace=inplace)
            with pytest.raises(RuntimeError):
                (grad,) = torch.autograd.grad(out.loss**2, leaf, create_graph=True)
                grad.sum().backward()


TRANSFORMS = {
    "jvp": lambda f, z: jvp(f, (z,), (torch.randn_like(z),)),
    "grad": lambda f, z: grad(f)(z),
    "hessian": lambda f, z: hessian(f)(z),
    "grad of vmap": lambda f, z: grad(lambda q: vmap(f)(q.expand(2, *q.shape)).sum())(z),
    "vmap of grad": lambda f, z: vmap(grad(f))(z.expand(2, *z.shape)),
    "compiled jvp": lambda f, z: torch.compile(lambda q: jvp(f, (q,), (q,)), backend="aot_eager")(z),
}


# torch's own forward mode compiles some of its formulas by torch.jit.script.
OF_TORCH = "ignore:.torch.jit.script. is deprecated:DeprecationWarning"


@pytest.mark.filterwarnings(OF_TORCH)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kernels_refuse_derivatives_of_torch_func_and_say_what_has_them(transform: str) -> None:
    logits, *rest = make(9)
    differentiate = TRANSFORMS[transform]
    refused = r"logits is differentiated .* use quark_loss\(..., impl='eager'\)"
    with pytest.raises(RuntimeError, match=refused):
        differentiate(lambda z: quark_loss(z, *rest, impl="cpp").loss, logits)
    differentiate(lambda z: quark_loss(z, *rest, impl="eager").loss, logits)


@pytest.mark.filterwarnings(OF_TORCH)
def test_kernels_refuse_a_forward_mode_tangent_instead_of_losing_it() -> None:
    logits, *rest = make(9)
    tangent = torch.randn_like(logits)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits, tangent)
        found = forward_ad.unpack_dual(quark_loss(dual, *rest, impl="eager").loss).tangent
        with pytest.raises(RuntimeError, match="logits is differentiated"):
            quark_loss(dual, *rest, impl="cpp")
        quark_loss(logits, *rest, impl="cpp")  # what has no tangent is as ever
    leaf = logits.clone().requires_grad_()
    quark_loss(leaf, *rest).loss.backward()
    torch.testing.assert_close(found, (leaf.grad * tangent).sum())


def test_fake_tensors_have_a_fake_loss_and_gradient() -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 3, 10, requires_grad=True)
        labels = torch.empty(2, 3, dtype=torch.long)
        quark_loss(logits, torch.empty(2, 3, 10), labels).loss.backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape


def test_vmap_maps_a_kernel() -> None:
    logits, *rest = make(9)
    every = torch.stack([logits, logits.flip(0)])
    mapped = vmap(lambda z: quark_loss(z, *rest, impl="cpp").loss)(every)
    assert torch.equal(mapped, torch.stack([quark_loss(z, *rest, impl="cpp").loss for z in every]))


def test_no_grad_leaves_in_place_logits_alone() -> None:
    inputs = make()
    logits = inputs.logits.clone().requires_grad_() * 1
    with torch.no_grad():
        out = quark_loss(logits, *inputs[1:], impl="cpp", inplace=True)
    assert torch.equal(logits, inputs.logits)
    assert torch.equal(out.loss.double(), run(inputs, impl="cpp").loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    inputs = make(dtype=torch.float32, extra=0)
    hidden = torch.randn(3, 4, 16)
    grads = []
    for impl in IMPLEMENTATIONS:
        torch.manual_seed(0)
        head = torch.nn.Linear(16, 1003)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with torch.autocast("cpu", dtype=dtype):
            logits = head(hidden)
            assert logits.dtype == dtype
            out = quark_loss(logits, *inputs[1:], impl=impl)
        scaler.scale(out.loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        grads.append(head.weight.grad)
    assert grads[0].abs().max() > 0.01
    torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-2)


# --- torch.library and torch.compile -----------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", ["_one_pass", "_two_pass"])
def test_opcheck(operator: str, dtype: torch.dtype, requires_grad: bool) -> None:
    logits, ref_logits, labels, mask = make(33, shape=(2, 3), dtype=dtype)
    weights = mask / mask.sum()
    problem = (ref_logits, labels, weights, 33, 0.05, 0.06, "policy_ref", "cpp")
    torch.library.opcheck(getattr(loss, operator), (logits.requires_grad_(requires_grad), *problem))


def test_opcheck_backward() -> None:
    logits, ref_logits, labels, mask = make(33, shape=(2, 3))
    problem = (logits, ref_logits, labels, mask / mask.sum(), 33, 0.05, 0.06, "policy_ref", "cpp")
    stats = loss._two_pass(*problem)[-1]
    torch.library.opcheck(loss._two_pass_backward, (torch.tensor(2.0), stats, *problem))


def assert_compiles_whole(inputs: Inputs, **options: object) -> None:
    """A step, from hidden states on, compiles without a graph break and gives what it gives uncompiled."""
    like = {"dtype": inputs.logits.dtype, "device": inputs.logits.device}
    hidden = torch.randn(*inputs.labels.shape, 16, **like)
    weight = torch.randn(16, inputs.logits.shape[-1], **like, requires_grad=True)

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = quark_loss(hidden @ weight, *inputs[1:], **options)
        return out.loss * 2, out.kl

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value, divergence = function(hidden, weight)
        (grad,) = torch.autograd.grad(value, weight)
        results.append((value.detach(), divergence, grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step_has_no_graph_break(dtype: torch.dtype, inplace: bool, impl: str) -> None:
    assert_compiles_whole(make(dtype=dtype, extra=0), impl=impl, inplace=inplace)


def test_compiled_step_takes_a_coefficient_that_changes() -> None:
    # As the one that holds the KL at a value does: torch.compile makes a symbol of a float that changes.
    logits, *rest = make(9)

    def step(logits: Tensor, kl_coef: float) -> Tensor:
        return quark_loss(logits, *rest, kl_coef=kl_coef).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for kl_coef in (0.05, 0.06, 0.07):
        torch.testing.assert_close(compiled(logits, kl_coef), step(logits, kl_coef))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_step_takes_a_normalizer_that_changes(impl: str) -> None:
    # As the number of tokens of a batch does.
    inputs = make(9)

    def step(logits: Tensor, normalizer: float) -> Tensor:
        return quark_loss(logits, *inputs[1:], normalizer=normalizer, impl=impl).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for normalizer in (7.0, 8.5, 9.25):
        torch.testing.assert_close(compiled(inputs.logits, normalizer), step(inputs.logits, normalizer))


# --- The caller's defaults ---------------------------------------------------------------------


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_callers_default_dtype_and_device_change_nothing(
    impl: str, inplace: bool, other: torch.dtype | str
) -> None:
    for dtype in DTYPES:
        inputs = make(33, dtype=dtype)
        expected = run(inputs, 3.0, impl=impl, inplace=inplace)
        with defaults(other):
            ours = run(inputs, 3.0, impl=impl, inplace=inplace)
        for one, two in zip(ours, expected, strict=True):
            assert torch.equal(one, two)


# --- Errors ------------------------------------------------------------------------------------


def fails(match: str, change: dict[str, object], **options: object) -> object:
    """A case of wrong input: what is changed of the inputs, the options, and what the error says."""
    return pytest.param(change, options, match, id=match)


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        fails("kl = 'forward'", {}, kl="forward"),
        fails("impl = 'cuda'", {}, impl="cuda"),
        fails("ref_logits requires grad", {"ref_logits": torch.ones(3, 4, 9, requires_grad=True)}),
        fails("kl_coef = 0.05 needs ref_logits", {"ref_logits": None}),
        fails("pass vocab_size=", {"ref_logits": None}, kl_coef=0),
        fails("logits has 7 columns for a base vocabulary of 9", {"logits": torch.ones(3, 4, 7)}),
        fails("has 9 columns for a base vocabulary of 10", {}, vocab_size=10),
        fails("does not fit labels of shape", {"labels": torch.zeros(3, 5, dtype=torch.long)}),
        fails("ref_logits of shape", {"ref_logits": torch.ones(4, 9)}),
        fails("mask of shape", {"mask": torch.ones(4)}),
        fails("labels are torch.float32", {"labels": torch.zeros(3, 4)}),
        fails("pass floating-point logits", {"logits": torch.ones(3, 4, 9, dtype=torch.long)}),
        fails("normalizer = 0", {}, normalizer=0),
        fails("normalizer = nan", {}, normalizer=math.nan),
        fails("normalizer = inf", {}, normalizer=math.inf),
        fails("not torch.float64", {"logits": torch.ones(3, 4, 9).double()}, impl="cpp"),
        fails("a leaf", {"logits": torch.ones(3, 4, 9, requires_grad=True)}, inplace=True),
        fails(
            "some of them share their memory",
            {"logits": (torch.ones(3, 4, 1, requires_grad=True) * 1).expand(3, 4, 9)},
            inplace=True,
        ),
        fails(
            "strides .0, 9, 1.: some of them",
            {"logits": (torch.ones(1, 4, 9, requires_grad=True) * 1).expand(3, 4, 9)},
            inplace=True,
        ),
        fails("kl_coef = nan", {}, kl_coef=math.nan),
        fails("entropy_coef = inf", {}, entropy_coef=math.inf),
        fails("the mask adds up to nan", {"mask": torch.full((3, 4), math.nan)}),
        fails("the mask adds up to inf", {"mask": torch.full((3, 4), 1e38)}),
        fails("weights below 0, down to -1", {"mask": torch.tensor([1.0, -1.0, 0.0, 0.0]).expand(3, 4)}),
        fails("weight of token 0 .* is not finite", {"mask": torch.full((3, 4), math.inf)}, normalizer=2.0),
        fails("mask is torch.complex64", {"mask": torch.ones(3, 4, dtype=torch.complex64)}),
        fails("logits is nested or of layout torch.sparse", {"logits": torch.ones(3, 4, 9).to_sparse()}),
        fails("labels is on meta", {"labels": torch.zeros(3, 4, dtype=torch.long, device="meta")}),
    ],
)
def test_wrong_input_is_named(
    change: dict[str, Tensor | None], options: dict[str, object], match: str
) -> None:
    inputs = {
        "logits": torch.ones(3, 4, 9),
        "ref_logits": torch.ones(3, 4, 9),
        "labels": torch.zeros(3, 4, dtype=torch.long),
        "mask": torch.ones(3, 4),
    }
    with pytest.raises(ValueError, match=match):
        quark_loss(**(inputs | change), **options)


@pytest.mark.parametrize("change", [{"logits": [1.0]}, {"mask": [True]}, {"labels": 1}])
def test_argument_of_another_type_altogether_is_a_type_error(change: dict[str, object]) -> None:
    inputs: dict[str, object] = make()._asdict()
    with pytest.raises(TypeError, match="pass a tensor"):
        quark_loss(**(inputs | change))
    with pytest.raises(TypeError, match="pass a whole number"):
        quark_loss(**inputs, vocab_size=5.0)


def test_negated_view_is_read_as_its_values_and_never_written_to() -> None:
    # What lies in memory are its values negated; torch negates them when an operator needs them.
    inputs = make(9)
    logits = torch._neg_view(inputs.logits.clone().requires_grad_() * -1)
    assert logits.is_neg()
    assert torch.allclose(quark_loss(logits, *inputs[1:]).loss, quark_loss(*inputs).loss)
    with pytest.raises(ValueError, match="negated view"):
        quark_loss(logits, *inputs[1:], inplace=True)


def test_in_place_never_writes_over_a_parameter_through_a_view() -> None:
    _, ref, labels, _ = make(9, shape=(6,), extra=0)
    parameter = torch.nn.Parameter(torch.randn(6, 9))
    before = parameter.detach().clone()
    with torch.no_grad():
        made_without_grad = parameter[:6]
    leaf = torch.randn(6, 9)[:6].requires_grad_()  # a view itself, of a tensor that has no gradient
    views = [parameter[:6], parameter.view(2, 3, 9)[:].view(6, 9), made_without_grad, leaf[:6]]
    for logits in [*views, parameter.unsqueeze(0).unbind(0)[0]]:
        with pytest.raises(ValueError, match=r"overwrite logits that are a (view of a )?leaf"):
            quark_loss(logits, ref, labels, inplace=True)
    assert torch.equal(parameter, before)
    quark_loss((parameter * 1)[:6], ref, labels, inplace=True).loss.backward()
    with torch.no_grad():  # where no gradient is wanted nothing is written
        quark_loss(parameter[:6], ref, labels, inplace=True)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negated_views_of_the_reference_and_the_labels_are_read_as_their_values(
    dtype: torch.dtype, inplace: bool
) -> None:
    inputs = make(9, dtype=dtype)
    negated = inputs._replace(
        ref_logits=torch._neg_view(-inputs.ref_logits), labels=torch._neg_view(-inputs.labels)
    )
    assert negated.ref_logits.is_neg() and negated.labels.is_neg()
    pairs = zip(run(negated, inplace=inplace), run(inputs, inplace=inplace), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("keep", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_may_be_made_under_inference_mode(
    dtype: torch.dtype, impl: str, inplace: bool, keep: bool
) -> None:
    inputs = make(33, dtype=dtype)
    options = {"impl": impl, "inplace": inplace}
    with torch.inference_mode():
        made = inputs._replace(**{name: getattr(inputs, name).clone() for name in Inputs._fields[1:]})
    assert made.ref_logits.is_inference() and made.labels.is_inference()
    leaf = inputs.logits.clone().requires_grad_()
    out = quark_loss(leaf.clone(), *made[1:], **options)
    (3 * out.loss).backward(retain_graph=keep)
    expected = run(inputs, 3.0, **options).grad
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=0, atol=0)
    if keep:
        (3 * out.loss).backward()
        torch.testing.assert_close(leaf.grad.double(), 2 * expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        (lambda z: z[:1].expand(4, 3, 3, 8), "share their memory"),
        (lambda z: z.transpose(-1, -2), "the columns of a row do not lie side by side"),
        (lambda z: z[:, :2, :2], "three or more of their leading dimensions"),
    ],
)
def test_in_place_says_why_it_cannot_write_to_these_strides(
    cut: Callable[[Tensor], Tensor], why: str
) -> None:
    logits = cut((torch.ones(4, 3, 3, 9, requires_grad=True) * 1)[..., :8])
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    options = {"kl_coef": 0.0, "vocab_size": 1}
    with pytest.raises(ValueError, match=f"of shape .* and strides .*: .*{why}.*; pass inplace=False"):
        quark_loss(logits, None, labels, inplace=True, **options)
    quark_loss(logits, None, labels, **options)


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_in_place_never_writes_over_the_reference(shift: int) -> None:
    inputs = make(9, shape=(12,))
    memory = (torch.randn(14, 14).requires_grad_() * 1)[:, :14]
    logits, ref = memory[1:13], memory.detach()[1 + shift : 13 + shift]
    with pytest.raises(ValueError, match="write over ref_logits"):
        quark_loss(logits, ref, inputs.labels, inplace=True)
    apart = memory[:6], memory.detach()[6:12]
    quark_loss(*apart, inputs.labels[:6], inplace=True).loss.backward()


# What Python hands over by address: the memory of 6 rows of 5, and numbers that claim other things.
ROWS = {"inner": 6, "outer_stride": 0, "inner_stride": 5, "elements": 30}


@pytest.mark.parametrize(
    ("rows", "problem", "match"),
    [
        ({"elements": 29}, {}, "logits: rows reach beyond the 29 elements"),
        ({"inner_stride": 6}, {}, "reach beyond"),
        ({"inner": 3, "outer_stride": 2**62}, {}, "reach beyond"),
        ({"inner": 2, "outer_stride": 2**63 - 1, "inner_stride": 2**63 - 1}, {}, "reach beyond"),
        ({"inner": 0}, {}, "cannot be walked"),
        ({"inner": -3}, {}, "cannot be walked"),
        ({"inner_stride": -5}, {}, "cannot be walked"),
        ({"inner": 4}, {}, "not whole groups of 4"),
        ({"data": 0}, {}, "logits has no memory"),
        ({"offset": 2}, {}, "multiple of its element's size"),
        ({}, {"vocab": 0}, "for a vocabulary of 0"),
        ({}, {"vocab": 6}, "for a vocabulary of 6"),
        ({}, {"width": 2**61}, "cannot be"),
        ({}, {"width": 6}, "reach beyond"),
        ({}, {"labels": np.full(6, 5)}, r"labels\[0\] = 5"),
        ({}, {"labels": np.full(6, -(2**63))}, "outside the base vocabulary"),
        ({}, {"labels": np.zeros(5, np.int64)}, "5 labels but 6 weights"),
        ({}, {"weights": np.full(6, np.inf, np.float32)}, "not finite"),
        ({}, {"kl": "nonsense"}, "kl = 'nonsense'"),
        ({}, {"nll": np.zeros(5, np.float32)}, "nll has 5 values for 6 rows"),
        ({}, {"stats": np.zeros((6, 6), np.float32)}, "stats has 36 values"),
        ({}, {"grad": {"dtype": "bfloat16"}}, "not of the dtype"),
        ({}, {"grad": {"inner_stride": 4}}, "the gradient overlap"),
        ({}, {"grad": {"inner": 2, "outer_stride": 5}}, "the gradient overlap"),
        ({}, {"grad": {"elements": 20}}, "the gradient: rows reach beyond"),
    ],
)
def test_cpp_refuses_numbers_that_do_not_fit_the_memory(
    rows: dict[str, int], problem: dict[str, object], match: str
) -> None:
    logits, ref, grad = (np.zeros((6, 5), np.float32) for _ in range(3))

    def rows_of(array: np.ndarray, **change: object) -> _C.Rows:
        offset = change.pop("offset", 0)
        return _C.Rows(**({"data": array.ctypes.data + offset, "dtype": "float32", **ROWS} | change))

    given = {"labels": np.zeros(6, np.int64), "weights": np.ones(6, np.float32), "vocab": 5, "width": 5}
    given |= {"kl": "policy_ref", "kl_coef": 0.1, "entropy_coef": 0.1, **problem}
    out = {name: given.pop(name, np.zeros(6, np.float32)) for name in ("nll", "kl_out", "entropy")}
    stats = given.pop("stats", np.zeros((6, _C.STATS_PER_ROW), np.float32))
    grad_rows = rows_of(grad, **given.pop("grad", {}))
    with pytest.raises(ValueError, match=match):
        made = _C.Problem(rows_of(logits, **rows), rows_of(ref), **given)
        _C.quark_loss_forward(made, *out.values(), stats, grad_rows, 1)
    assert not grad.any() and not stats.any(), "something was written"
    if "kl" not in problem and "labels" not in problem and not {"nll", "stats"} & problem.keys():
        with pytest.raises(ValueError, match=match):
            _C.quark_loss_backward(made, stats, 1.0, grad_rows, 1)


def test_cpp_takes_no_converted_copy_of_what_it_writes() -> None:
    logits = np.zeros((6, 5), np.float32)
    rows = _C.Rows(data=logits.ctypes.data, dtype="float32", **ROWS)
    labels, weights = np.zeros(6, np.int64), np.ones(6, np.float32)
    for bad in ({"labels": labels.astype(np.int32)}, {"weights": weights.astype(np.float64)}):
        with pytest.raises(TypeError):
            _C.Problem(rows, None, **({"labels": labels, "weights": weights} | bad), **OPTIONS)
    problem = _C.Problem(rows, None, labels, weights, **OPTIONS)
    fine, stats = np.zeros(6, np.float32), np.zeros((6, _C.STATS_PER_ROW), np.float32)
    fixed = np.zeros(6, np.float32)
    fixed.setflags(write=False)
    for bad in (np.zeros(6), np.zeros(12, np.float32)[::2]):
        with pytest.raises(TypeError):
            _C.quark_loss_forward(problem, bad, fine, fine, stats, None, 1)
    with pytest.raises(ValueError, match="not writeable"):
        _C.quark_loss_forward(problem, fixed, fine, fine, stats, None, 1)


OPTIONS = {"vocab": 5, "width": 5, "kl": "policy_ref", "kl_coef": 0.0, "entropy_coef": 0.0}


def test_float64_is_computed_in_float64() -> None:
    inputs = make()
    a = quark_loss(inputs.logits.double(), *inputs[1:])
    assert a.loss.dtype == torch.float64


# --- Instruction-set levels --------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine(level: str) -> None:
    """The accuracy and the pitfalls again, with the kernels of one level."""
    chosen = "(more_than_eager and (1003 or 2049) and fresh) or infinity or huge or growing or half"
    run_again_at(level, __file__, chosen, "--noconftest")


def test_unknown_level_is_refused() -> None:
    result = in_a_new_process("avx9", "-c", "from quark_fast import _C; print(_C.isa())")
    assert result.returncode != 0
    assert "QUARK_FAST_ISA=avx9 is not a level of this build" in result.stderr


@pytest.mark.parametrize("impl", ["eager", "cpp"])
def test_weights_below_0_need_a_normalizer(impl):
    """Centred advantages add up to what rounding leaves of them, by which the loss would be divided."""
    torch.manual_seed(0)
    logits, labels, advantages = torch.randn(64, 9), torch.randint(9, (64,)), torch.randn(64)
    advantages -= advantages.mean()
    given = {"kl_coef": 0.0, "vocab_size": 9, "impl": impl}
    with pytest.raises(ValueError, match=r"weights below 0, down to -\d.*give normalizer"):
        quark_loss(logits, None, labels, advantages, **given)
    found = quark_loss(logits, None, labels, advantages, normalizer=64, entropy_coef=0.0, **given)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found.loss, (advantages * nll).sum() / 64)


@pytest.mark.parametrize("dims", [(0, 0, None), (0, 0, 0)])
def test_eager_is_mapped_over_labels_and_masks_too(dims):
    torch.manual_seed(0)
    every = torch.randn(3, 4, 9), torch.randint(9, (3, 4)), torch.rand(3, 4)
    given = [one if dim == 0 else one[0] for one, dim in zip(every, dims, strict=True)]

    def loss(logits, labels, mask):
        return quark_loss(logits, None, labels, mask, kl_coef=0.0, vocab_size=9, impl="eager").loss

    found = torch.vmap(torch.func.grad(loss), in_dims=dims)(*given)
    for i, gradient in enumerate(found):
        of_one = [one[i] if dim == 0 else one for one, dim in zip(given, dims, strict=True)]
        torch.testing.assert_close(gradient, torch.func.grad(loss)(*of_one))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_loss_that_no_gradient_reaches_gives_none(dtype, inplace):
    leaf = torch.randn(3, 9, dtype=dtype, requires_grad=True)
    given = {"kl_coef": 0.0, "vocab_size": 9, "impl": "cpp", "inplace": inplace}
    out = quark_loss(leaf * 1, None, torch.zeros(3, dtype=torch.long), **given)
    (NoGradient.apply(out.loss) + leaf.sum().float()).backward()
    torch.testing.assert_close(leaf.grad, torch.ones_like(leaf))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, which interprets
def test_coefficients_may_be_numbers_of_numpy_in_place_too():
    leaf, labels = torch.randn(3, 9, requires_grad=True), torch.zeros(3, dtype=torch.long)
    out = quark_loss(
        leaf * 1, torch.randn(3, 9), labels, kl_coef=np.float32(0.5), entropy_coef=np.float64(0.25),
        impl="triton", inplace=True,
    )  # fmt: skip
    out.loss.backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "cpp"])
def test_a_nan_of_the_reference_is_in_the_gradient(impl):
    leaf, reference = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    reference[1, 3] = torch.nan
    quark_loss(leaf, reference, torch.zeros(2, dtype=torch.long), kl="ref_policy", impl=impl).loss.backward()
    assert leaf.grad[0].isfinite().all() and leaf.grad[1].isnan().all()
