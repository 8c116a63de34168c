"""The Triton kernel from logits to tokens, on a GPU or interpreted: against its own rule in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import assert_drawn_from
from pairwise import pairwise
from torch import Tensor

from quark_fast.ops import token_kernel
from quark_fast.ops.rows import KERNEL_DTYPES, Nucleus
from quark_fast.rollout.tokens import NextToken, draw_on_gpu

pytestmark = pytest.mark.usefixtures("quick_interpreter", "on_the_device")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE = torch.tensor([], dtype=torch.long, device=DEVICE)
ONE = torch.ones(1, device=DEVICE)


@pytest.fixture
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def by_rule(scores: Tensor, top_p: float, uniform: Tensor) -> tuple[int, float]:
    """(the token of a row of float64 scores, how near a draw came to the border between two, as a share)."""
    mass = (scores - scores.max()).exp()
    whole, near = float(mass.sum()), 1.0
    for u in uniform.tolist():
        upper = mass.cumsum(0)
        token = int((upper <= u * upper[-1]).sum())
        borders = upper[max(0, token - 1) : token + 1] / upper[-1]
        near = min(near, float((borders - u).abs().min()))
        above = float(mass[scores > scores[token]].sum())
        # The masses above are those of the whole row, as whoever is not above is out already.
        near = min(near, abs(above / whole - top_p))
        if above < top_p * whole:
            return token, near
        mass = torch.where(scores > scores[token], mass, 0.0)
    return int(scores.argmax()), near


def scores_of(logits: Tensor, weights: Tensor, vocabulary: int, suppressed: Tensor) -> Tensor:
    streams = len(weights)
    mixed = (logits[:, :vocabulary].double().view(streams, -1, vocabulary) * weights.view(-1, 1, 1)).sum(0)
    mixed[:, suppressed] = -torch.inf
    return mixed


def cut_to_nucleus(scores: Tensor, own: Tensor, top_p: float) -> list[float]:
    """Leave in float64 scores the nucleus of the scores `own`; how near to its border a row of these is."""
    falling = own.sort(-1, descending=True).values
    before = torch.cat([torch.zeros_like(own[:, :1]), falling.softmax(-1).cumsum(-1)], -1)
    above = before.gather(-1, torch.searchsorted(-falling, -own))
    scores[above >= top_p] = -torch.inf
    return [float(row.min()) for row in (above - top_p).abs()]


@pytest.mark.parametrize(
    ("columns", "nucleus_of", "top_p", "weights", "dtype"),
    pairwise(
        [(1, 0), (2, 0), (61, 16), (257, 64), (300, 256), (5003, 0)],
        [-1, 0, 1],
        [0.05, 0.6, 0.9, 1.0],
        [(1.0,), (1 / 0.7,), (2.5, -1.5)],
        KERNEL_DTYPES,
    ),
)
def test_kernel_draws_by_its_rule(
    columns: tuple[int, int], nucleus_of: int, top_p: float, weights: tuple[float, ...], dtype: torch.dtype
) -> None:
    vocabulary, width = columns
    rows, of = 6, torch.tensor(weights)
    sharpness = torch.linspace(0.5, 4, rows * len(of)).unsqueeze(1)
    logits = (sharpness * torch.randn(rows * len(of), vocabulary + 3, generator=generator(1)) - 5).to(dtype)
    logits[:, vocabulary:] = torch.nan  # reward tokens and padding are not read
    if vocabulary > 60:
        logits[:, 7:20] = -torch.inf if len(of) == 1 else 0
    suppressed = torch.tensor([0, vocabulary // 2]) if vocabulary > 2 else NONE
    uniform = torch.rand(rows, token_kernel.DRAWS, generator=generator(2))
    uniform[0, 0], uniform[1, 0] = 0, 1 - 2**-24
    nucleus = Nucleus(top_p, min(nucleus_of, len(of) - 1), 1 / 0.7)
    found = token_kernel.sample_tokens(logits, of, suppressed, nucleus, uniform, vocabulary, width).tolist()
    scores = scores_of(logits, of, vocabulary, suppressed)
    cut_near = [1.0] * rows
    if nucleus.stream >= 0 and top_p < 1:
        own = logits.view(len(of), rows, -1)[nucleus.stream]
        cut_near = cut_to_nucleus(
            scores, scores_of(own, torch.tensor([1 / 0.7]), vocabulary, suppressed), top_p
        )
        top_p = 1.0
    for row in range(rows):
        token, near = by_rule(scores[row], top_p, uniform[row])
        near = min(near, cut_near[row])
        assert scores[row, found[row]] > -torch.inf
        # Float32 sums move a border by less than this.
        assert found[row] == token or near < 1e-5


def test_the_rule_draws_by_the_probabilities_within_the_nucleus() -> None:
    scores = 2 * torch.randn(9, generator=generator(3), dtype=torch.float64)
    uniform = torch.rand(8000, token_kernel.DRAWS, generator=generator(4))
    found = torch.tensor([by_rule(scores, 0.8, row)[0] for row in uniform])
    probs = scores.softmax(-1)
    inside = torch.tensor([float(probs[probs > p].sum()) < 0.8 for p in probs])
    assert 2 < int(inside.sum()) < 9
    assert_drawn_from(found.bincount(minlength=9), probs * inside)


def test_the_most_probable_token_is_the_lowest_of_equals_and_what_is_left_when_no_draw_helps() -> None:
    logits = torch.full((3, 300), -torch.inf)
    logits[0, [299, 70, 69]] = -3.0
    logits[1, 299] = -3.0
    logits[2, [0, 299]] = 0.0
    assert token_kernel.sample_tokens(logits, ONE, NONE, Nucleus(1.0), None, 300, 64).tolist() == [69, 299, 0]
    suppressed = torch.tensor([69, 0])
    assert token_kernel.sample_tokens(logits, ONE, suppressed, Nucleus(1.0), None, 300, 64).tolist() == [
        70,
        299,
        299,
    ]
    # A single draw each, of which the greater part is outside of a nucleus of one token.
    logits = torch.randn(50, 40, generator=generator(5))
    uniform = torch.rand(50, 1, generator=generator(6))
    log_p = torch.empty(50)
    found = token_kernel.sample_tokens(logits, ONE, NONE, Nucleus(1e-6), uniform, 40, log_p=log_p)
    assert torch.equal(found, logits.argmax(-1))
    torch.testing.assert_close(log_p, torch.zeros(50), rtol=0, atol=1e-6)  # alone in its nucleus


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("uniform", [None, torch.full((2, 4), 0.5, device=DEVICE)])
@pytest.mark.parametrize("weights", [(1.0,), (2.5, -1.5)])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, "nothing"])
def test_a_row_without_a_distribution_is_marked_and_the_others_are_drawn(
    broken: float | str, weights: tuple[float, ...], uniform: Tensor | None
) -> None:
    for stream in range(len(weights)):
        for column in (0, 150, 299):
            logits = torch.randn(2 * len(weights), 300, generator=generator(7))
            if broken == "nothing":
                logits[2 * stream + 1] = -torch.inf
            else:
                logits[2 * stream + 1, column] = broken
            log_p, asked = torch.zeros(2), (torch.tensor(weights), NONE, Nucleus(0.9), uniform, 300, 64)
            found = token_kernel.sample_tokens(logits, *asked, log_p=log_p)
            assert found[0] >= 0 and found[1] == -1
            assert log_p[0] <= 0 and log_p[1].isnan()


def test_rows_are_read_where_they_lie() -> None:
    steps = torch.randn(4, 3, 130, generator=generator(8)).bfloat16()
    for view in (steps[:, -1], steps[::2, 1, :100], steps[0, :1].expand(5, -1), steps[:0, 0]):
        uniform = torch.rand(len(view), 8, generator=generator(9))
        asked = ONE, NONE, Nucleus(0.8), uniform, view.shape[1]
        found = token_kernel.sample_tokens(view, *asked)
        assert torch.equal(found, token_kernel.sample_tokens(view.contiguous(), *asked))
    columns = torch.randn(130, 4, generator=generator(8)).T  # not adjacent: copied
    wanted = NextToken(ONE, 130, NONE, 0.7, 0.9)
    found = draw_on_gpu(columns, wanted, generator())
    assert torch.equal(found, draw_on_gpu(columns.contiguous(), wanted, generator()))


def test_temperature_divides_and_0_is_greedy() -> None:
    logits = torch.randn(20, 50, generator=generator(10))
    cold = draw_on_gpu(logits, NextToken(ONE, 50, NONE, 1e-3, 1.0), generator())
    greedy = draw_on_gpu(logits, NextToken(ONE, 50, NONE, 0.0, 1.0), generator())
    assert torch.equal(cold, logits.argmax(-1)) and torch.equal(greedy, cold)
