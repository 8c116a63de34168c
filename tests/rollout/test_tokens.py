"""From logits to tokens: the equation in PyTorch against sorting and counting, the kernel against both."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from conftest import assert_drawn_from
from levels import LEVELS, run_again_at
from pairwise import pairwise
from torch import Tensor
from torch_defaults import OTHERS, defaults

from quark_fast.ops import cpp, loss
from quark_fast.ops.rows import KERNEL_DTYPES, Nucleus
from quark_fast.rollout.live_rows import LiveRows
from quark_fast.rollout.tokens import (
    NextToken,
    NotFinite,
    draw_by_equation,
    draw_on_gpu,
    draw_tokens,
    log_probabilities,
    model_log_p,
    sample_tokens,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wanted(
    vocabulary: int,
    weights: tuple[float, ...] = (1.0,),
    suppressed: tuple[int, ...] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    nucleus_of: int | None = None,
) -> NextToken:
    ids = torch.tensor(suppressed, dtype=torch.long)
    return NextToken(torch.tensor(weights), vocabulary, ids, temperature, top_p, nucleus_of)


# --- Both ways, against sorting and counting -------------------------------------------------------


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """By sorting: the most probable tokens up to the one that reaches top_p, and those that tie with it."""
    inside = torch.zeros_like(probs, dtype=torch.bool)
    for row, p in enumerate(probs):
        mass, last = 0.0, None
        for token in p.argsort(descending=True).tolist():
            if mass >= top_p and float(p[token]) != last:
                break
            inside[row, token] = True
            mass, last = mass + float(p[token]), float(p[token])
    return inside


# (N, V) float32 logits, top_p, generator -> (N,) tokens
Way = Callable[[Tensor, float, torch.Generator], Tensor]


def by_kernel(logits: Tensor, top_p: float, generator: torch.Generator) -> Tensor:
    return draw_tokens(logits, wanted(logits.shape[-1], top_p=top_p), generator)


@pytest.fixture(params=[sample_tokens, by_kernel], ids=["torch", "kernel"])
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


def draw_counts(way: Way, logits: Tensor, top_p: float, draws: int) -> Tensor:
    """(V,) how often each token came of so many draws from one row."""
    tokens = way(logits.expand(draws, -1), top_p, generator(5))
    return tokens.bincount(minlength=logits.shape[-1])


@pytest.mark.parametrize("top_p", [0.0, -1.0, float("nan")])
def test_a_nucleus_of_no_mass_is_refused_and_not_looked_for_for_ever(top_p: float) -> None:
    with pytest.raises(ValueError, match=r"top_p = .*; it must be above 0"):
        sample_tokens(torch.zeros(2, 3), top_p, generator())


def test_a_target_of_the_whole_mass_is_no_token_of_mass_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that rounds to the total must not go past the last token that has mass."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))
    logits = torch.tensor([[0.0, 1.0, 0.5, -torch.inf, -torch.inf]])
    assert sample_tokens(logits, 1.0).tolist() == [2]


@pytest.mark.parametrize("top_p", [0.9999, 1.0])
def test_a_sum_that_rises_where_there_is_no_mass_gives_no_token_there(
    monkeypatch: pytest.MonkeyPatch, top_p: float
) -> None:
    """A GPU's parallel sum rounds otherwise from column to column, and need not even be monotone."""
    uniform = iter([0.52, 0.53, 0.6])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, next(uniform)))
    sums = torch.tensor([[0.25, 0.5, 0.54, 0.535, 0.75, 1.0]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: sums)
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf, 0.0, 0.0]])
    assert sample_tokens(logits, top_p).tolist() == [4]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["smooth", "peaked", "ties", "flat"])
def test_every_draw_is_in_the_nucleus_that_sorting_finds(way: Way, kind: str, top_p: float) -> None:
    logits = torch.randn(40, 30, generator=generator(1), dtype=torch.float64)
    if kind == "peaked":
        logits = 4 * logits
    elif kind == "ties":
        logits = logits.round()
    elif kind == "flat":
        logits = torch.zeros_like(logits)
    probs = logits.softmax(-1)
    drawn = torch.zeros_like(probs)
    repeated = logits.float().repeat_interleave(500, 0)
    rows = torch.arange(40).repeat_interleave(500)
    drawn.index_put_((rows, way(repeated, top_p, generator(2))), drawn.new_ones(()), True)
    # Equal logits must tie in the oracle as in float32, whatever their rounding: hence rounded.
    inside = nucleus(probs.mul(1e9).round() / 1e9, top_p - 1e-6)
    assert (drawn[~inside] == 0).all()
    shares = probs * inside
    likely = shares / shares.sum(-1, keepdim=True) > 0.05
    assert (drawn[likely] > 0).all(), "(1 - 0.05)^500 is 7e-12: each likely token of the nucleus comes up"


@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_draws_follow_the_probabilities_within_the_nucleus(way: Way, seed: int, top_p: float) -> None:
    logits = 2 * torch.randn(1, 50, generator=generator(seed))
    probs = logits.double().softmax(-1)
    assert_drawn_from(draw_counts(way, logits, top_p, 40_000), (probs * nucleus(probs, top_p))[0])


def test_tiny_top_p_is_the_most_probable_token(way: Way) -> None:
    logits = torch.randn(200, 50, generator=generator(3))
    assert torch.equal(way(logits, 1e-9, generator()), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_token_of_probability_zero_is_never_drawn(way: Way, top_p: float) -> None:
    logits = torch.zeros(1, 9)
    logits[0, [0, 3, 4, 8]] = -torch.inf
    counts = draw_counts(way, logits, top_p, 30_000)
    assert counts.nonzero().flatten().tolist() == [1, 2, 5, 6, 7]


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1 - 2**-24, 7)])
def test_the_ends_of_the_unit_interval_hit_no_token_of_probability_zero(
    monkeypatch: pytest.MonkeyPatch, way: Way, uniform: float, expected: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform))
    logits = torch.randn(2000, 9, generator=generator(4))
    logits[:, [0, 8]] = -torch.inf
    assert (way(logits, 1.0, generator()) == expected).all()


def test_large_vocabulary_keeps_its_tail_despite_float32_sums(
    monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    uniform = torch.linspace(0, 1 - 2**-24, 64).unsqueeze(1)
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: uniform)
    logits = torch.randn(1, 150_000, generator=generator(6)).expand(64, -1)
    drawn = way(logits, 1.0, generator())
    cdf = logits[0].double().softmax(-1).cumsum(-1)
    # Rounding walks: sqrt(150,000) * 2^-24 is 2.3e-5. A sum that loses the tail would miss by far more.
    torch.testing.assert_close(cdf[drawn].float(), uniform[:, 0], rtol=0, atol=2e-4)


# --- The kernel against the equation ---------------------------------------------------------------

STREAMS = [(1.0,), (2.5, -1.5)]
KERNELS = list(product(KERNEL_DTYPES, STREAMS))  # one is compiled for each


# The stream whose nucleus it is; of a single one, that one.
NUCLEI = [None, 0, 1]


def stream(nucleus_of: int | None, weights: tuple[float, ...]) -> int | None:
    return None if nucleus_of is None else min(nucleus_of, len(weights) - 1)


def likely_logits(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """As peaked as those of a language model, more or less from row to row."""
    sharpness = torch.linspace(0.5, 4, rows).unsqueeze(1)
    return (sharpness * torch.randn(rows, width, generator=generator(seed)) - 5).to(dtype)


@pytest.mark.parametrize(
    ("kernel", "temperature", "vocabulary"),
    pairwise(KERNELS, [0.3, 1.0, 1.7], [1, 2, 255, 257, 1003, 2049, 49152]),
)
def test_kernel_finds_the_token_at_the_uniform_number(
    kernel: tuple[torch.dtype, tuple[float, ...]], temperature: float, vocabulary: int
) -> None:
    dtype, weights = kernel
    draws, suppressed = 24, (0, vocabulary // 2) if vocabulary > 2 else ()
    logits = likely_logits(draws * len(weights), vocabulary, dtype)
    asked = wanted(vocabulary, weights, suppressed, temperature, top_p=0.9)
    uniform = torch.rand(draws, 1, generator=generator(1))
    uniform[0], uniform[1] = 0, 1 - 2**-24
    tokens, inside, finite = cpp.sample_tokens(
        logits, asked.weights / temperature, asked.suppressed, Nucleus(0.9), torch.arange(draws), uniform
    )
    scores = (logits.double().view(len(weights), draws, -1) * asked.weights.view(-1, 1, 1)).sum(0)
    scores[:, suppressed] = -torch.inf
    probs = (scores / temperature).softmax(-1)
    own = probs.gather(1, tokens.unsqueeze(1))
    upper = probs.cumsum(-1).gather(1, tokens.unsqueeze(1))
    # float32 scores up to 80 are within 4e-6 of the equation, and a sum of shares moves by less than that.
    near = 1e-5
    assert finite and ((upper - own - near <= uniform) & (uniform <= upper + near)).all() and (own > 0).all()
    above = (probs * (probs > own * (1 + near))).sum(-1)
    reached = (probs * (probs >= own * (1 - near))).sum(-1)
    assert (above[inside] < 0.9 + near).all(), "in the nucleus"
    assert (reached[~inside] - own[~inside, 0] >= 0.9 - near).all(), "outside"


@pytest.mark.parametrize(
    ("kernel", "nucleus_of", "temperature", "top_p", "vocabulary"),
    pairwise(KERNELS, NUCLEI, [0.0, 0.7, 1.0], [0.1, 0.5, 0.9, 1.0], [61, 1003]),
)
def test_kernel_draws_what_the_equation_draws_from_the_same_generator(
    kernel: tuple[torch.dtype, tuple[float, ...]],
    nucleus_of: int | None,
    temperature: float,
    top_p: float,
    vocabulary: int,
) -> None:
    dtype, weights = kernel
    logits = likely_logits(40 * len(weights), vocabulary + 5, dtype)
    logits[:, vocabulary:] = torch.nan  # reward tokens and padding are not read
    logits[: 3 * len(weights), 7:20] = -torch.inf if len(weights) == 1 else 0
    asked = wanted(vocabulary, weights, (3, vocabulary - 1), temperature, top_p, stream(nucleus_of, weights))
    ours, theirs = generator(2), generator(2)
    # Of 2,000 uniform numbers of these seeds none lies within rounding of a border.
    for _ in range(3):
        assert torch.equal(draw_tokens(logits, asked, ours), draw_by_equation(logits.clone(), asked, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state()), "a resumed run draws the same further tokens"


# --- How likely the token was ----------------------------------------------------------------------

# The Triton kernel runs in its interpreter.
ENGINES = {"torch": draw_by_equation, "cpp": draw_tokens, "triton": draw_on_gpu}


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "triton":  # by name, as the conftest.py that has it is not there when levels are tried
        request.getfixturevalue("quick_interpreter")
    return name


def probabilities(logits: Tensor, asked: NextToken, weights: Tensor | None = None) -> Tensor:
    """(N, V) float64, before the nucleus, of the streams by their own weights or by those given."""
    weights = asked.weights if weights is None else weights
    by_stream = logits[:, : asked.vocabulary].double().view(len(weights), -1, asked.vocabulary)
    scores = (by_stream * weights.double().view(-1, 1, 1)).sum(0)
    scores[:, asked.suppressed] = -torch.inf
    return (scores / asked.temperature).softmax(-1)


def inside(logits: Tensor, asked: NextToken, top_p: float) -> Tensor:
    """(N, V) bool, by sorting: the tokens that may be drawn."""
    alone = None
    if asked.top_p >= 1:
        return torch.ones_like(probabilities(logits, asked), dtype=torch.bool)
    if asked.nucleus_of is not None:
        alone = torch.zeros_like(asked.weights)
        alone[asked.nucleus_of] = 1
    return nucleus(probabilities(logits, asked, alone), top_p)


def log_q(probs: Tensor, tokens: Tensor, inside: Tensor) -> Tensor:
    """In float64; of a token outside the nucleus what it would be if its mass were there."""
    mass = (probs * inside).sum(-1)
    return (probs.gather(1, tokens.unsqueeze(1)).squeeze(1) / mass).log()


@pytest.mark.parametrize(
    ("engine", "nucleus_of", "vocabulary", "top_p", "temperature", "weights", "dtype"),
    pairwise(
        list(ENGINES),
        NUCLEI,
        [1, 2, 61, 257, 2051],
        [0.05, 0.5, 0.9, 0.999, 1.0],
        [0.7, 1.0, 1.7],
        [(1.0,), (2.5, -1.5)],
        KERNEL_DTYPES,
    ),
    indirect=["engine"],
)
def test_log_q_is_that_of_the_truncated_distribution_in_float64(
    engine: str,
    nucleus_of: int | None,
    vocabulary: int,
    top_p: float,
    temperature: float,
    weights: tuple[float, ...],
    dtype: torch.dtype,
) -> None:
    rows, suppressed = 12, (0, vocabulary // 2) if vocabulary > 2 else ()
    logits = likely_logits(rows * len(weights), vocabulary + 3, dtype, seed=8)
    logits[:, vocabulary:] = torch.nan  # reward tokens and padding are not read
    logits[::rows] = 1.5  # the nucleus of equals is all of them
    logits[1::rows, -4] = 60 if len(weights) == 1 else 0
    asked = wanted(vocabulary, weights, suppressed, temperature, top_p, stream(nucleus_of, weights))
    found = torch.full((rows,), torch.nan)
    told = ENGINES[engine](logits.clone(), asked, generator(9), found)
    assert torch.equal(told, ENGINES[engine](logits.clone(), asked, generator(9))), "telling changes no draw"
    probs = probabilities(logits, asked)
    # Where the mass up to a token is within rounding of top_p, either nucleus is right.
    near = 1e-5 if top_p < 1 else 0.0
    low, high = (log_q(probs, told, inside(logits, asked, top_p + side)) for side in (near, -near))
    assert (high - low < 1e-4).sum() >= rows - 2, "so near it is by chance"
    # float32 scores up to 80, and sums of their exponentials.
    assert ((low - 5e-5 < found) & (found < high + 5e-5)).all()
    if engine == "torch":
        exact = log_probabilities(probs.log(), told, top_p)
        whole = log_q(probs, told, nucleus(probs, top_p))
        torch.testing.assert_close(exact, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("nucleus_of", [0, 1])
def test_draws_follow_the_mix_within_the_nucleus_of_a_stream(engine: str, nucleus_of: int) -> None:
    draws, vocabulary = 120 if engine == "triton" else 20_000, 40  # its interpreter takes its time
    logits = 2 * torch.randn(2, vocabulary, generator=generator(22))
    logits[1] = (logits[0] + logits[1]) / 2
    logits[:, 7] = torch.tensor(
        [-12.0, -30.0]
    )  # what the first stream would hardly write, and the other never
    asked = wanted(vocabulary, (3.0, -2.0), (5,), 0.8, 0.9, nucleus_of)
    probs, may = probabilities(logits, asked)[0], inside(logits, asked, 0.9)[0]
    assert probs[7] > 0.5 and not may[7] and 5 < int(may.sum()) < 20
    tokens = ENGINES[engine](logits.repeat_interleave(draws, 0), asked, generator(1))
    assert_drawn_from(tokens.bincount(minlength=vocabulary), probs * may)


@pytest.mark.parametrize("impl", ["eager", "cpp", "triton"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_model_log_p_is_that_of_the_base_vocabulary_in_float64(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_choose", lambda *_: impl)
    logits = (3 * torch.randn(7, 305, generator=generator(1)) - 5).to(dtype)
    logits[:, 300:] = torch.nan  # reward tokens and padding are not read
    logits[:, 40:50] = -torch.inf
    tokens = torch.tensor([0, 17, 39, 50, 200, 298, 299])
    found = model_log_p(logits, tokens, 300)
    expected = logits[:, :300].double().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert found.dtype == torch.float32
    # Sums of 300 exponentials in float32, log p down to -20.
    assert found.double() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("draw", [draw_by_equation, draw_tokens])
def test_logits_stay_as_they_are_for_whoever_reads_them_next(
    draw: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    logits = torch.randn(6, 40, generator=generator(1)).to(dtype)
    before = logits.clone()
    for temperature in (0.0, 0.7, 1.0):
        draw(logits, wanted(37, suppressed=(3, 5), temperature=temperature, top_p=0.9), generator())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("weights", STREAMS)
def test_log_q_of_a_greedy_token_is_0(engine: str, weights: tuple[float, ...]) -> None:
    logits = likely_logits(5 * len(weights), 300, torch.float32)
    found = torch.full((5,), torch.nan)
    ENGINES[engine](logits, wanted(300, weights, (3,), temperature=0.0), generator(), found)
    assert found.tolist() == [0.0] * 5


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_mean_of_minus_log_q_is_the_entropy_and_beside_another_models_the_kl(engine: str) -> None:
    """H(q) and KL(q || p0) by their sums over the vocabulary, against the mean over draws."""
    draws, vocabulary = 200 if engine == "triton" else 4000, 40  # its interpreter takes its time
    logits, other = (1.5 * torch.randn(1, vocabulary, generator=generator(seed)) for seed in (20, 21))
    asked = wanted(vocabulary, suppressed=(5,), temperature=0.8, top_p=0.9)
    found = torch.empty(draws)
    tokens = ENGINES[engine](logits.repeat(draws, 1), asked, generator(1), found)
    probs, base = probabilities(logits, asked)[0], other[0].double().log_softmax(-1)
    q = probs * nucleus(probs[None], 0.9)[0]
    q = (q / q.sum())[q > 0]
    base_of_q = base[(probs * nucleus(probs[None], 0.9)[0]) > 0]
    own, theirs = -found.double(), -base[tokens]
    for drawn, exact in (
        (own, -(q * q.log()).sum()),
        (theirs - own, (q * (q.log() - base_of_q)).sum()),
        (theirs, -(q * base_of_q).sum()),
    ):
        # Four standard errors: one seed in 16,000 is farther off.
        assert abs(float(drawn.mean() - exact)) < 4 * float(drawn.std()) / draws**0.5
    untruncated = -(probs.clamp(min=1e-300).log() * probs).sum()
    assert float(untruncated + (q * q.log()).sum()) > 0.2, "a model that forgot the nucleus would be seen"


def test_kernel_tells_nothing_of_a_token_outside_the_nucleus_or_of_a_row_without_one() -> None:
    logits = torch.zeros(2, 9)
    logits[0, 3], logits[1, 2] = 3.0, torch.nan
    found = torch.zeros(3)
    tokens, inside, finite = cpp.sample_tokens(
        logits,
        torch.ones(1),
        torch.empty(0, dtype=torch.long),
        Nucleus(0.3),
        torch.tensor([0, 0, 1]),
        torch.tensor([[0.0], [0.5], [0.5]]),
        found,
    )
    assert tokens.tolist() == [0, 3, -1] and inside[:2].tolist() == [False, True] and not finite
    assert found[[0, 2]].isnan().all() and found[1] == 0, "alone in its nucleus"


def test_kernel_reads_rows_where_they_lie() -> None:
    steps = likely_logits(30, 300, torch.bfloat16).view(10, 3, 300)
    for view in (steps[:, -1], steps[::2, 1, :200], steps[:1, 0], steps[0, :1].expand(50, -1), steps[3:3, 0]):
        asked = wanted(view.shape[1], top_p=0.8)
        found = draw_tokens(view, asked, generator(3))
        assert torch.equal(found, draw_tokens(view.contiguous(), asked, generator(3)))
    columns = likely_logits(300, 10, torch.float32).T  # not adjacent: copied
    found = draw_tokens(columns, wanted(300), generator(3))
    assert torch.equal(found, draw_tokens(columns.contiguous(), wanted(300), generator(3)))


def test_the_most_probable_token_is_the_lowest_of_equals_even_far_apart() -> None:
    logits = torch.full((3, 5000), -torch.inf)
    logits[0, [4999, 2100, 2099]] = -3.0
    logits[1, [4999]] = -3.0
    logits[2, [0, 4999]] = 0.0
    assert draw_tokens(logits, wanted(5000, temperature=0.0), generator()).tolist() == [2099, 4999, 0]
    logits[0, [5, 6]] = -2.0
    asked = wanted(5000, suppressed=(5, 2099), temperature=0.0)
    assert draw_tokens(logits, asked, generator()).tolist() == [6, 4999, 0]


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("largest", [5.0, 300.0])
def test_suppressed_tokens_take_no_mass_however_likely(largest: float, top_p: float) -> None:
    logits = torch.zeros(1, 9)
    logits[0, [0, 8]] = largest
    asked = wanted(9, suppressed=(8, 0), top_p=top_p)
    counts = draw_tokens(logits.expand(7000, -1), asked, generator()).bincount(minlength=9)
    assert_drawn_from(counts, torch.tensor([0.0, *[1.0] * 7, 0.0]))


BROKEN = {
    "nan": 0x7FC00000,
    "negative nan": 0xFFC00000,
    "nan with a payload": 0x7F800101,
    "negative nan with a payload": 0xFF800101,
    "inf": 0x7F800000,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("weights", STREAMS)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_logit_that_is_no_number_is_an_error_wherever_it_is(
    broken: str, weights: tuple[float, ...], dtype: torch.dtype, temperature: float
) -> None:
    value = torch.from_numpy(np.array([BROKEN[broken]], dtype=np.uint32)).view(torch.float32).to(dtype)
    asked = wanted(3001, weights, (), temperature)
    for row in range(2 * len(weights)):
        for column in (0, 1500, 3000):
            logits = likely_logits(2 * len(weights), 3001, dtype)
            draw_tokens(logits, asked, generator())
            logits[row, column] = value
            with pytest.raises(NotFinite, match="NaN or infinite"):
                draw_tokens(logits, asked, generator())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("weights", "where"),
    [
        ((1.0,), (slice(1, 2), slice(None))),  # nothing to draw
        ((2.5, -1.5), (slice(1, 2), slice(None))),  # in the second stream
        ((2.5, -1.5), (slice(None), slice(4, 5))),  # inf - inf
        ((2.5, -1.5), (slice(1, 2), slice(4, 5))),  # + inf
        ((0.0, 1.0), (slice(0, 1), slice(4, 5))),  # 0 inf
    ],
)
def test_minus_infinity_is_an_error_where_the_mix_is_no_number(
    weights: tuple[float, ...], where: tuple[slice, slice], temperature: float
) -> None:
    logits = likely_logits(2, 9, torch.float32)
    logits[where] = -torch.inf
    asked = wanted(9, weights, temperature=temperature)
    with pytest.raises(NotFinite):
        draw_tokens(logits, asked, generator())
    with pytest.raises(NotFinite):
        draw_tokens(logits.double(), asked, generator())  # by the equation


def test_float64_is_drawn_by_the_equation() -> None:
    logits = likely_logits(20, 50, torch.float32)
    asked = wanted(50, top_p=0.9)
    found = draw_tokens(logits.double(), asked, generator())
    assert torch.equal(found, draw_tokens(logits, asked, generator()))


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("draw", [draw_by_equation, draw_tokens])
def test_the_callers_default_dtype_and_device_change_no_draw(
    draw: Callable[..., Tensor], other: torch.dtype | str
) -> None:
    logits, asked = likely_logits(50, 99, torch.float32), wanted(99, top_p=0.8)
    told = torch.empty(2, 50)
    expected = draw(logits, asked, generator(), told[0])
    with defaults(other):
        assert torch.equal(draw(logits, asked, generator(), told[1]), expected)
    assert torch.equal(*told)


def test_completions_keep_float32_sums_whatever_the_default_dtype() -> None:
    with defaults(torch.float64):
        live = LiveRows(2, 3, torch.tensor([9]), told=1)
        live.add(torch.tensor([9, 9]), torch.tensor([-0.5, -1.5], dtype=torch.float32))
    assert live.completions([9]) == [([9], [0.5]), ([9], [1.5])]


def test_threads_do_not_change_what_is_drawn() -> None:
    logits = likely_logits(64, 30_000, torch.bfloat16)
    each = [wanted(30_000, (2.5, -1.5), top_p=0.9, nucleus_of=of) for of in (None, 0)]
    alone = [draw_tokens(logits, asked, generator()) for asked in each]
    try:
        torch.set_num_threads(3)
        for asked, expected in zip(each, alone, strict=True):
            assert torch.equal(draw_tokens(logits, asked, generator()), expected)
    finally:
        torch.set_num_threads(1)


def test_what_does_not_fit_is_refused_before_anything_is_read() -> None:
    logits = torch.zeros(4, 9)
    fits = {
        "logits": logits,
        "weights": torch.ones(2),
        "suppressed": torch.tensor([8]),
        "nucleus": Nucleus(0.5),
        "rows": torch.tensor([1, 0]),
        "uniform": torch.tensor([[0.5], [0.0]]),
    }
    assert cpp.sample_tokens(**fits)[2]
    for change, message in [
        ({"suppressed": torch.tensor([9])}, r"suppressed\[0\] = 9 is outside \[0, 9\)"),
        ({"suppressed": torch.tensor([-1])}, r"suppressed\[0\] = -1"),
        ({"rows": torch.tensor([0, 2])}, r"rows\[1\] = 2 is outside \[0, 2\)"),
        ({"uniform": torch.tensor([[0.5], [1.0]])}, r"uniform\[1\] = 1.0+ is outside \[0, 1\)"),
        ({"uniform": torch.tensor([[torch.nan], [0.0]])}, r"uniform\[0\] = -?nan"),
        ({"uniform": torch.tensor([[0.5]])}, "uniform has 1 values for 2 rows"),
        ({"weights": torch.tensor([1.0, torch.inf])}, "weight of stream 1 is not finite"),
        ({"nucleus": Nucleus(0.0)}, "top_p = 0.0+ is not above 0"),
        ({"nucleus": Nucleus(0.5, 2)}, "nucleus_of = 2 is none of 2 streams, nor -1"),
        ({"nucleus": Nucleus(0.5, 1, torch.nan)}, "nucleus_weight = -?nan is not above 0"),
        ({"logits": logits.double()}, "logits of dtype float64"),
        ({"log_p": torch.zeros(3)}, "log_p has 3 values for 2 rows"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, "incompatible function arguments"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            cpp.sample_tokens(**fits | change)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_of_this_machine(level: str) -> None:
    """The comparisons again, with the kernels of one level."""
    chosen = "uniform_number or same_generator or no_number or equals or suppressed or cpp"
    run_again_at(level, __file__, chosen, "--noconftest")


@pytest.mark.parametrize("top_p", [0.0, -1.0, float("nan")])
def test_a_nucleus_of_no_mass_is_refused_before_any_kernel(top_p: float) -> None:
    with pytest.raises(ValueError, match="it must be above 0"):
        draw_tokens(torch.randn(2, 9), wanted(9, top_p=top_p), generator())
    # Of greedy tokens it says nothing.
    assert draw_tokens(torch.eye(9)[:2], wanted(9, temperature=0.0, top_p=top_p), generator()).tolist() == [
        0,
        1,
    ]
