"""The contrast against autograd of the formulas as its docstring has them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from quark_fast.ops.contrast import Contrast, ContrastWeights, contrast_loss

SAMPLES, LENGTH, VOCABULARY, COLUMNS = 5, 7, 123, 130

# float32: log p sums of 7 terms up to 10 each.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


BETTER = torch.tensor([1, -1, 0, -1, 1])
WEIGHTS = {
    "mirror": ContrastWeights(1.0),
    "both": ContrastWeights(0.7, 1.3, 4.0),
    "base": ContrastWeights(0.0, 1.0, 0.5),
}


class Problem(NamedTuple):
    logits: Tensor
    ref_logits: Tensor
    labels: Tensor
    mask: Tensor


def problem(dtype: torch.dtype, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SAMPLES, LENGTH, COLUMNS, generator=generator, dtype=torch.float64)
    # Conditionals and a reference that differ a little, as real ones do; the log-ratios are of order 1.
    apart = 0.4 * torch.randn(3, SAMPLES, LENGTH, COLUMNS, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([7, 1, 4, 6, 2]).unsqueeze(1)
    logits = (2 * base + apart).to(dtype)
    return Problem(logits[:2].clone().requires_grad_(), logits[2], labels, mask)


def contrast(given: Problem, kind: str = "both", **options: Any) -> tuple[Contrast, Tensor]:
    weights = WEIGHTS[kind]
    options = {"samples": SAMPLES} | options
    better = options.pop("better", BETTER) if weights.base else None
    return contrast_loss(*given, better, weights=weights, vocab_size=VOCABULARY, **options)


def plain(given: Problem, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(-log sigma(delta / m), -log sigma(s gain / m), m times their weighted sum), of the base vocabulary."""
    mirror_weight, base_weight, margin = WEIGHTS[kind]
    own, mirror, reference = (
        (logits.double()[..., :VOCABULARY].log_softmax(-1).gather(-1, given.labels.unsqueeze(-1)).squeeze(-1))
        .mul(given.mask)
        .sum(-1)
        for logits in (*given.logits, given.ref_logits)
    )
    logsigmoid = torch.nn.functional.logsigmoid
    between = -logsigmoid((own - mirror) / margin)
    better = torch.where(BETTER > 0, own, mirror)
    base = -logsigmoid(BETTER * (better - reference) / margin) * BETTER.abs() * (base_weight > 0)
    return between, base, margin * (mirror_weight * between + base_weight * base).sum()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("dtype", "impl"),
    [(torch.float64, "eager"), (torch.float32, "eager"), (torch.float32, "cpp"), (torch.float32, "auto")],
)
def test_value_and_gradient_are_those_of_the_formula(
    dtype: torch.dtype, impl: str, seed: int, kind: str
) -> None:
    given = problem(dtype, seed)
    values, surrogate = contrast(given, kind, impl=impl)
    surrogate.backward()
    copy = given._replace(logits=given.logits.detach().clone().requires_grad_())
    *expected, total = plain(copy, kind)
    (total / SAMPLES).backward()
    tolerance = ROUNDING if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    for value, wanted in zip(values, expected, strict=True):
        assert value.dtype == dtype and not value.requires_grad
        torch.testing.assert_close(value.double(), wanted.detach(), **tolerance)
    torch.testing.assert_close(given.logits.grad, copy.logits.grad, **tolerance)
    assert copy.logits.grad.abs().max() > 1e-2, "or else the tolerance would hide everything"


def test_columns_beyond_the_vocabulary_and_masked_tokens_get_no_gradient() -> None:
    given = problem(torch.float32)
    contrast(given)[1].backward()
    logits, mask = given.logits, given.mask
    assert (logits.grad[..., VOCABULARY:] == 0).all()
    assert (logits.grad[:, ~mask] == 0).all()
    assert (logits.grad[:, mask][..., :VOCABULARY].abs().sum(-1) > 0).all()


def test_bfloat16_errs_by_its_own_rounding_alone() -> None:
    given = problem(torch.bfloat16)
    values, surrogate = contrast(given)
    surrogate.backward()
    copy = given._replace(logits=given.logits.detach().double().requires_grad_())
    *expected, total = plain(copy, "both")
    (total / SAMPLES).backward()
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted.detach(), **ROUNDING)  # the logits are exact
    torch.testing.assert_close(given.logits.grad.double(), copy.logits.grad, rtol=2**-8, atol=2e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_micro_batches_add_up_to_the_whole(sizes: tuple[int, ...]) -> None:
    given = problem(torch.float32)
    values, surrogate = contrast(given)
    surrogate.backward()
    logits = given.logits.detach().clone().requires_grad_()
    found = []
    for some, *others, better in zip(
        logits.split(list(sizes), 1), *(t.split(sizes) for t in given[1:]), BETTER.split(sizes), strict=True
    ):
        part, surrogate = contrast(Problem(some, *others), better=better)
        surrogate.backward()
        found.append(torch.stack(part))
    # Rows are computed one by one, whatever stands beside them.
    torch.testing.assert_close(torch.cat(found, 1), torch.stack(values), rtol=0, atol=0)
    torch.testing.assert_close(logits.grad, given.logits.grad, rtol=1e-6, atol=1e-9)


def test_own_equal_to_mirror_is_log_two_and_no_gradient_in_sum() -> None:
    given = problem(torch.float32)
    same = given._replace(logits=given.logits.detach()[:1].repeat(2, 1, 1, 1).requires_grad_())
    values, surrogate = contrast(same, "mirror")
    surrogate.backward()
    torch.testing.assert_close(values.mirror, torch.full((SAMPLES,), 2.0).log())
    # What both conditionals share cancels: the middle quantile, its own mirror, learns nothing here.
    torch.testing.assert_close(same.logits.grad[0], -same.logits.grad[1], rtol=0, atol=0)


def test_base_contrast_moves_the_better_row_alone_up_for_good_completions_and_down_for_bad_ones() -> None:
    given = problem(torch.float32)
    contrast(given, "base")[1].backward()
    own, mirror = given.logits.grad.gather(-1, given.labels.expand(2, -1, -1).unsqueeze(-1)).squeeze(-1)
    seen = [
        (own[i][mask], mirror[i][mask], int(s))
        for i, (mask, s) in enumerate(zip(given.mask, BETTER, strict=True))
    ]
    assert [(bool((a < 0).all()), bool((b > 0).all()), s) for a, b, s in seen] == [
        (s > 0, s < 0, s) for s in BETTER.tolist()
    ]
    assert all(bool((b if s > 0 else a).abs().max() == 0) for a, b, s in seen)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_certain_and_mistaken_samples_stay_finite(sign: float) -> None:
    given = problem(torch.float32)
    far = given.logits.detach().clone()
    far[0].scatter_add_(-1, given.labels.unsqueeze(-1), torch.full((SAMPLES, LENGTH, 1), sign * 200.0))
    given = given._replace(logits=far.requires_grad_())
    values, surrogate = contrast(given)
    surrogate.backward()
    for value, wanted in zip(values, plain(given, "both"), strict=False):
        torch.testing.assert_close(value.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["eager", "cpp"])
def test_logits_that_are_not_finite_show_in_value_and_gradient_and_blame_no_mask(impl: str) -> None:
    given = problem(torch.float32)
    with torch.no_grad():
        given.logits[0, 2, 1, 5] = torch.nan
        given.logits[1, 3, 1, 5] = torch.nan
    values, surrogate = contrast(given, impl=impl)
    surrogate.backward()
    assert values.mirror.isfinite().tolist() == [True, True, False, False, True]
    # The base contrast reads the better row: the mirror of sample 3, none of sample 2.
    assert values.base.isfinite().tolist()[3] is False
    broken = ~given.logits.grad.isfinite().all(-1)
    assert broken.nonzero().tolist() == [[0, 2, 1], [1, 3, 1]]
