"""The pool of rewards as it grows: boundaries (and labels of all samples) after every batch.

    pytest benchmarks/bench_pool.py --benchmark-only
    QUARK_FAST_BENCH=full OMP_NUM_THREADS=1 pytest benchmarks/bench_pool.py --benchmark-only

Without QUARK_FAST_BENCH=full a small size runs, in seconds, to show that everything works. The
clock covers the whole run: every batch is added and the K - 1 boundaries are computed after it, and
with `labels` the quantile of every sample so far. Before it starts, each row's answer is compared
with numpy's. The numpy rows get their rewards in one array that is already there, so they pay for
no growing. `authors` is the list pool of the paper's repository in our words, and holds (one-token)
samples; `ours_samples` is RolloutPool with the same samples, `ours` the C++ core alone. KLL
(datasketches), torch.quantile and pandas are not exact by this rule: their answers are not
compared. float32 rewards, except for Python lists. extra_info of `ours`: nanoseconds per insert,
mean time for boundaries, the worst round, resident memory per sample.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from quark_fast import _C
from quark_fast.pool import RolloutPool

try:
    import datasketches
except ImportError:
    datasketches = None
try:
    import pandas
except ImportError:
    pandas = None

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
Rewards = npt.NDArray[np.float32]
# One run: the boundaries (and labels) after the last batch, having computed them after each.
Run = Callable[[Rewards, int, int, bool], tuple[Any, Any]]

# (rewards, batch, K)
SIZES = (
    [
        (100_000, 4096, 5),
        (100_000, 4096, 32),
        (1_000_000, 4096, 32),
        (1_000_000, 65536, 5),
        (10_000_000, 65536, 5),
        (10_000_000, 65536, 32),
    ]
    if FULL
    else [(40_000, 4096, 5), (40_000, 4096, 32)]
)
# Beyond these sizes a row takes hours.
LARGEST = {"authors": 1_000_000, "ours_samples": 1_000_000, "pandas_qcut": 1_000_000}


def stream(n: int, kind: str) -> Rewards:
    """Rewards that keep their distribution, or that improve by three standard deviations."""
    rewards = np.random.default_rng(0).normal(size=n)
    if kind == "drifting":
        rewards += np.linspace(0, 3, n)
    return rewards.astype(np.float32)


def so_far(rewards: Rewards, batch: int) -> Iterator[Rewards]:
    for start in range(0, len(rewards), batch):
        yield rewards[: start + batch]


def cuts(n: int, k: int) -> npt.NDArray[np.int64]:
    return np.array([-(-j * n // k) for j in range(1, k)])


def numpy_labels(rewards: Rewards, thresholds: Rewards) -> npt.NDArray[np.int32]:
    """Whichever of numpy's two ways is the faster for this many thresholds."""
    if len(thresholds) > 8:
        return np.searchsorted(thresholds, rewards, side="right").astype(np.int32)
    labels = np.zeros(len(rewards), np.int32)
    for threshold in thresholds:
        labels += rewards >= threshold
    return labels


# --- the rows --------------------------------------------------------------------------------


def ours(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    pool = _C.QuantilePool32(k, _C.Ties.same, _C.Remainder.spread, 0)
    labels = None
    for start in range(0, len(rewards), batch):
        pool.add(rewards[start : start + batch])
        thresholds = pool.thresholds()
        labels = pool.labels() if label else None
    return thresholds[::-1], labels


def ours_samples(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    pool = RolloutPool(k, dtype="float32")
    labels = None
    for start in range(0, len(rewards), batch):
        part = rewards[start : start + batch]
        pool.add([[1]] * len(part), [[2]] * len(part), part)
        thresholds = pool.thresholds
        labels = pool.labels() if label else None
    return thresholds, labels


def argsort(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    labels = None
    for part in so_far(rewards, batch):
        order = np.argsort(part)
        thresholds = part[order[(len(part) - cuts(len(part), k))[::-1]]]
        labels = numpy_labels(part, thresholds) if label else None
    return thresholds, labels


def partition(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    labels = None
    for part in so_far(rewards, batch):
        ranks = (len(part) - cuts(len(part), k))[::-1]
        thresholds = np.partition(part, ranks)[ranks]
        labels = numpy_labels(part, thresholds) if label else None
    return thresholds, labels


def torch_quantile(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    labels = None
    for part in so_far(rewards, batch):
        # As exact as torch.quantile goes: the rank is asked for as a float64 share of n - 1.
        ranks = (len(part) - cuts(len(part), k))[::-1].copy()
        shares = torch.from_numpy(ranks / (len(part) - 1)).float()
        found = torch.quantile(torch.from_numpy(part), shares, interpolation="nearest")
        thresholds = found.numpy()
        labels = numpy_labels(part, thresholds) if label else None
    return thresholds, labels


def authors(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    """Everything sorted anew as Python lists, quantiles beside, and a deep copy given out."""
    prompts: list[str] = []
    responses: list[str] = []
    scores: list[float] = []
    for start in range(0, len(rewards), batch):
        part = rewards[start : start + batch].tolist()
        prompts += ["p"] * len(part)
        responses += ["r"] * len(part)
        scores += part
        ranked = sorted(
            zip(prompts, responses, scores, strict=True), key=lambda sample: sample[2], reverse=True
        )
        prompts, responses, scores = (list(column) for column in zip(*ranked, strict=True))
        quantiles = [k - 1 - i * k // len(scores) for i in range(len(scores))]
        copy.deepcopy((prompts, responses, quantiles))
    return np.array([scores[cut - 1] for cut in cuts(len(scores), k)[::-1]], np.float32), None


def pandas_qcut(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    for part in so_far(rewards, batch):
        labels = pandas.qcut(part, k, labels=False)
    return None, labels  # interpolated boundaries: not the same rule


def kll(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    sketch = datasketches.kll_floats_sketch(200)
    for start in range(0, len(rewards), batch):
        sketch.update(rewards[start : start + batch])
        sketch.get_quantiles([j / k for j in range(1, k)])
    return None, None


ROWS: dict[str, Run] = {
    run.__name__: run for run in (ours, ours_samples, argsort, partition, torch_quantile, authors)
}
if pandas is not None:
    ROWS["pandas_qcut"] = pandas_qcut
if datasketches is not None:
    ROWS["kll"] = kll
EXACT = ("ours", "ours_samples", "argsort", "partition", "authors")


def require_right_answer(name: str, k: int, label: bool) -> None:
    rewards = stream(5000, "stationary")
    expected = -np.sort(-rewards)[cuts(len(rewards), k) - 1][::-1]
    thresholds, labels = ROWS[name](rewards, 999, k, label)
    if name in EXACT:
        np.testing.assert_array_equal(thresholds, expected)
        if labels is not None:
            np.testing.assert_array_equal(labels, numpy_labels(rewards, expected))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def about_our_rounds(rewards: Rewards, batch: int, k: int) -> dict[str, float]:
    before = resident_bytes()
    pool = _C.QuantilePool32(k, _C.Ties.same, _C.Remainder.spread, 0)
    adding, cutting = [], []
    for start in range(0, len(rewards), batch):
        began = time.perf_counter()
        pool.add(rewards[start : start + batch])
        added = time.perf_counter()
        pool.thresholds()
        adding.append(added - began)
        cutting.append(time.perf_counter() - added)
    return {
        "ns_per_insert": 1e9 * sum(adding) / len(rewards),
        "boundaries_ms": 1e3 * sum(cutting) / len(cutting),
        "worst_round_ms": 1e3 * max(a + c for a, c in zip(adding, cutting, strict=True)),
        "resident_bytes_per_sample": (resident_bytes() - before) / len(rewards),
    }


CASES = [
    pytest.param(n, batch, k, label, kind, name, id=f"{name}-{n}-{batch}-{k}-{kind}{'-labels' * label}")
    for n, batch, k in SIZES
    for label in (False, True)
    for kind in ("stationary", "drifting")
    for name in ROWS
    if n <= LARGEST.get(name, n)
    if not (n > 2**24 and name == "torch_quantile")  # which refuses more
    # labels come with these rows whether asked for or not; a sketch has none
    if not (name in ("authors", "pandas_qcut") and not label) and not (name == "kll" and label)
]


@pytest.mark.parametrize(("n", "batch", "k", "label", "kind", "name"), CASES)
def test_growing_pool(
    benchmark: BenchmarkFixture, n: int, batch: int, k: int, label: bool, kind: str, name: str
) -> None:
    require_right_answer(name, k, label)
    rewards = stream(n, kind)
    what = "boundaries and all labels" if label else "boundaries"
    benchmark.group = f"{n:,} {kind} rewards, batches of {batch}, K={k}: {what}"
    repeats = 5 if name.startswith("ours") or n <= 100_000 else 1
    if name == "ours":
        benchmark.extra_info.update(about_our_rounds(rewards, batch, k))
    benchmark.pedantic(ROWS[name], args=(rewards, batch, k, label), rounds=repeats)
