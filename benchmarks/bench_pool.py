"""The pool of rewards as it grows: boundaries (and labels of all samples) after every batch.

    pytest benchmarks/bench_pool.py --benchmark-only
    python benchmarks/bench_pool.py benchmarks/results/pool.json

The first line runs a small size, in seconds, to show that everything works; the second runs all sizes on one
thread, writes them to the file and prints the bars beside what was measured (10 minutes).

A row's `total_ms` is the time of its whole run: every batch is added, the K - 1 boundaries are computed after
it, and with `labels` the quantile of every sample so far, as uint8 into memory that is used again. Before the
clock starts, each row's answer is compared with numpy's. Rows that compute everything anew every round would
take hours: of their `rounds` as many as fit into SECONDS are run (at least 3, spread evenly, the last among
them), and the times of the others are interpolated between these, from 0 (at most 1% too long for n log n).
They get their rewards in one array that is already there, so they pay for no growing.

`authors` is the list pool of the paper's repository in our words and holds (one-token) samples,
`ours_samples` is RolloutPool with the same, `ours` the C++ core alone. KLL (datasketches), torch.quantile and
pandas are not exact by this rule: their answers are not compared. float32 rewards, except for Python lists.
"""

import copy
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from quark_fast import _C
from quark_fast.pool.pool import RolloutPool

try:
    import datasketches
except ImportError:
    datasketches = None
try:
    import pandas
except ImportError:
    pandas = None

FULL = os.environ.get("QUARK_FAST_BENCH") == "full"
SECONDS = 1.0
Rewards = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

SIZES = (100_000, 1_000_000, 10_000_000) if FULL else (40_000,)
BATCHES = (4096, 65536) if FULL else (4096,)
LARGEST_AUTHORS = 1_000_000  # beyond, three rounds take minutes


def stream(n: int, kind: str) -> Rewards:
    """Rewards that keep their distribution, or that improve by three standard deviations."""
    rewards = np.random.default_rng(0).normal(size=n)
    if kind == "drifting":
        rewards += np.linspace(0, 3, n)
    return rewards.astype(np.float32)


def ends(n: int, batch: int) -> list[int]:
    """How many rewards there are after each batch."""
    return [*range(batch, n, batch), n]


def cuts(n: int, k: int) -> npt.NDArray[np.int64]:
    return np.array([-(-j * n // k) for j in range(1, k)])


def ranks(n: int, k: int) -> npt.NDArray[np.int64]:
    """Of the thresholds among the rewards in ascending order."""
    return (n - cuts(n, k))[::-1].copy()


class Labeller:
    """The quantile of every reward by numpy, into memory that is used again: faster than searchsorted."""

    def __init__(self, n: int) -> None:
        self.labels, self.reached = np.empty(n, np.uint8), np.empty(n, bool)

    def __call__(self, rewards: Rewards, thresholds: Rewards) -> Labels:
        labels, reached = self.labels[: len(rewards)], self.reached[: len(rewards)]
        labels.fill(0)
        for threshold in thresholds:
            np.greater_equal(rewards, threshold, out=reached)
            labels += reached.view(np.uint8)
        return labels


# --- rows that grow: (rewards, batch, k, label) -> (thresholds, labels) --------------------------


def ours(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    pool = _C.QuantilePool32(k, _C.Ties.same, _C.Remainder.spread, 0)
    buffer = np.empty(len(rewards), np.uint8)
    labels = None
    for start in range(0, len(rewards), batch):
        pool.add(rewards[start : start + batch])
        thresholds = pool.thresholds()
        labels = buffer[: pool.labels_into(buffer)] if label else None
    return thresholds[::-1], labels


def ours_samples(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    pool = RolloutPool(k, dtype="float32")
    prompts, completions = [[1]] * batch, [[2]] * batch
    buffer = np.empty(len(rewards), np.uint8)
    labels = None
    for start in range(0, len(rewards), batch):
        part = rewards[start : start + batch]
        pool.add(prompts[: len(part)], completions[: len(part)], part)
        thresholds = pool.thresholds
        labels = pool.labels(out=buffer) if label else None
    return thresholds, labels


def kll(rewards: Rewards, batch: int, k: int, label: bool) -> tuple[Any, Any]:
    sketch = datasketches.kll_floats_sketch(200)
    shares = [j / k for j in range(1, k)]
    for start in range(0, len(rewards), batch):
        sketch.update(rewards[start : start + batch])
        thresholds = sketch.get_quantiles(shares)
    return np.array(thresholds), None


Run = Callable[[Rewards, int, int, bool], tuple[Any, Any]]
GROWING: dict[str, Run] = {"ours": ours, "ours_samples": ours_samples}
if datasketches is not None:
    GROWING["kll"] = kll


# --- rows that start anew every round: (rewards so far, k, labeller) -> (thresholds, labels) ------


def argsort(rewards: Rewards, k: int, labeller: Labeller | None) -> tuple[Any, Any]:
    thresholds = rewards[np.argsort(rewards)[ranks(len(rewards), k)]]
    return thresholds, labeller and labeller(rewards, thresholds)


def partition(rewards: Rewards, k: int, labeller: Labeller | None) -> tuple[Any, Any]:
    wanted = ranks(len(rewards), k)
    thresholds = np.partition(rewards, wanted)[wanted]
    return thresholds, labeller and labeller(rewards, thresholds)


def torch_quantile(rewards: Rewards, k: int, labeller: Labeller | None) -> tuple[Any, Any]:
    # As exact as torch.quantile goes: the rank is asked for as a float share of n - 1.
    shares = torch.from_numpy(ranks(len(rewards), k) / (len(rewards) - 1)).float()
    thresholds = torch.quantile(torch.from_numpy(rewards), shares, interpolation="nearest").numpy()
    return thresholds, labeller and labeller(rewards, thresholds)


def pandas_qcut(rewards: Rewards, k: int, labeller: Labeller | None) -> tuple[Any, Any]:
    return None, pandas.qcut(rewards, k, labels=False)  # interpolated boundaries: not the same rule


class Authors:
    """Everything sorted anew as Python lists, quantiles beside, and a deep copy given out."""

    def __init__(self, before: list[float], new: list[float]) -> None:
        scores = sorted(before, reverse=True)  # as the round before left them
        self.columns = [["p"] * len(scores), ["r"] * len(scores), scores]
        self.new = [["p"] * len(new), ["r"] * len(new), new]

    def round(self, k: int) -> list[float]:
        columns = [old + new for old, new in zip(self.columns, self.new, strict=True)]
        ranked = sorted(zip(*columns, strict=True), key=lambda sample: sample[2], reverse=True)
        prompts, responses, scores = (list(column) for column in zip(*ranked, strict=True))
        quantiles = [k - 1 - i * k // len(scores) for i in range(len(scores))]
        copy.deepcopy((prompts, responses, quantiles))
        return scores


Anew = Callable[[Rewards, int, Labeller | None], tuple[Any, Any]]
ANEW: dict[str, Anew] = {"argsort": argsort, "partition": partition, "torch_quantile": torch_quantile}
if pandas is not None:
    ANEW["pandas_qcut"] = pandas_qcut


# --- measuring -------------------------------------------------------------------------------


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_round(name: str, rewards: Rewards, begin: int, end: int, k: int, labeller: Any) -> float:
    if name == "authors":
        pool = Authors(rewards[:begin].tolist(), rewards[begin:end].tolist())
        return timed(lambda: pool.round(k))
    return timed(lambda: ANEW[name](rewards[:end], k, labeller))


def interpolated_run(name: str, rewards: Rewards, batch: int, k: int, label: bool) -> dict[str, Any]:
    """Seconds of a whole run by as many of its rounds as fit into SECONDS."""
    every = ends(len(rewards), batch)
    labeller = Labeller(len(rewards)) if label else None
    seconds: dict[int, float] = {}
    for parts in itertools.chain([3, 6, 12], itertools.count(24, 24)):
        for part in range(parts, 0, -1):
            at = -(-len(every) * part // parts) - 1
            if at not in seconds and (parts == 3 or sum(seconds.values()) < SECONDS):
                begin = every[at - 1] if at else 0
                seconds[at] = one_round(name, rewards, begin, every[at], k, labeller)
        if len(seconds) == len(every) or sum(seconds.values()) >= SECONDS:
            break
    at = np.array(sorted(seconds))
    known = np.array([seconds[i] for i in at])
    total = np.interp(every, np.append(0, np.array(every)[at]), np.append(0, known)).sum()
    return {"total_ms": 1e3 * float(total), "rounds_run": len(at), "rounds": len(every)}


def require_right_answer(name: str, k: int, label: bool) -> None:
    rewards = stream(5000, "stationary")
    expected = -np.sort(-rewards)[cuts(len(rewards), k) - 1][::-1]
    if name == "authors":
        found = Authors(rewards[:4000].tolist(), rewards[4000:].tolist()).round(k)
        thresholds, labels = np.array(found, np.float32)[cuts(len(rewards), k) - 1][::-1], None
    elif name in GROWING:
        thresholds, labels = GROWING[name](rewards, 999, k, label)
    else:
        thresholds, labels = ANEW[name](rewards, k, Labeller(len(rewards)) if label else None)
    if name in ("ours", "ours_samples", "argsort", "partition", "authors"):
        np.testing.assert_array_equal(thresholds, expected)
        if labels is not None:
            np.testing.assert_array_equal(labels, np.searchsorted(expected, rewards, side="right"))


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))


def about_rounds(name: str, rewards: Rewards, batch: int, k: int) -> dict[str, float]:
    """Of one run of `ours` or `kll`, round by round."""
    before = anonymous_bytes()
    if name == "ours":
        core = _C.QuantilePool32(k, _C.Ties.same, _C.Remainder.spread, 0)
        add, cut = core.add, core.thresholds
    else:
        sketch = datasketches.kll_floats_sketch(200)
        shares = [j / k for j in range(1, k)]
        add, cut = sketch.update, lambda: sketch.get_quantiles(shares)
    adding, cutting = [], []
    for start in range(0, len(rewards), batch):
        part = rewards[start : start + batch]
        adding.append(timed(lambda part=part: add(part)))
        cutting.append(timed(cut))
    return {
        "ns_per_insert": 1e9 * sum(adding) / len(rewards),
        # In the last tenth of the run, where the pool is large.
        "boundaries_ms": 1e3 * statistics.mean(cutting[-max(len(cutting) // 10, 1) :]),
        "worst_round_ms": 1e3 * max(a + c for a, c in zip(adding, cutting, strict=True)),
        "bytes_per_sample": (anonymous_bytes() - before) / len(rewards),
    }


def in_a_fresh_process(name: str, n: int, kind: str, batch: int, k: int) -> dict[str, float]:
    """about_rounds() where no memory is left over from before; its first use is then in the figures."""
    return about_rounds(name, stream(n, kind), batch, k)


CASES = [
    pytest.param(n, batch, k, label, kind, name, id=f"{name}-{n}-{batch}-{k}-{kind}{'-labels' * label}")
    for n in SIZES
    for batch in BATCHES
    for k in (5, 32)
    for label in (False, True)
    for kind in ("stationary", "drifting")
    for name in (*GROWING, *ANEW, "authors")
    if not (name == "authors" and n > LARGEST_AUTHORS)
    # as `ours`, which labels for it: 12 billion labels in batches of 4096
    if not (name == "ours_samples" and label and n > 1_000_000)
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
    about = {"row": name, "n": n, "batch": batch, "k": k, "labels": label, "kind": kind}
    if name not in GROWING:
        found = benchmark.pedantic(interpolated_run, args=(name, rewards, batch, k, label))
        benchmark.extra_info.update(about | found)
        return
    seconds: list[float] = []
    run = GROWING[name]
    run_once = lambda: seconds.append(timed(lambda: run(rewards, batch, k, label)))  # noqa: E731
    benchmark.pedantic(run_once, rounds=5 if n < 500 * batch else 1)
    benchmark.extra_info.update(about | {"total_ms": 1e3 * statistics.median(seconds)})
    if name != "ours_samples" and not label:
        runs = [about_rounds(name, rewards, batch, k) for _ in range(3)]
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if n >= 10_000_000 and name == "ours" and batch == 65536:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                cold = fresh.apply(in_a_fresh_process, (name, n, kind, batch, k))
            middle |= {"bytes_per_sample": cold["bytes_per_sample"], "cold": cold}
        else:
            del middle["bytes_per_sample"]
        benchmark.extra_info.update(middle)


# --- the bars --------------------------------------------------------------------------------


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(what, bar, measured) from the rows of a results file."""

    def row(name: str, n: int, k: int, label: bool, kind: str = "stationary") -> dict[str, Any]:
        wanted = {"row": name, "n": n, "batch": 65536, "k": k, "labels": label, "kind": kind}
        return next(row for row in rows if wanted.items() <= row.items())

    def times(other: str, mine: str, n: int, label: bool, kind: str = "stationary") -> str:
        theirs = row(other, n, 5, label or other == "authors", kind)["total_ms"]
        return f"{theirs / row(mine, n, 5, label, kind)['total_ms']:,.0f} x"

    million, large = 1_000_000, 10_000_000
    core = row("ours", large, 5, False)
    insert, sketch = core["ns_per_insert"], row("kll", large, 5, False)["ns_per_insert"]
    many = row("ours", large, 32, False)["boundaries_ms"]
    table = [
        ("10 million, against np.argsort", ">= 200 x", times("argsort", "ours", large, False)),
        ("the same, all labels too", ">= 80 x", times("argsort", "ours", large, True)),
        ("10 million, against np.partition", ">= 45 x", times("partition", "ours", large, False)),
        ("the same, all labels too", "", times("partition", "ours", large, True)),
        (
            "10 million that drift, against np.argsort",
            "",
            times("argsort", "ours", large, False, "drifting"),
        ),
        ("the same, all labels too", "", times("argsort", "ours", large, True, "drifting")),
        (
            "1 million with samples, against the authors' pool",
            ">= 1,000 x",
            times("authors", "ours_samples", million, False),
        ),
        ("the same, all labels too", "", times("authors", "ours_samples", million, True)),
        ("100,000, against np.partition", "", times("partition", "ours", 100_000, False)),
        (
            "an insert, against KLL's (k=200, not exact)",
            "<= 0.5",
            f"{insert / sketch:.2f}: {insert:.1f} of {sketch:.1f} ns",
        ),
        ("bytes a sample in RAM, at 10 million", "<= 16", f"{core['bytes_per_sample']:.1f}"),
        ("worst round up to 10 million", "<= 30 ms", f"{core['worst_round_ms']:.1f} ms"),
        ("the same in a fresh process", "", f"{core['cold']['worst_round_ms']:.1f} ms"),
        ("boundaries at 10 million", "", f"{core['boundaries_ms']:.3f} ms"),
        ("the same, K=32", "<= 0.5 ms", f"{many:.3f} ms"),
    ]
    return table


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if path is None or path.suffix != ".json":
        print("usage: python benchmarks/bench_pool.py RESULTS.json")
        return 2
    environment = os.environ | {"QUARK_FAST_BENCH": "full", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        os.path.relpath(__file__),
        "--benchmark-only",
        "--benchmark-quiet",
    ]
    done = subprocess.run([*command, "--results", str(path)], env=environment)
    if done.returncode == 0:
        print("\n| what | bar | measured |\n|---|---|---|")
        for what, bar, measured in bars(json.loads(path.read_text())["rows"]):
            print(f"| {what} | {bar} | {measured} |")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
