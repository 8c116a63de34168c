"""The contrast term against autograd of the formula as its docstring has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quark_fast.ops.contrast import contrast_loss

SAMPLES, LENGTH, VOCABULARY, COLUMNS = 5, 7, 123, 130

# float32: log p sums of 7 terms up to 10 each.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SAMPLES, LENGTH, COLUMNS, generator=generator, dtype=torch.float64)
    # Two conditionals that differ a little, as own and mirror token's do; delta is of order 1.
    apart = 0.4 * torch.randn(2, SAMPLES, LENGTH, COLUMNS, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([7, 1, 4, 6, 2]).unsqueeze(1)
    return (2 * base + apart).to(dtype).requires_grad_(), labels, mask


def plain(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """-log sigma(log p(y | own) - log p(y | mirror)) of each sample, over the base vocabulary."""
    logp = logits.double()[..., :VOCABULARY].log_softmax(-1)
    tokens = logp.gather(-1, labels.expand(2, -1, -1).unsqueeze(-1)).squeeze(-1)
    own, mirror = (tokens * mask).sum(-1)
    return -torch.nn.functional.logsigmoid(own - mirror)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("dtype", "impl"),
    [(torch.float64, "eager"), (torch.float32, "eager"), (torch.float32, "cpp"), (torch.float32, "auto")],
)
def test_value_and_gradient_are_those_of_the_formula(dtype: torch.dtype, impl: str, seed: int) -> None:
    logits, labels, mask = problem(dtype, seed)
    value, surrogate = contrast_loss(logits, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES, impl=impl)
    surrogate.backward()
    copy = logits.detach().clone().requires_grad_()
    expected = plain(copy, labels, mask)
    (expected.sum() / SAMPLES).backward()
    assert value.dtype == dtype and not value.requires_grad
    tolerance = ROUNDING if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(value.double(), expected.detach(), **tolerance)
    torch.testing.assert_close(logits.grad, copy.grad, **tolerance)
    assert copy.grad.abs().max() > 1e-2, "or else the tolerance would hide everything"


def test_columns_beyond_the_vocabulary_and_masked_tokens_get_no_gradient() -> None:
    logits, labels, mask = problem(torch.float32)
    contrast_loss(logits, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES)[1].backward()
    assert (logits.grad[..., VOCABULARY:] == 0).all()
    assert (logits.grad[:, ~mask] == 0).all()
    assert (logits.grad[:, mask][..., :VOCABULARY].abs().sum(-1) > 0).all()


def test_bfloat16_errs_by_its_own_rounding_alone() -> None:
    logits, labels, mask = problem(torch.bfloat16)
    value, surrogate = contrast_loss(logits, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES)
    surrogate.backward()
    copy = logits.detach().double().requires_grad_()
    expected = plain(copy, labels, mask)
    (expected.sum() / SAMPLES).backward()
    torch.testing.assert_close(value.double(), expected.detach(), **ROUNDING)  # the logits are exact
    torch.testing.assert_close(logits.grad.double(), copy.grad, rtol=2**-8, atol=2e-6)  # the gradient is not


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_micro_batches_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    logits, labels, mask = problem(torch.float32)
    value, surrogate = contrast_loss(logits, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES)
    surrogate.backward()
    parts = logits.detach().clone().requires_grad_()
    values = []
    for some, part_labels, part_mask in zip(
        parts.split(list(sizes), 1), labels.split(sizes), mask.split(sizes), strict=True
    ):
        part, surrogate = contrast_loss(some, part_labels, part_mask, vocab_size=VOCABULARY, samples=SAMPLES)
        surrogate.backward()
        values.append(part)
    # Rows are computed one by one, whatever stands beside them.
    torch.testing.assert_close(torch.cat(values), value, rtol=0, atol=0)
    torch.testing.assert_close(parts.grad, logits.grad, rtol=1e-6, atol=1e-9)


def test_own_equal_to_mirror_is_log_two_and_no_gradient_in_sum() -> None:
    logits, labels, mask = problem(torch.float32)
    same = logits.detach()[:1].repeat(2, 1, 1, 1).requires_grad_()
    value, surrogate = contrast_loss(same, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES)
    surrogate.backward()
    torch.testing.assert_close(value, torch.full((SAMPLES,), 2.0).log())
    # What both conditionals share cancels: the middle quantile, its own mirror, learns nothing here.
    torch.testing.assert_close(same.grad[0], -same.grad[1], rtol=0, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_certain_and_mistaken_samples_stay_finite(sign: float) -> None:
    logits, labels, mask = problem(torch.float32)
    far = logits.detach().clone()
    far[0].scatter_add_(-1, labels.unsqueeze(-1), torch.full((SAMPLES, LENGTH, 1), sign * 200.0))
    far.requires_grad_()
    value, surrogate = contrast_loss(far, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES)
    surrogate.backward()
    torch.testing.assert_close(value.double(), plain(far, labels, mask).detach(), rtol=1e-5, atol=1e-6)
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "cpp"])
def test_logits_that_are_not_finite_show_in_value_and_gradient_and_blame_no_mask(impl: str) -> None:
    logits, labels, mask = problem(torch.float32)
    with torch.no_grad():
        logits[0, 2, 1, 5] = torch.nan
    value, surrogate = contrast_loss(logits, labels, mask, vocab_size=VOCABULARY, samples=SAMPLES, impl=impl)
    surrogate.backward()
    assert value.isfinite().tolist() == [True, True, False, True, True]
    broken = ~logits.grad.isfinite().all(-1)
    assert broken.nonzero().tolist() == [[0, 2, 1]]
