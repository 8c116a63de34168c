"""The unlikelihood term against autograd of its formula, and the mask of repeated n-grams by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quark_fast.ops.loss import quark_loss
from quark_fast.ops.unlikelihood import SUREST, repeated_ngrams, unlikelihood_loss

VOCABULARY, COLUMNS = 123, 130


def marked(text: str, n: int) -> str:
    """The text, a letter a token, with its repeated ones in capitals."""
    mask = repeated_ngrams([ord(letter) for letter in text], n)
    return "".join(a.upper() if r else a for a, r in zip(text, mask, strict=True))


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (4, "abcdxABCD"),  # the later occurrence alone, its last token too
        (4, "abcdABCDABCD"),
        (4, "aAAAAAA"),  # it may overlap the earlier one: aaaa begins at the second a again
        (2, "abcABxBC"),
        (1, "abAcBd"),
        (3, "abcabxabd"),
        (4, "abc"),
        (1, ""),
    ],
)
def test_tokens_of_a_second_occurrence_are_marked_and_no_others(n: int, expected: str) -> None:
    assert marked(expected.lower(), n) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=20), st.integers(1, 5))
def test_mask_is_the_definition(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    again = [any(grams[j] == gram for j in range(i)) for i, gram in enumerate(grams)]
    expected = [any(again[max(0, t - n + 1) : t + 1]) for t in range(len(tokens))]
    assert repeated_ngrams(tokens, n) == expected


def test_an_ngram_of_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="n = 0"):
        repeated_ngrams([1, 2], 0)


def problem(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 5, 7, COLUMNS, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (2, 5, 7), generator=generator)
    # Labels from hardly to nearly certain, as greedy loops are.
    lift = 12 * torch.rand(2, 5, 7, 1, generator=generator, dtype=torch.float64)
    logits.scatter_add_(-1, labels.unsqueeze(-1), lift)
    repeated = torch.rand(2, 5, 7, generator=generator) < 0.5
    return logits.to(dtype).requires_grad_(), labels, repeated


def term(
    logits: Tensor, labels: Tensor, repeated: Tensor, tokens: float, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The term as the trainer calls it."""
    options = {"kl_coef": 0.0, "entropy_coef": 0.0, "vocab_size": VOCABULARY, "normalizer": tokens}
    return unlikelihood_loss(
        lambda weights: quark_loss(logits, None, labels, weights, impl=impl, **options), repeated
    )


def plain(logits: Tensor, labels: Tensor, repeated: Tensor) -> Tensor:
    """-log(1 - p(label)) of repeated tokens, p over the base vocabulary, in float64."""
    p = logits.double()[..., :VOCABULARY].softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return torch.where(repeated, -torch.log1p(-p), 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("dtype", "impl"),
    [(torch.float64, "eager"), (torch.float32, "eager"), (torch.float32, "cpp"), (torch.float32, "auto")],
)
def test_value_and_gradient_are_those_of_the_formula(dtype: torch.dtype, impl: str, seed: int) -> None:
    logits, labels, repeated = problem(dtype, seed)
    value, surrogate = term(logits, labels, repeated, 70, impl)
    surrogate.backward()
    copy = logits.detach().clone().requires_grad_()
    expected = plain(copy, labels, repeated)
    (expected.sum() / 70).backward()
    assert not value.requires_grad
    # float32: nll is good to 2e-6, and the surest label here has 1 - p of about 1e-4, so to 2 %.
    tolerance = {"rtol": 2e-2, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(value.double(), expected.detach(), **tolerance)
    torch.testing.assert_close(logits.grad.double(), copy.grad.double(), **tolerance)
    assert copy.grad.abs().max() > 1e-3, "or else the tolerance would hide everything"
    assert value.max() > 3, "or else no label was nearly certain"


def test_a_descent_step_makes_the_repeated_token_less_likely_and_no_other() -> None:
    logits, labels, repeated = problem(torch.float32)
    term(logits, labels, repeated, 1)[1].backward()
    after = (logits - 0.5 * logits.grad).detach()
    p, q = (z[..., :VOCABULARY].softmax(-1).gather(-1, labels.unsqueeze(-1)) for z in (logits, after))
    assert (q < p)[repeated].all()
    assert (logits.grad[~repeated] == 0).all()
    assert (logits.grad[..., VOCABULARY:] == 0).all()


@pytest.mark.parametrize("impl", ["eager", "cpp"])
@pytest.mark.parametrize("margin", [9.0, 12.0, 15.0, 18.0, 30.0, 200.0])
def test_certain_repeated_token_has_a_finite_value_and_a_bounded_gradient(margin: float, impl: str) -> None:
    logits = torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[..., 3] = logits.max() + margin
    logits.requires_grad_()
    label, repeated = torch.tensor([[3]]), torch.tensor([[True]])
    value, surrogate = term(logits, label, repeated, 1, impl)
    surrogate.backward()
    assert 0 < float(value) <= -math.log(SUREST) + 1e-3
    # The true gradient of the label's logit is p < 1, and all others sum to -p.
    assert logits.grad.isfinite().all() and logits.grad.abs().max() < 1.02
    if margin <= 9:  # 1 - p is still many times float32's resolution
        assert float(logits.grad[0, 0, 3]) == pytest.approx(1.0, abs=0.02)


def test_nothing_repeated_is_nothing_to_learn() -> None:
    logits, labels, repeated = problem(torch.float32)
    value, surrogate = term(logits, labels, torch.zeros_like(repeated), 70)
    surrogate.backward()
    assert (value == 0).all() and surrogate.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("impl", ["eager", "cpp"])
def test_logits_that_are_not_finite_show_in_value_and_gradient_and_blame_no_mask(impl: str) -> None:
    logits = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(0))
    logits[1, 2, 5] = torch.nan
    logits.requires_grad_()
    labels, repeated = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    options = {"kl_coef": 0.0, "entropy_coef": 0.0, "vocab_size": VOCABULARY, "impl": impl, "normalizer": 6}
    value, surrogate = unlikelihood_loss(
        lambda weights: quark_loss(logits, None, labels, weights, **options), repeated
    )
    surrogate.backward()
    assert (~value.isfinite()).nonzero().tolist() == [[1, 2]]
    assert (~logits.grad.isfinite().all(-1)).nonzero().tolist() == [[1, 2]]
