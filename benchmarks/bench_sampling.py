"""From logits to tokens on the CPU: the equation in PyTorch / the kernel.

    pytest benchmarks/bench_sampling.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=1 pytest benchmarks/bench_sampling.py --benchmark-only \\
        --results benchmarks/results/sampling-1-thread.json

Without QUARK_FAST_BENCH=full a small size runs, in seconds, to show that everything works. One step draws a
token for each row from the logits of one stream, or of two as guidance mixes them; `nucleus` is top_p = 0.9,
with its redraws; `of-best` is that of the first of two streams. The tokens of both ways are compared first.
The clock is the kernel's. Before every round it also runs over the same step in PyTorch, `torch_ms`, over
the step that tells how likely each token was, `told_ms`, and over the floor, `floor_ms`: one read of the
logits by a plain sum.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from quark_fast.rollout.tokens import NextToken, draw_by_equation, draw_tokens

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
ROWS, VOCABULARY = (128, 49152) if FULL else (32, 4099)  # SmolLM2's vocabulary
WEIGHTS = {1: (1.0,), 2: (2.0, -1.0)}
# (temperature, top_p, the stream whose nucleus it is)
SETTINGS = {
    "all": (0.7, 1.0, None),
    "nucleus": (1.0, 0.9, None),
    "of-best": (1.0, 0.9, 0),
    "greedy": (0.0, 1.0, None),
}
EACH = [
    (streams, setting) for streams in WEIGHTS for setting in SETTINGS if (streams, setting) != (1, "of-best")
]


def milliseconds(step: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    step()
    return (time.perf_counter() - begun) * 1e3


@pytest.mark.parametrize(("streams", "setting"), EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_draw_tokens(benchmark: BenchmarkFixture, dtype: torch.dtype, streams: int, setting: str) -> None:
    temperature, top_p, nucleus_of = SETTINGS[setting]
    benchmark.group = f"N{ROWS}-V{VOCABULARY}"
    normal = torch.randn(streams * ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits = (3 * normal).to(dtype)
    none = torch.empty(0, dtype=torch.long)
    weights = torch.tensor(WEIGHTS[streams])
    wanted = NextToken(weights, VOCABULARY, none, temperature, top_p, nucleus_of)
    ours, theirs, third = (torch.Generator().manual_seed(1) for _ in range(3))
    log_q, expected = torch.empty(ROWS), torch.empty(ROWS)
    same = draw_tokens(logits, wanted, ours, log_q) == draw_by_equation(logits, wanted, theirs, expected)
    assert same.float().mean() > 0.9, "but where a uniform number is within rounding of a border"
    # Tokens that tie at the nucleus's end, in bfloat16 many, are set apart by PyTorch's rounding of the mix.
    torch.testing.assert_close(log_q[same], expected[same], rtol=0, atol=0.05)

    floor: list[float] = []
    torch_way: list[float] = []
    told: list[float] = []
    words = logits.flatten().view(torch.float32)

    def setup() -> None:
        torch_way.append(milliseconds(lambda: draw_by_equation(logits, wanted, theirs)))
        told.append(milliseconds(lambda: draw_tokens(logits, wanted, third, log_q)))
        words.sum()  # in a run, the head has just written the logits: whatever cache holds them has them
        floor.append(milliseconds(words.sum))

    def step() -> None:
        draw_tokens(logits, wanted, ours)

    benchmark.pedantic(step, setup=setup, rounds=20 if FULL else 5, warmup_rounds=2)
    if benchmark.stats is not None:  # None under --benchmark-disable
        median_ms = benchmark.stats.stats.median * 1e3
        benchmark.extra_info |= {
            "us_a_row": round(median_ms / ROWS * 1e3, 2),
            "floor_ms": round(statistics.median(floor), 4),
            "torch_ms": round(statistics.median(torch_way), 4),
            "told_ms": round(statistics.median(told), 4),
            "to_floor": round(median_ms / statistics.median(floor), 2),
            "torch_to_ours": round(statistics.median(torch_way) / median_ms, 1),
        }
