"""The loss from hidden states against float64 eager `quark_loss` of whole logits, and its own pitfalls.

Error budget: against float64, `linear_quark_loss` may err as much as eager `quark_loss` of whole logits does
on the same hidden states and weights in the same dtype, plus `SLACK`. Both round the logits and the gradients
to the dtype, so eager's own error already holds that; but a rounding of a gradient may fall on the other
side, and each chunk has its own, so half a unit of the largest gradient's last place is allowed beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from pairwise import pairwise
from test_loss import fails
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch_defaults import OTHERS, defaults

from quark_fast.ops import linear as module
from quark_fast.ops.contrast import ContrastWeights, contrast_loss
from quark_fast.ops.linear import linear_contrast_loss, linear_quark_loss
from quark_fast.ops.loss import quark_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KLS = ["policy_ref", "ref_policy", "sampled"]
IMPLEMENTATIONS = ["eager", "cpp"]
# float32 sums in another order: of up to 1003 terms, of the size of the result. The rest is eager's own.
SLACK = 4e-6
VOCABULARY, COLUMNS = 1003, 1010
STATES = ("hidden", "weight", "bias")


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor
    mask: Tensor
    bias: Tensor
    ref_bias: Tensor


def make(shape: tuple[int, ...] = (5, 61), dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """305 rows; a reference of another width; logits of size 2, so that some tokens are near certain."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).to(dtype)

    mask = torch.rand(shape, generator=g) > 0.3
    mask.view(-1)[:1] = True
    return Inputs(
        normal(*shape, 24),
        (0.4 * normal(COLUMNS, 24)).to(dtype),
        normal(*shape, 16),
        (0.5 * normal(VOCABULARY, 16)).to(dtype),
        torch.randint(0, VOCABULARY, shape, generator=g),
        mask,
        normal(COLUMNS),
        normal(VOCABULARY),
    )


def whole(inputs: Inputs, **options: Any) -> Any:
    """quark_loss of whole logits."""
    hidden, weight, ref_hidden, ref_weight, labels, mask, bias, ref_bias = inputs
    return quark_loss(
        linear(hidden, weight, bias), linear(ref_hidden, ref_weight, ref_bias), labels, mask, **options
    )


def chunked(inputs: Inputs, **options: Any) -> Any:
    return linear_quark_loss(*inputs[:6], bias=inputs.bias, ref_bias=inputs.ref_bias, **options)


def run(
    loss: Callable[..., Any],
    inputs: Inputs,
    scale: float = 1.0,
    wanted: tuple[str, ...] = STATES,
    **options: Any,
) -> dict[str, Tensor]:
    """Loss, terms and gradients, in float64 to compare."""
    leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in wanted}
    out = loss(inputs._replace(**leaves), **options)
    (scale * out.loss).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == getattr(inputs, name).dtype
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double() for name, value in (out._asdict() | grads).items()}


def truth(inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    wide = inputs._replace(
        **{k: v.double() for k, v in inputs._asdict().items() if v.is_floating_point() and k != "mask"}
    )
    return run(whole, wide, **{**options, "impl": "eager"})


def assert_as_accurate_as_eager(inputs: Inputs, chunk: int | None = None, **options: Any) -> None:
    exact = truth(inputs, **options)
    eager = run(whole, inputs, **{**options, "impl": "eager"})
    ours = run(chunked, inputs, chunk=chunk, **options)
    assert ours.keys() == exact.keys()
    for name, t in exact.items():
        error, allowed = (ours[name] - t).abs().max(), (eager[name] - t).abs().max()
        is_gradient = name.startswith("gradient")
        allowed += SLACK * (t.abs().max() if is_gradient else 1 + t.abs().max())
        if is_gradient:
            allowed += torch.finfo(inputs.hidden.dtype).eps / 2 * t.abs().max()
        assert ours[name].shape == t.shape
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        # One bad number in a thousand would hide in the maximum, but a general loss of digits does not here.
        assert (ours[name] - t).norm() <= 1.1 * (eager[name] - t).norm() + SLACK * (1 + t.norm()), name


# --- The equation ------------------------------------------------------------------------------


# Chunks of one row, not a divisor of the rows, two chunks and a row, all at once, the default. That every
# kernel is right for every dtype and divergence is seen in test_loss.py.
@pytest.mark.parametrize(
    ("dtype", "kl", "chunk", "impl"), pairwise(DTYPES, KLS, [1, 37, 104, 1000, None], IMPLEMENTATIONS)
)
def test_errs_no_more_than_eager_on_whole_logits(
    dtype: torch.dtype, kl: str, chunk: int | None, impl: str
) -> None:
    # In half precision each chunk's part of the weight's gradient is rounded: of 305 parts the errors
    # add up to more than the one rounding of the whole, as nobody would choose chunks of one row.
    if chunk == 1 and dtype != torch.float32:
        chunk = 19
    assert_as_accurate_as_eager(make(dtype=dtype), chunk, kl=kl, impl=impl, kl_coef=0.3, entropy_coef=0.2)


def test_float64_stays_float64() -> None:
    inputs = make(dtype=torch.float64)
    ours, exact = run(chunked, inputs, chunk=50), truth(inputs)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


def test_gradient_is_the_derivative() -> None:
    """By differences, not by anybody's formula."""
    inputs = make((4,), dtype=torch.float64)
    small = inputs._replace(
        weight=inputs.weight[:12],
        bias=inputs.bias[:12],
        ref_weight=inputs.ref_weight[:11],
        ref_bias=inputs.ref_bias[:11],
        labels=inputs.labels % 11,
    )
    leaves = [getattr(small, name).requires_grad_() for name in STATES]
    torch.autograd.gradcheck(
        lambda *t: chunked(small._replace(**dict(zip(STATES, t, strict=True))), chunk=2).loss, leaves
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_half_precision_weight_gradient_does_not_grow_worse_with_more_chunks(impl: str) -> None:
    """Summed in bfloat16, 40 chunks would lose what each adds to a large total."""
    g = torch.Generator().manual_seed(3)
    inputs = make((1280,), torch.bfloat16)
    # All labels the same: every chunk adds to the same row of the weight, in the same direction.
    inputs = inputs._replace(
        hidden=(1 + 0.1 * torch.randn(1280, 24, generator=g)).bfloat16(), labels=torch.full((1280,), 7)
    )
    exact = truth(inputs)["gradient of weight"][7]
    ours = run(chunked, inputs, chunk=32, impl=impl)["gradient of weight"][7]
    # bfloat16 logits move p by up to 2^-7 of themselves; sums in bfloat16 would be off by 5%.
    assert ((ours - exact).abs() / exact.abs()).max() < 0.012


def test_without_bias_and_without_reference() -> None:
    inputs = make()
    hidden, weight = (t.clone().requires_grad_() for t in inputs[:2])
    options = {"kl_coef": 0.0, "vocab_size": VOCABULARY, "entropy_coef": 0.1}
    out = linear_quark_loss(hidden, weight, None, None, inputs.labels, inputs.mask, chunk=64, **options)
    out.loss.backward()
    wide = [t.double().requires_grad_() for t in inputs[:2]]
    exact = quark_loss(linear(*wide), None, inputs.labels, inputs.mask, impl="eager", **options)
    exact.loss.backward()
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-6, atol=0)
    for leaf, other in zip((hidden, weight), wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-8)
    assert not out.kl.any()


def test_columns_beyond_the_vocabulary_are_in_no_term() -> None:
    inputs = make()
    before = run(chunked, inputs, chunk=64)
    inputs.bias[VOCABULARY:] = 1000.0
    after = run(chunked, inputs, chunk=64)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after["gradient of weight"][VOCABULARY:].any()
    assert not after["gradient of bias"][VOCABULARY:].any()


# --- Masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_row_is_never_read(dtype: torch.dtype, impl: str) -> None:
    inputs = make(dtype=dtype)
    clean = run(chunked, inputs, chunk=64, impl=impl)
    inputs.hidden[~inputs.mask] = math.nan
    inputs.ref_hidden[~inputs.mask] = math.inf
    inputs.labels[~inputs.mask] = -100
    dirty = run(chunked, inputs, chunk=64, impl=impl)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)
    for name in ("nll", "kl", "entropy", "gradient of hidden"):
        assert not dirty[name][~inputs.mask].any()


def test_masked_rows_reach_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = module._Head.logits

    def count(self: Any, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(module._Head, "logits", count)
    inputs = make()
    run(chunked, inputs, chunk=64)
    assert sum(rows) == 2 * inputs.mask.sum()  # policy and reference


def test_lengths_say_which_rows_count() -> None:
    inputs = make()
    lengths = [61, 0, 7, 1, 30]
    inputs = inputs._replace(mask=torch.arange(61) < torch.tensor(lengths).unsqueeze(1))
    plain, told = run(chunked, inputs, chunk=20), run(chunked, inputs, chunk=20, lengths=lengths)
    for name, value in plain.items():
        assert torch.equal(told[name], value), name
    for wrong, message in [
        ([61, 0, 7, 1, 29], "the mask is not 0 after the lengths"),
        ([61, 0, 7, 1], "4 lengths do not fit labels"),
        ([61, 62, 7, 1, 30], r"lengths\[1\] = 62 does not fit labels of shape \(5, 61\); give 0 to 61"),
        ([61, 0, -7, 1, 30], r"lengths\[2\] = -7 does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunked(inputs, lengths=wrong)


@pytest.fixture(params=["here", "elsewhere"])
def lengths_are_told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the weights are asked which rows count; elsewhere, as on a GPU, the lengths alone."""
    if request.param == "elsewhere":
        counted = module._counted

        def as_elsewhere(lengths: Any, labels: Tensor, weights: Tensor) -> Tensor | None:
            return counted(lengths, labels, weights.to("meta"))

        monkeypatch.setattr(module, "_counted", as_elsewhere)


@pytest.mark.usefixtures("lengths_are_told")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_row_within_its_length_is_never_read(dtype: torch.dtype, impl: str) -> None:
    lengths = [61, 0, 7, 1, 30]
    inputs = make(dtype=dtype)
    inside = torch.arange(61) < torch.tensor(lengths).unsqueeze(1)
    inputs = inputs._replace(mask=inputs.mask & inside)
    assert (inside & ~inputs.mask).any()
    clean = run(chunked, inputs, impl=impl)
    inputs.hidden[~inputs.mask] = math.nan
    inputs.ref_hidden[~inputs.mask] = math.inf
    inputs.labels[~inputs.mask] = -100
    dirty = run(chunked, inputs, impl=impl, lengths=lengths)
    for name, value in clean.items():
        # Rows of zeros are added up between the others: sums in another order, rounded to the dtype.
        error = (dirty[name] - value).abs().max()
        assert error <= max(SLACK, torch.finfo(dtype).eps) * value.abs().max(), name
    assert not dirty["gradient of hidden"][~inputs.mask].any()


@pytest.mark.usefixtures("lengths_are_told")
def test_masked_token_within_its_length_is_in_no_comparison() -> None:
    lengths = [30, 3, 1, 17, 0, 30]
    inputs, better = make((6, 30)), torch.tensor([1.0, -1, 1, 1, -1, 1])
    mask = inputs.mask & (torch.arange(30) < torch.tensor(lengths).unsqueeze(1))
    hidden = torch.stack([inputs.hidden, 0.9 * inputs.hidden])
    options = {
        "weights": ContrastWeights(1.0, 0.5),
        "samples": 6,
        "vocab_size": VOCABULARY,
        "normalizer": 81.0,
    }

    def gradients(**told: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (hidden, inputs.weight)]
        out, values, mirror_kl = linear_contrast_loss(*leaves, *inputs[2:5], mask, better, **options, **told)
        out.loss.backward()
        return (*(t.detach() for t in (*out, *values, mirror_kl)), *(leaf.grad for leaf in leaves))

    clean = gradients()
    hidden[:, ~mask], inputs.ref_hidden[~mask], inputs.labels[~mask] = math.nan, math.nan, -100
    for one, two in zip(gradients(lengths=lengths), clean, strict=True):
        torch.testing.assert_close(one, two, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 0), (4, 2)], ids=str)
def test_no_row_one_row_and_all_masked(shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> None:
    inputs = make(shape, dtype) if 0 not in shape else None
    if inputs is None:
        one = make((1,), dtype)
        inputs = one._replace(
            **{
                k: getattr(one, k).new_empty(*shape, *getattr(one, k).shape[1:])
                for k in ("hidden", "ref_hidden", "labels", "mask")
            }
        )
    if inputs.mask.numel() == 1:
        assert_as_accurate_as_eager(inputs, impl=impl)
    out = run(chunked, inputs._replace(mask=torch.zeros_like(inputs.mask)), impl=impl)
    assert all(not value.any() for value in out.values())
    assert out["gradient of hidden"].shape == inputs.hidden.shape
    assert out["gradient of weight"].shape == inputs.weight.shape


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_micro_batches_with_one_normalizer_add_up(impl: str) -> None:
    inputs = make()._replace(mask=torch.rand(5, 61, generator=torch.Generator().manual_seed(1)))
    expected = run(chunked, inputs, impl=impl)
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in STATES}
    total = 0.0
    for rows in (slice(0, 2), slice(2, 5)):
        parts = {k: getattr(inputs, k)[rows] for k in ("ref_hidden", "labels", "mask")}
        part = inputs._replace(**(leaves | parts | {"hidden": leaves["hidden"][rows]}))
        out = chunked(part, impl=impl, normalizer=inputs.mask.sum().item(), chunk=50)
        out.loss.backward()
        total += out.loss.item()
    assert total == pytest.approx(expected["loss"].item(), rel=1e-5)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), expected[f"gradient of {name}"], rtol=1e-4, atol=1e-7)


# --- Autograd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids=str)
def test_gradient_is_made_only_where_it_is_wanted(
    wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make()
    expected = run(chunked, inputs, chunk=64)
    products: list[int] = []
    original = module._add_product
    monkeypatch.setattr(module, "_add_product", lambda *a: (products.append(1), original(*a))[1])
    if not wanted:
        out = chunked(inputs, chunk=64)
        assert not out.loss.requires_grad
        assert torch.equal(out.loss.double(), expected["loss"])
    else:
        ours = run(chunked, inputs, wanted=wanted, chunk=64)
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert bool(products) == ("weight" in wanted)


def test_no_grad_computes_the_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make()
    expected = run(chunked, inputs)["loss"]
    inputs.weight.requires_grad_()
    monkeypatch.setattr(module, "_add_product", None)
    with torch.no_grad():
        out = chunked(inputs)
    assert torch.equal(out.loss.double(), expected)
    assert not out.loss.requires_grad


def test_tied_weight_used_twice_gets_both_gradients() -> None:
    inputs = make()
    ids = torch.randint(0, VOCABULARY, (5, 61))

    def step(weight: Tensor, from_hidden: bool) -> Tensor:
        hidden = inputs.hidden.to(weight.dtype) + torch.nn.functional.embedding(ids, weight)
        tied = inputs._replace(hidden=hidden, weight=weight)
        if not from_hidden:
            tied = tied._replace(
                **{k: getattr(tied, k).double() for k in ("ref_hidden", "ref_weight", "bias", "ref_bias")}
            )
            return whole(tied, impl="eager").loss
        return chunked(tied, chunk=64).loss

    ours, exact = (w.clone().requires_grad_() for w in (inputs.weight, inputs.weight.double()))
    step(ours, True).backward()
    step(exact, False).backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retained_graph_gives_the_same_gradient_twice(dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype)
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in STATES}
    loss = 3 * chunked(inputs._replace(**leaves), chunk=64).loss
    grads = [
        [g.clone() for g in torch.autograd.grad(loss, list(leaves.values()), retain_graph=again)]
        for again in (True, True, False)
    ]
    for one, two, three in zip(*grads, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(leaves.values()))


def test_gradients_accumulate_over_steps() -> None:
    """The second backward adds into .grad: it must not be memory that we still use."""
    inputs = make()
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in STATES}
    for _ in range(3):
        chunked(inputs._replace(**leaves), chunk=64).loss.backward()
    expected = run(chunked, inputs, chunk=64)
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            leaf.grad.double(), 3 * expected[f"gradient of {name}"], atol=1e-7, rtol=1e-6
        )


def test_second_derivative_is_refused() -> None:
    inputs = make()
    weight = inputs.weight.clone().requires_grad_()
    loss = chunked(inputs._replace(weight=weight)).loss
    with pytest.raises(RuntimeError, match="create_graph=True asks for a second derivative"):
        torch.autograd.grad(loss**2, weight, create_graph=True)


# torch's own forward mode compiles some of its formulas by torch.jit.script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STATES)
def test_derivatives_of_torch_func_and_forward_mode_are_refused(name: str, impl: str) -> None:
    inputs = make((6,))
    value = getattr(inputs, name)

    def loss(t: Tensor) -> Any:
        return chunked(inputs._replace(**{name: t}), impl=impl).loss

    refused = {"match": rf"{name} is differentiated .* use quark_loss\(..., impl='eager'\)"}
    with pytest.raises(RuntimeError, **refused):
        torch.func.jvp(loss, (value,), (value,))
    with pytest.raises(RuntimeError, **refused):
        torch.func.grad(loss)(value)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, **refused):
        loss(forward_ad.make_dual(value, value))


def test_terms_are_detached() -> None:
    inputs = make()
    out = chunked(inputs._replace(weight=inputs.weight.requires_grad_()))
    assert out.loss.requires_grad
    assert not any(term.requires_grad for term in out[1:])


def test_float16_gradient_does_not_underflow_for_many_tokens() -> None:
    """Divided by the tokens of a large batch before it is rounded, most of it would be 0."""
    inputs = make(dtype=torch.float16)
    options = {"normalizer": 1e7, "scale": 65536.0}
    exact = truth(inputs, **options)
    ours = run(chunked, inputs, chunk=64, **options)
    naive = run(whole, inputs, impl="eager", normalizer=1e7)
    for name in (f"gradient of {name}" for name in STATES):
        assert (naive[name] == 0).double().mean() > 0.5, "the case is chosen to underflow"
        # float16 logits of size 10 move p by 2^-8 of itself.
        assert (ours[name] - exact[name]).abs().max() < 2**-7 * exact[name].abs().max()
        lost = (ours[name] == 0) & (exact[name].abs() > 2**-24)
        assert lost.double().mean() < 0.02


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_a_linear_layer_would(dtype: torch.dtype, impl: str) -> None:
    """float32 weights and hidden states, products in autocast's dtype, gradients in float32; a scaler."""
    inputs = make()
    half = inputs._replace(
        **{k: v.to(dtype) for k, v in inputs._asdict().items() if v.is_floating_point() and k != "mask"}
    )
    expected = run(chunked, half, chunk=64, impl=impl)
    leaves = {name: torch.nn.Parameter(getattr(inputs, name).clone()) for name in STATES}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=dtype):
        out = chunked(inputs._replace(**leaves), chunk=64, impl=impl)
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert torch.equal(out.loss.double(), expected["loss"]), "the very same products"
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        # Here in float32, there rounded once more.
        torch.testing.assert_close(
            leaf.grad.double(),
            expected[f"gradient of {name}"],
            rtol=2**-8,
            atol=2**-10 * leaf.grad.abs().max().item(),
        )


# --- Memory ------------------------------------------------------------------------------------


def peak(function: Callable[[], object]) -> int:
    """Bytes that tensors take at most at once while a function runs, above what they took before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    raw = profile.profiler.kineto_results.events()
    memory = sorted((e for e in raw if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in memory:
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_never_whole(dtype: torch.dtype) -> None:
    """640 rows in chunks of 80: an eighth of both logits, and the weight's gradient, with room for 10%."""
    rows, vocab, width = 640, 8192, 32
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=g).to(dtype).requires_grad_() for n in (rows, vocab))
    ref_hidden, ref_weight = hidden.detach().clone(), weight.detach().clone()
    labels = torch.randint(0, vocab, (rows,), generator=g)

    def ours() -> None:
        linear_quark_loss(hidden, weight, ref_hidden, ref_weight, labels, chunk=80).loss.backward()

    def usual() -> None:
        logits, ref_logits = linear(hidden, weight), linear(ref_hidden, ref_weight)
        quark_loss(logits, ref_logits, labels).loss.backward()

    logits = rows * vocab * dtype.itemsize
    # Its float32 sum, and the product of one block (here all of it), which torch converts to be added.
    weight_grad = vocab * width * (4 if dtype == torch.float32 else 4 + 2 + 4)
    for function in (ours, usual):  # what is made only once
        function()
        hidden.grad = weight.grad = None
    ours_peak = peak(ours)
    hidden.grad = weight.grad = None
    usual_peak = peak(usual)
    assert usual_peak > 2.9 * logits, "or else the measurement is wrong"
    assert ours_peak < 1.1 * (2 * logits / 8 + weight_grad)


@pytest.mark.parametrize("rows", [1, 200, 640, 1280, 5000])
def test_default_chunks_are_even_and_no_larger_than_they_must_be(rows: int) -> None:
    chunks = [len(some) for _, some in module._plan(torch.ones(rows, 1), True, None, 1, 0)]
    assert sum(chunks) == rows
    assert max(chunks) - min(chunks) < len(chunks)
    assert max(chunks) < 2 * 160 * torch.get_num_threads() or max(chunks) <= -(-rows // 8)


# --- torch.library and torch.compile -----------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, streams: int) -> None:
    inputs = make((3, 4), dtype=dtype)
    hidden = torch.stack([inputs.hidden] * streams).requires_grad_()
    policy, ref = (hidden, inputs.weight.requires_grad_(), None), (*inputs[2:4], inputs.ref_bias)
    counted = inputs.mask.view(-1).nonzero().squeeze(1) if streams == 2 else None
    weighted = (inputs.labels, inputs.mask / 5, True, counted, VOCABULARY, 0.05, 0.06, "policy_ref")
    contrast = (torch.tensor([1, -1, 0]), [0.1, 0.2, 3.0]) if streams == 2 else (None, [])
    how = (*contrast, "cpp", dtype, dtype, 5, True, True, False)
    torch.library.opcheck(module._linear_loss, (*policy, *ref, *weighted, *how))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_step_has_no_graph_break(impl: str, autocast: bool) -> None:
    inputs = make()
    body = torch.randn(24, 24)

    def step(body: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = chunked(inputs._replace(hidden=inputs.hidden @ body, weight=weight), chunk=64, impl=impl)
        return out.loss * 2, out.kl

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [body.clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
        value, divergence = function(*leaves)
        results.append((value.detach(), divergence, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        # bfloat16: each chunk's product is rounded, and compiled eager has one chunk.
        half = {"rtol": 2**-8, "atol": 2**-8 * a.abs().max().item()} if autocast else {}
        torch.testing.assert_close(a, b, **half)


def test_compiled_step_takes_lengths_and_a_normalizer_that_change() -> None:
    inputs = make()

    def step(hidden: Tensor, mask: Tensor, lengths: list[int], normalizer: float) -> Tensor:
        told = inputs._replace(hidden=hidden, mask=mask)
        return chunked(told, lengths=lengths, normalizer=normalizer).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ([61, 0, 7, 1, 30], [60, 1, 7, 1, 30], [2, 0, 0, 0, 0]):
        mask = torch.arange(61) < torch.tensor(lengths).unsqueeze(1)
        given = (inputs.hidden, mask, lengths, 0.5 + sum(lengths))
        torch.testing.assert_close(compiled(*given), step(*given))


def test_indices_of_the_tokens_within_lengths_need_no_look_at_a_tensor() -> None:
    labels = torch.zeros(3, 4, dtype=torch.long, device="meta")

    def counted(lengths: list[int], weights: Tensor) -> Tensor:
        found = module._counted(lengths, labels, weights)
        assert found is not None
        return found + 0

    compiled = torch.compile(counted, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 2, 0], [0, 0, 0], [4, 4, 4], [0, 0, 1], [0, 3, 2]):
        expected = (torch.arange(4) < torch.tensor(lengths).view(-1, 1)).view(-1).nonzero().squeeze(1)
        for function in (counted, compiled):
            assert torch.equal(function(lengths, torch.ones(3, 4, device="meta")), expected)


# --- The contrast term -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "chunk", "impl", "weights"),
    pairwise(DTYPES, [1, 50, None], IMPLEMENTATIONS, [ContrastWeights(0.7), ContrastWeights(0.7, 0.4, 3.0)]),
)
def test_contrast_is_that_of_whole_logits(
    dtype: torch.dtype, chunk: int | None, impl: str, weights: ContrastWeights
) -> None:
    """Own rows: quark_loss; own and mirror: the contrast; all against float64 of whole logits."""
    inputs = make((6, 30), dtype)
    mirror = (inputs.hidden + 0.05 * make((6, 30), seed=1).hidden).to(dtype)
    hidden = torch.stack([inputs.hidden, mirror])
    mask = torch.arange(30) < torch.tensor([30, 3, 1, 17, 0, 30]).unsqueeze(1)
    better = torch.tensor([1, -1, 0, -1, 1, 1]) if weights.base else None
    shares = {"kl_coef": 0.3, "normalizer": 200.0}

    def usual(hidden: Tensor, weight: Tensor, bias: Tensor, impl: str) -> tuple[Tensor, Any]:
        logits = linear(hidden, weight, bias)
        ref = linear(*(t.to(weight.dtype) for t in (inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias)))
        out = quark_loss(logits[0], ref, inputs.labels, mask, impl=impl, entropy_coef=0.1, **shares)
        values, surrogate = contrast_loss(
            logits,
            ref,
            inputs.labels,
            mask,
            better,
            weights=weights,
            vocab_size=VOCABULARY,
            samples=9,
            impl=impl,
        )
        sums = weights.mirror * values.mirror.sum() + weights.base * values.base.sum()
        loss, value = out.loss + surrogate, out.loss + weights.margin * sums / 9
        mirror_kl = torch.zeros_like(out.kl)
        if better is not None:
            held = quark_loss(logits[1], ref, inputs.labels, mask, impl=impl, entropy_coef=0, **shares)
            alone = {"kl_coef": 0, "entropy_coef": 0, "normalizer": 200.0, "vocab_size": VOCABULARY}
            nll = quark_loss(logits[1], None, inputs.labels, mask, impl=impl, **alone)
            kl, mirror_kl = held.loss - nll.loss, held.kl
            loss, value = loss + kl, value + kl
        return loss, (value, *out[1:], mirror_kl, *values)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Any]:
        out, values, mirror_kl = linear_contrast_loss(
            hidden, weight, *inputs[2:4], inputs.labels, mask, better, weights=weights, samples=9,
            vocab_size=VOCABULARY, bias=bias, ref_bias=inputs.ref_bias, chunk=chunk, impl=impl,
            entropy_coef=0.1, **shares,
        )  # fmt: skip
        return out.loss, (*out, mirror_kl, *values)

    results = []
    for function, kind in (
        (lambda *t: usual(*t, "eager"), torch.float64),
        (lambda *t: usual(*t, "eager"), dtype),
        (ours, dtype),
    ):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (hidden, inputs.weight, inputs.bias)]
        loss, values = function(*leaves)
        loss.backward()
        results.append([t.detach().double() for t in (*values, *(leaf.grad for leaf in leaves))])
    for n, (exact, eager, mine) in enumerate(zip(*results, strict=True)):
        allowed = (eager - exact).abs().max() + 2 * SLACK * exact.abs().max() + SLACK * (n < 7)
        if n >= 7:
            allowed += torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert (mine - exact).abs().max() <= allowed, f"number {n}"


def test_contrast_without_gradient_and_sample_cut_nowhere() -> None:
    inputs = make((6, 30))
    mask = torch.arange(30) < torch.tensor([30, 3, 1, 17, 0, 30]).unsqueeze(1)
    parts = list(module._plan(mask.float(), True, None, 2, 50))
    counted = mask.view(-1).nonzero().squeeze(1)
    told = module._plan(mask.float(), True, counted, 2, 50)
    assert all(a == b and torch.equal(c, d) for (a, c), (b, d) in zip(parts, told, strict=True))
    assert [(p.start, p.stop) for p, _ in parts] == [(0, 1), (1, 5), (5, 6)]
    assert torch.equal(torch.cat([rows for _, rows in parts]), counted)
    options = {"samples": 6, "vocab_size": VOCABULARY, "normalizer": 81.0}
    hidden = torch.stack([inputs.hidden, inputs.hidden])
    with torch.no_grad():
        out, values, mirror_kl = linear_contrast_loss(
            hidden, *inputs[1:5], mask, weights=ContrastWeights(1.0), **options
        )
    torch.testing.assert_close(values.mirror, torch.full((6,), math.log(2)))
    assert not values.base.any() and not mirror_kl.any()
    plain = linear_quark_loss(*inputs[:5], mask)
    torch.testing.assert_close(out.loss, plain.loss + math.log(2))


def test_an_infinite_kl_of_the_mirror_rows_without_a_coefficient_is_no_part_of_the_loss() -> None:
    inputs = make((3, 4))
    labels, never = inputs.labels.clamp(max=VOCABULARY - 2), inputs.ref_bias.clone()
    never[VOCABULARY - 1] = -math.inf
    out, _, mirror_kl = linear_contrast_loss(
        torch.stack([inputs.hidden] * 2).requires_grad_(),
        *inputs[1:4],
        labels,
        inputs.mask,
        torch.ones(3),
        ref_bias=never,
        weights=ContrastWeights(0.7, 0.4),
        samples=3,
        vocab_size=VOCABULARY,
        normalizer=5.0,
        kl_coef=0.0,
    )
    assert mirror_kl.isinf().any() and out.loss.isfinite()
    out.loss.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)], ids=str)
def test_contrast_of_nothing_but_masked_tokens_is_chance(
    shape: tuple[int, int], dtype: torch.dtype, impl: str
) -> None:
    inputs = make((3, 4), dtype)
    n, t = shape
    hidden = torch.stack([inputs.hidden[:n, :t]] * 2).requires_grad_()
    weight, mask = inputs.weight.requires_grad_(), torch.zeros(n, t, dtype=torch.bool)
    out, values, mirror_kl = linear_contrast_loss(
        hidden,
        weight,
        inputs.ref_hidden[:n, :t],
        inputs.ref_weight,
        inputs.labels[:n, :t],
        mask,
        torch.ones(n),
        weights=ContrastWeights(0.7, 0.4),
        samples=3,
        vocab_size=VOCABULARY,
        normalizer=5.0,
        impl=impl,
    )
    out.loss.backward()
    # Two empty sums are as likely as each other: each comparison is log 2.
    torch.testing.assert_close(out.loss, torch.tensor(1.1 * n / 3 * math.log(2)))
    for value in values:
        torch.testing.assert_close(value, torch.full((n,), math.log(2)))
    for rest in (*out[1:], mirror_kl, hidden.grad, weight.grad):
        assert not rest.any()


def test_labels_and_mask_of_any_strides_give_the_same_contrast() -> None:
    inputs = make((6, 30))
    better, weights = torch.tensor([1.0, -1, 1, 1, -1, 1]), ContrastWeights(1.0, 0.5)
    options = {"weights": weights, "samples": 6, "vocab_size": VOCABULARY, "normalizer": 81.0}
    found = []
    for turned in (False, True):
        labels, mask = (t.t().contiguous().t() if turned else t for t in (inputs.labels, inputs.mask))
        assert labels.is_contiguous() != turned
        hidden = torch.stack([inputs.hidden, 0.9 * inputs.hidden]).requires_grad_()
        out, *_ = linear_contrast_loss(hidden, *inputs[1:4], labels, mask, better, **options)
        (grad,) = torch.autograd.grad(out.loss, hidden)
        found.append((*(value.detach() for value in out), grad))
    for straight, other in zip(*found, strict=True):
        assert torch.equal(straight, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_with_room_for_more_columns_give_the_same(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose products want rows that start at multiples of 16 bytes."""
    assert module._columns(50257, torch.device("cpu")) == 50257
    assert module._columns(50257, torch.device("cuda")) == 50264
    assert module._columns(49152, torch.device("cuda")) == 49152
    inputs = make(dtype=dtype)
    inputs = inputs._replace(weight=inputs.weight[:-1], bias=inputs.bias[:-1])  # 1009 columns
    monkeypatch.setattr(module, "_columns", lambda vocabulary, device: -(-vocabulary // 8) * 8)
    seen = []
    head = module._Head.logits

    def logits(self: Any, hidden: Tensor) -> Tensor:
        out = head(self, hidden)
        seen.append((out.shape[1], out.stride(0)))
        return out

    new_empty = Tensor.new_empty

    def empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(self, *size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", empty)  # whatever lay there
    monkeypatch.setattr(module._Head, "logits", logits)
    assert_as_accurate_as_eager(inputs, impl=impl)
    assert set(seen) == {(1009, 1016), (VOCABULARY, 1008)}


def test_off_the_cpu_the_weight_s_gradient_takes_few_products() -> None:
    """A CPU's cache decides there; of 8B's head the same blocks would be 251 products a chunk."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function._schema.name == "aten::mm"
            return function(*args, **(kwargs or {}))

    total = torch.empty(128256, 4096, device="meta")
    grad, hidden = (torch.empty(64, n, dtype=torch.bfloat16, device="meta") for n in total.shape)
    with Products() as products:
        module._add_product(total, grad, hidden, first=False)
    assert products.count == 8


def test_contrast_with_the_base_model_needs_it() -> None:
    inputs = make((6, 30))
    hidden, mask = torch.stack([inputs.hidden] * 2), torch.ones(6, 30, dtype=torch.bool)
    options = {
        "weights": ContrastWeights(1.0, 0.5),
        "samples": 6,
        "vocab_size": VOCABULARY,
        "normalizer": 180.0,
    }
    better = torch.ones(6)
    for ref, given in ((inputs[2:4], None), ((None, None), better)):
        with pytest.raises(ValueError, match=r"base = 0.5 compares with the base model; pass better"):
            linear_contrast_loss(
                hidden, inputs.weight, *ref, inputs.labels, mask, given, kl_coef=0, **options
            )


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_callers_default_dtype_and_device_change_nothing(impl: str, other: torch.dtype | str) -> None:
    lengths = [61, 0, 7, 1, 30]
    mask = torch.arange(61) < torch.tensor(lengths).unsqueeze(1)
    for dtype in DTYPES:
        inputs = make(dtype=dtype)._replace(mask=mask)
        expected = run(chunked, inputs, impl=impl, lengths=lengths)
        with defaults(other):
            ours = run(chunked, inputs, impl=impl, lengths=lengths)
        assert all(torch.equal(ours[name], value) for name, value in expected.items())


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        fails("kl = 'forward'", {}, kl="forward"),
        fails("impl = 'cuda'", {}, impl="cuda"),
        fails("chunk = 0; give at least 1", {}, chunk=0),
        fails("ref_hidden without ref_weight", {"ref_weight": None}),
        fails("ref_weight without ref_hidden", {"ref_hidden": None}),
        fails("kl_coef = 0.05 needs", {"ref_hidden": None, "ref_weight": None}),
        fails("ref_hidden requires grad", {"ref_hidden": torch.ones(3, 4, 5, requires_grad=True)}),
        fails("ref_weight requires grad", {"ref_weight": torch.ones(9, 5, requires_grad=True)}),
        fails(
            "hidden is torch.float32 of shape (3, 2, 5); for labels of shape (3, 4)",
            {"hidden": torch.ones(3, 2, 5)},
        ),
        fails("ref_hidden is torch.float32 of shape (4, 5)", {"ref_hidden": torch.ones(4, 5)}),
        fails("hidden is torch.int64", {"hidden": torch.ones(3, 4, 5, dtype=torch.long)}),
        fails("weight of shape (9, 6) does not fit hidden of width 5", {"weight": torch.ones(9, 6)}),
        fails("bias of shape (8,) does not fit weight of shape (9, 5)", {}, bias=torch.ones(8)),
        fails("weight is torch.bfloat16, hidden torch.float32", {"weight": torch.ones(9, 5).bfloat16()}),
        fails("weight is on meta", {"weight": torch.ones(9, 5, device="meta")}),
        fails("has 9 columns for a base vocabulary of 10", {}, vocab_size=10),
        fails("mask of shape", {"mask": torch.ones(4)}),
        fails("labels[2] = 9 (flattened) is outside", {"labels": torch.arange(12).view(3, 4) + 7}),
        fails("normalizer = 0", {}, normalizer=0),
        fails("lengths[1] = 5 does not fit labels of shape (3, 4)", {}, lengths=[4, 5, 4]),
        fails("2 lengths do not fit labels of shape (3, 4)", {}, lengths=[4, 4]),
        fails("weight is nested or of layout torch.sparse", {"weight": torch.ones(9, 5).to_sparse()}),
    ],
)
def test_wrong_input_is_named(
    change: dict[str, Tensor | None], options: dict[str, object], match: str
) -> None:
    inputs = {
        "hidden": torch.ones(3, 4, 5),
        "weight": torch.ones(9, 5),
        "ref_hidden": torch.ones(3, 4, 5),
        "ref_weight": torch.ones(9, 5),
        "labels": torch.zeros(3, 4, dtype=torch.long),
        "mask": torch.ones(3, 4),
    }
    with pytest.raises(ValueError, match=re.escape(match)):
        linear_quark_loss(**(inputs | change), **options)


def _is_no(match: str, **change: object) -> object:
    return pytest.param(change, match, id=match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        _is_no("weight is a list; pass a tensor", weight=[[1.0]]),
        _is_no("weight is a NoneType; pass a tensor", weight=None),
        _is_no("weight is a Linear; pass a tensor", weight=torch.nn.Linear(5, 9)),
        _is_no("hidden is a list; pass a tensor", hidden=[[1.0]]),
        _is_no("ref_hidden is a list; pass a tensor", ref_hidden=[[1.0]]),
        _is_no("labels is a list; pass a tensor", labels=[1]),
        _is_no("mask is a list; pass a tensor", mask=[True]),
        _is_no("bias is a float; pass a tensor", bias=0.0),
        _is_no("ref_bias is a int; pass a tensor", ref_bias=0),
        _is_no("chunk is a float; pass a whole number of rows", chunk=2.5),
        _is_no("lengths = [4, 2.5, 4]; pass a whole number for each row", lengths=[4, 2.5, 4]),
        _is_no("lengths = 4; pass a whole number for each row", lengths=4),
    ],
)
def test_argument_of_another_type_altogether_is_a_type_error(change: dict[str, object], match: str) -> None:
    inputs: dict[str, object] = {
        "hidden": torch.ones(3, 4, 5),
        "weight": torch.ones(9, 5),
        "ref_hidden": torch.ones(3, 4, 5),
        "ref_weight": torch.ones(9, 5),
        "labels": torch.zeros(3, 4, dtype=torch.long),
        "mask": torch.ones(3, 4, dtype=torch.bool),
    }
    with pytest.raises(TypeError, match=re.escape(match)):
        linear_quark_loss(**(inputs | change))
    twice = {"weights": ContrastWeights(1.0), "samples": 3, "normalizer": 12.0, "vocab_size": 9}
    inputs["hidden"] = torch.ones(2, 3, 4, 5)
    with pytest.raises(TypeError, match=re.escape(match)):
        linear_contrast_loss(**(inputs | twice | change))
    with pytest.raises(TypeError, match="better is a list; pass a tensor"):
        linear_contrast_loss(**inputs, **twice, better=[1])


@pytest.mark.parametrize("chunk", [None, 300])
def test_a_float16_gradient_of_the_weight_is_not_summed_in_float16(chunk):
    """1,200 rows of one label, whose hidden states are 100 in one place: a sum of -120,000, over 1,200."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1200, 64), 0.02 * torch.randn(500, 64)
    hidden[:, 3], weight[:, 3] = 100.0, 0.0
    hidden, weight = hidden.half(), weight.half().requires_grad_()
    labels = torch.zeros(1200, dtype=torch.long)
    options = {"kl_coef": 0.0, "entropy_coef": 0.0, "vocab_size": 500}
    linear_quark_loss(hidden, weight, None, None, labels, chunk=chunk, **options).loss.backward()
    exact = weight.detach().double().requires_grad_()
    quark_loss(hidden.double() @ exact.t(), None, labels, impl="eager", **options).loss.backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=2e-3, atol=2e-5)


def test_compiled_eager_gives_terms_without_gradient():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(9, 5).double()
    labels, options = torch.randint(9, (6,)), {"kl_coef": 0.0, "vocab_size": 9, "impl": "eager"}

    def loss(hidden):
        return tuple(linear_quark_loss(hidden, weight, None, None, labels, **options))

    torch.compiler.reset()
    for run in (loss, torch.compile(loss, backend="eager")):
        assert [value.requires_grad for value in run(hidden)] == [True, False, False, False]


def test_linear_loss_of_meta_tensors_has_the_shapes():
    hidden, weight = torch.randn(2, 3, 5, device="meta"), torch.randn(9, 5, device="meta")
    labels = torch.zeros(2, 3, dtype=torch.long, device="meta")
    out = linear_quark_loss(hidden, weight, hidden, weight, labels)
    assert (out.loss.shape, out.kl.shape, out.loss.device.type) == ((), (2, 3), "meta")
