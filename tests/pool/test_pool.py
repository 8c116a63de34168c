"""The pool against numpy's rule of integer cuts, sample by sample."""

import json
import os
import sys
import tempfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pairwise import pairwise
from safetensors.numpy import load_file, save_file
from torch.multiprocessing import start_processes
from warm import START_METHOD

from quark_fast import _C
from quark_fast.files import atomic
from quark_fast.pool import pool, store
from quark_fast.pool.pool import RolloutPool

TIES = ["same", "arrival", "random"]
REMAINDERS = ["spread", "last"]
DTYPES = ["float32", "float64"]
# Ties, signed zeros, infinities, denormals of either dtype and neighbours, all at once.
AWKWARD = [0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, np.inf, -np.inf, 2.0**-149, -(2.0**-149), 3.5]


def cuts(n, k, remainder):
    return [-(-j * n // k) if remainder == "spread" else j * (n // k) for j in range(1, k)]


def numpy_rule(rewards, k, ties, remainder):
    """The oracle: labels of all samples, in order of arrival; ties as 'same' or by position."""
    c = np.array(cuts(len(rewards), k, remainder), int)
    if ties == "arrival":
        labels = np.zeros(len(rewards), int)
        labels[np.argsort(-rewards, kind="stable")] = [(c > place).sum() for place in range(len(rewards))]
        return labels
    worst_first, block, equal = np.unique(rewards, return_inverse=True, return_counts=True)
    better = len(rewards) - np.cumsum(equal)
    of_block = k - 1 - (2 * c < (2 * better + equal)[:, None]).sum(1)
    if len(worst_first) > 1:
        of_block[[0, -1]] = 0, k - 1
    return of_block[block]


def numpy_thresholds(rewards, labels, k):
    """The least reward of each quantile and all better ones; NaN where none is so good."""
    reached = [rewards[labels > quantile] for quantile in range(k - 1)]
    return np.array([some.min() if len(some) else np.nan for some in reached], rewards.dtype)


def rows(ids):
    """A prompt and a completion that tell which sample they belong to, of odd lengths."""
    return [[i] * (i % 3) for i in ids], [[i, i + 1][: 1 + i % 2] for i in ids]


def filled(rewards, batches=1, **options):
    made = RolloutPool(**options)
    for part in np.array_split(np.arange(len(rewards)), batches):
        made.add(*rows(part.tolist()), np.asarray(rewards)[part])
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewards_that_another_thread_changes_meanwhile_are_those_that_were_given(dtype, monkeypatch):
    rewards, pack = np.arange(8, dtype=dtype), pool.pack

    def changing(*given):
        packed = pack(*given)
        rewards[::2] = np.nan  # between what was counted and what the core reads
        return packed

    monkeypatch.setattr(pool, "pack", changing)
    made = RolloutPool(dtype=dtype)
    np.testing.assert_array_equal(made.add(*rows(range(8)), rewards), np.arange(8))
    np.testing.assert_array_equal(made.rewards, np.arange(8))
    assert (len(made), made.unscored) == (8, 0)


def assert_is_numpys(made, rewards):
    """Everything that the pool says about quantiles follows the rule for these rewards."""
    k, ties, remainder = (made.settings[name] for name in ("quantiles", "ties", "remainder"))
    labels = made.labels()
    np.testing.assert_array_equal(made.rewards, rewards)
    by_rule = numpy_rule(rewards, k, "same" if ties == "same" else "arrival", remainder)
    np.testing.assert_array_equal(made.thresholds, numpy_thresholds(rewards, by_rule, k))
    np.testing.assert_array_equal(made.quantile_sizes(), np.bincount(labels, minlength=k))
    np.testing.assert_array_equal(made[made.ids].quantiles, labels)
    if ties != "random":
        np.testing.assert_array_equal(labels, by_rule)
    else:  # the same sizes as by arrival, and never a better reward in a worse quantile
        np.testing.assert_array_equal(np.sort(labels), np.sort(by_rule))
        for quantile in range(k - 1):
            worse, better = rewards[labels <= quantile], rewards[labels > quantile]
            assert not len(worse) or not len(better) or worse.max() <= better.min()


# --- the rule --------------------------------------------------------------------------------


# n: empty, one, under and over K, one past a round number, large enough for the radix sort
@pytest.mark.parametrize(
    ("n", "k", "ties", "remainder", "dtype"),
    pairwise([0, 1, 4, 33, 101, 6000], [1, 2, 5, 32], TIES, REMAINDERS, DTYPES),
)
def test_labels_are_those_of_numpys_rule(n, k, ties, remainder, dtype):
    rng = np.random.default_rng(n + k)
    for rewards in (rng.normal(size=n), rng.choice(AWKWARD, n), np.zeros(n)):
        made = filled(rewards, 5, quantiles=k, ties=ties, remainder=remainder, dtype=dtype)
        assert_is_numpys(made, rewards.astype(dtype))


@pytest.mark.parametrize("core", [_C.QuantilePool32, _C.QuantilePool64])
def test_boundaries_stay_exact_when_runs_are_too_large_to_merge(core):
    rng = np.random.default_rng(0)
    # Each batch better than the last: the runs hardly overlap, the hardest case for the selection.
    batches = [rng.normal(size=700_001) + drift for drift in (0, 1, 4)]
    made = core(32, _C.Ties.same, _C.Remainder.spread, 0)
    for batch in batches:
        made.add(batch)
    rewards = made.rewards()
    assert len(made.run_sizes) == 3
    ranks = np.array(cuts(len(rewards), 32, "spread")) - 1
    np.testing.assert_array_equal(made.thresholds(), -np.partition(-rewards, ranks)[ranks])
    labels = (rewards[:, None] >= made.thresholds()).sum(1)
    np.testing.assert_array_equal(made.labels(), labels)


PASS_RATES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98]


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize("pass_rate", PASS_RATES)
def test_no_failure_is_labelled_best_and_no_success_worst(pass_rate, k):
    rewards = np.arange(1000) < round(1000 * pass_rate)
    made = filled(rewards.astype(float), 3, quantiles=k)
    np.testing.assert_array_equal(made.labels(), np.where(rewards, k - 1, 0))
    assert made.thresholds.tolist() == [1.0] * (k - 1)


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize(
    "shares",
    [
        [0.9, 0.05, 0.05],
        [0.05, 0.05, 0.9],
        [0.05, 0.9, 0.05],
        [0.25] * 4,
        [0.7, 0.1, 0.1, 0.1],
        [0.01, 0.01, 0.98],
    ],
)
def test_few_levels_of_reward_keep_their_order_and_both_ends(shares, k):
    counts = [round(1000 * share) for share in shares]
    levels = np.repeat(np.arange(len(shares)), counts)
    labels = filled(levels.astype(float), 2, quantiles=k).labels()
    of_level = [np.unique(labels[levels == level]) for level in range(len(shares))]
    assert all(len(found) == 1 for found in of_level)  # equal rewards share a quantile
    found = [int(one[0]) for one in of_level]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, k - 1)
    # Between them, each where its middle lies: counted from the worst, in floats.
    for level in range(1, len(shares) - 1):
        middle = (sum(counts[:level]) + counts[level] / 2) / 1000 * k
        assert abs(found[level] + 0.5 - middle) <= 0.5 + k / 1000


@pytest.mark.parametrize("ties", ["same", "arrival"])
def test_with_fewer_samples_than_quantiles_the_ends_are_the_ends(ties):
    labels = filled([3.0, 1.0, 2.0], quantiles=5, ties=ties).labels().tolist()
    assert labels == ([4, 0, 3] if ties == "same" else [4, 1, 3])  # cuts: 1, 2, 2, 3


def test_one_reward_alone_is_in_the_middle():
    made = filled([0.5] * 10, 2, quantiles=5)
    assert made.labels().tolist() == [2] * 10
    np.testing.assert_array_equal(made.thresholds, [0.5, 0.5, np.nan, np.nan])


def test_thresholds_are_numpys_inverted_cdf():
    rewards = np.random.default_rng(1).normal(size=257)
    expected = -np.quantile(-rewards, [3 / 4, 2 / 4, 1 / 4], method="inverted_cdf")
    np.testing.assert_array_equal(filled(rewards, quantiles=4).thresholds, expected)


def test_random_ties_are_one_order_for_every_k_and_fair():
    n = 400
    rewards = np.repeat([0.0, 1.0], n // 2)
    order = filled(rewards, 7, quantiles=n, ties="random", seed=3).labels()  # one sample each
    for k in (2, 5, 7):
        labels = filled(rewards, 2, quantiles=k, ties="random", seed=3).labels()
        np.testing.assert_array_equal(
            labels,
            k - 1 - np.searchsorted(np.array(cuts(n, k, "spread")), n - 1 - order, side="right"),
        )
    other = filled(rewards, quantiles=n, ties="random", seed=4).labels()
    assert (other != order).any()
    # Position in arrival says nothing about position in the order (standard error 1/sqrt(200)).
    assert abs(np.corrcoef(np.arange(n // 2), order[n // 2 :])[0, 1]) < 0.3


def test_denormals_are_told_apart_when_the_processor_flushes_them():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        labels = filled([0.0, 5e-324, 1e-310], quantiles=3).labels()
    finally:
        torch.set_flush_denormal(False)
    assert labels.tolist() == [0, 1, 2]


def test_none_and_nan_are_left_out_and_counted():
    made = RolloutPool(2)
    assert made.add([[1], [2], [3]], [[4], [5], [6]], [None, 1.0, float("nan")]).tolist() == [
        -1,
        0,
        -1,
    ]
    assert (len(made), made.unscored) == (1, 2)
    assert made[0].prompts[0].tolist() == [2]


SCORES = [0.5, 3.0, -1.25]  # exact in bfloat16


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor(SCORES, dtype=torch.bfloat16),
        torch.tensor(SCORES, requires_grad=True) * 1,
        list(torch.tensor(SCORES, requires_grad=True)),
        tuple(torch.tensor(SCORES, dtype=torch.bfloat16)),
        [torch.tensor(0.5), 3, -1.25],
        torch._neg_view(-torch.tensor(SCORES)),
    ],
    ids=["bfloat16", "requires grad", "list that requires grad", "tuple of bfloat16", "mixed", "negated"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rewards_may_be_tensors_of_any_kind(dtype, rewards):
    made = RolloutPool(2, dtype=dtype)
    made.add(*rows(range(3)), rewards)
    assert made.rewards.tolist() == SCORES


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rewards_are_left_out_and_counted(dtype, given):
    made = RolloutPool(2, dtype=dtype)
    rewards = np.ma.array([5.0, 1.0, 2.0], mask=[True, False, False], dtype=given)
    assert made.add(*rows(range(3)), rewards).tolist() == [-1, 0, 1]
    assert (made.rewards.tolist(), made.unscored) == ([1.0, 2.0], 1)
    made.add(*rows(range(2)), np.ma.array([7, 9], mask=[False, True]))
    assert (made.rewards.tolist(), made.unscored) == ([1.0, 2.0, 7.0], 2)


# --- a pool's life ---------------------------------------------------------------------------

reward_lists = st.lists(
    st.sampled_from(AWKWARD) | st.floats(width=32) | st.none() | st.integers(-3, 3), max_size=30
)


class PoolLife(RuleBasedStateMachine):
    """Any order of changes; after each the pool is what the plain dictionary of samples says."""

    folder = None

    @initialize(
        k=st.integers(1, 9),
        ties=st.sampled_from(TIES),
        remainder=st.sampled_from(REMAINDERS),
        dtype=st.sampled_from(DTYPES),
        in_folder=st.booleans(),
    )
    def start(self, in_folder, **options):
        self.options = {"quantiles": options.pop("k"), **options}
        self.folder = tempfile.TemporaryDirectory() if in_folder else None
        self.options["store"] = self.folder and self.folder.name
        self.pool = RolloutPool(**self.options)
        self.model = {}  # id -> (prompt, completion, reward, round)
        self.unscored = 0

    @rule(rewards=reward_lists, round=st.integers(0, 5))
    def add(self, rewards, round):
        first = len(self.pool)
        prompts, completions = rows(range(first, first + len(rewards)))
        ids = self.pool.add(prompts, completions, rewards, round=round)
        for prompt, completion, reward, sample in zip(
            prompts, completions, rewards, ids.tolist(), strict=True
        ):
            if reward is None or np.isnan(reward):
                assert sample == -1
                self.unscored += 1
            else:
                self.model[sample] = prompt, completion, reward, round

    @rule()
    def save_and_go_on_with_the_saved(self):
        resumed = RolloutPool(**self.options)
        resumed.load_state_dict(self.pool.state_dict())
        if self.model:
            before, after = self.pool.sample(20), resumed.sample(20)
            np.testing.assert_array_equal(before.ids, after.ids)
            np.testing.assert_array_equal(before.quantiles, after.quantiles)
        self.pool = resumed

    def teardown(self):
        if self.folder:
            self.folder.cleanup()

    @invariant()
    def agrees_with_the_model(self):
        made = self.pool
        assert (len(made), made.unscored) == (len(self.model), self.unscored)
        assert made.ids.tolist() == list(self.model)
        rewards = np.array([sample[2] for sample in self.model.values()], made.settings["dtype"])
        assert_is_numpys(made, rewards)
        held = made[made.ids]
        assert [row.tolist() for row in held.prompts] == [s[0] for s in self.model.values()]
        assert [row.tolist() for row in held.completions] == [s[1] for s in self.model.values()]
        assert held.rounds.tolist() == [s[3] for s in self.model.values()]


PoolLife.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
test_any_sequence_of_changes_leaves_the_right_pool = PoolLife.TestCase


class SmallFilesLife(PoolLife):
    """The same where segments are joined and written after a few samples."""

    def __init__(self):
        super().__init__()
        self.limits = store.SMALL, store.FLUSH_BYTES
        store.SMALL, store.FLUSH_BYTES = 8, 300

    def teardown(self):
        store.SMALL, store.FLUSH_BYTES = self.limits
        super().teardown()


SmallFilesLife.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
test_any_sequence_of_changes_leaves_the_right_files = SmallFilesLife.TestCase


@settings(max_examples=40, deadline=None)
@given(
    rewards=st.lists(st.sampled_from(AWKWARD) | st.floats(allow_nan=False), min_size=1, max_size=80),
    batches=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_labels_depend_neither_on_batches_nor_order(rewards, batches, seed):
    whole = filled(rewards).labels()
    np.testing.assert_array_equal(filled(rewards, batches).labels(), whole)
    order = np.random.default_rng(seed).permutation(len(rewards))
    np.testing.assert_array_equal(filled(np.array(rewards)[order], batches).labels(), whole[order])


def test_token_rows_may_be_lists_arrays_or_tensors():
    made = RolloutPool()
    made.add([[], np.arange(3), torch.tensor([7])], torch.tensor([[1, 2]] * 3), torch.ones(3))
    batch = made[[2, 0, 1]]
    assert [row.tolist() for row in batch.prompts] == [[7], [], [0, 1, 2]]
    assert [row.tolist() for row in batch.completions] == [[1, 2]] * 3
    assert all(row.dtype == np.int32 for row in batch.prompts + batch.completions)
    batch.completions[0][:] = 0  # a copy: the pool keeps its own
    assert made[2].completions[0].tolist() == [1, 2]


def test_an_array_of_rows_leaves_the_unscored_out():
    made = RolloutPool()
    made.add(np.arange(6).reshape(3, 2), torch.arange(6).reshape(3, 2) + 10, [1.0, None, 2.0])
    made.add(np.empty((2, 0), int), [[], []], [3.0, 4.0])
    batch = made[made.ids]
    assert [row.tolist() for row in batch.prompts] == [[0, 1], [4, 5], [], []]
    assert [row.tolist() for row in batch.completions] == [[10, 11], [14, 15], [], []]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("ties", TIES)
def test_labels_go_into_memory_that_is_used_again(ties, dtype):
    made = many_runs(ties=ties, quantiles=40)
    out = np.full(len(made) + 5, 99, dtype)
    labels = made.labels(out=out)
    assert np.shares_memory(labels, out) and labels.dtype == dtype
    np.testing.assert_array_equal(labels, made.labels())
    assert (out[len(made) :] == 99).all()


def test_labels_refuse_memory_that_does_not_fit():
    made = many_runs()
    read_only = np.empty(len(made), np.uint8)
    read_only.flags.writeable = False
    for out, message in [
        (np.empty(len(made) - 1, np.uint8), "out must be .* or more uint8"),
        (np.empty(len(made), np.float32), "got float32"),
        (np.empty((len(made), 1), np.uint8), "in one dimension"),
        (np.empty(2 * len(made), np.uint8)[::2], "contiguous and writable"),
        (read_only, "contiguous and writable"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.labels(out=out)
    with pytest.raises(ValueError, match="257 quantiles do not fit in labels of 8 bits"):
        filled([1.0], quantiles=257).labels(out=np.empty(1, np.uint8))


def test_an_unknown_sample_is_named():
    made = filled([1.0, 2.0, 3.0])
    for unknown in (7, -1):
        with pytest.raises(KeyError, match=f"sample {unknown} is not in the pool"):
            made[[0, unknown]]


# --- draws -----------------------------------------------------------------------------------


def many_runs(**options):
    """A pool of several sorted runs, with ties."""
    rng = np.random.default_rng(5)
    made = RolloutPool(**options)
    for size in (400, 150, 60, 20, 7, 1):
        made.add([[1]] * size, [[2]] * size, rng.integers(0, 60, size).astype(float))
    assert len(made._core.run_sizes) >= 4
    return made


def assert_uniform(drawn, members):
    """Each member is drawn, none else is, and all equally often: chi-square under mean + 6 sd."""
    found, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(found, members)
    expected = len(drawn) / len(members)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(members) - 1
    assert abs(chi_square - freedom) < 6 * np.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("chosen", [0, 1, 4, [0, 4], None])
def test_every_member_of_a_quantile_is_drawn_equally_often(ties, chosen):
    made = many_runs(ties=ties)
    labels = made.labels()
    members = made.ids[np.isin(labels, range(5) if chosen is None else chosen)]
    batch = made.sample(200 * len(members), quantiles=chosen)
    assert_uniform(batch.ids, members)
    np.testing.assert_array_equal(batch.quantiles, labels[np.searchsorted(made.ids, batch.ids)])
    np.testing.assert_array_equal(batch.rewards, made[batch.ids].rewards)


@pytest.mark.parametrize("planted", ["the last never", "the first for the last", "the last twice"])
def test_uniformity_is_tested_sharply_enough_to_see_an_off_by_one(planted):
    made = many_runs()
    members = made.ids[made.labels() == 2]
    drawn = made.sample(200 * len(members), quantiles=2).ids
    assert_uniform(drawn, members)
    last = drawn == members[-1]
    wrong = {
        "the last never": drawn[~last],
        "the first for the last": np.where(last, members[0], drawn),
        "the last twice": np.concatenate([drawn, drawn[last]]),
    }[planted]
    with pytest.raises(AssertionError):
        assert_uniform(wrong, members)


def test_the_seed_decides_the_draws():
    made = many_runs()
    assert (made.sample(50).ids != made.sample(50).ids).any()
    np.testing.assert_array_equal(many_runs(seed=1).sample(50).ids, many_runs(seed=1).sample(50).ids)
    assert (many_runs(seed=1).sample(50).ids != many_runs(seed=2).sample(50).ids).any()


def test_draws_are_the_same_on_every_platform():
    made = filled(np.arange(100.0), 3, ties="random")
    assert made.sample(5).ids.tolist() == [24, 97, 7, 96, 91]
    assert next(made.epoch(5)).ids.tolist() == [97, 56, 84, 9, 5]


@pytest.mark.parametrize("n", [0, 1, 5, 256, 700])
def test_epoch_visits_every_sample_once(n):
    made = filled(np.arange(float(n)), 3)
    batches = list(made.epoch(32))
    visited = np.concatenate([np.empty(0, int), *(batch.ids for batch in batches)])
    np.testing.assert_array_equal(np.sort(visited), made.ids)
    assert all(len(batch) == 32 for batch in batches[:-1])
    if n > 100:
        assert (visited != made.ids).any()
        assert (visited != np.concatenate([batch.ids for batch in made.epoch(32)])).any()


def test_epoch_goes_on_while_the_pool_grows():
    made = filled(np.arange(200.0))
    epoch = made.epoch(16)
    visited = next(epoch).ids.tolist()
    made.add([[1]] * 50, [[2]] * 50, np.full(50, 1000.0))
    for batch in epoch:
        visited += batch.ids.tolist()
        assert (batch.quantiles == made[batch.ids].quantiles).all()
    assert sorted(visited) == list(range(200))


@pytest.mark.parametrize("n", [2, 6, 300])
def test_epoch_order_is_uniform(n):
    firsts = [_C.permutation_slice(n, key, 0, 1)[0] for key in range(100 * n)]
    lasts = [_C.permutation_slice(n, key, n - 1, n)[0] for key in range(100 * n)]
    assert_uniform(np.array(firsts), np.arange(n))
    assert_uniform(np.array(lasts), np.arange(n))
    whole = _C.permutation_slice(n, 1, 0, n)
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))


# --- saving ----------------------------------------------------------------------------------


def test_a_saved_pool_goes_on_bit_identically(tmp_path):
    made = many_runs(ties="random", dtype="float32", seed=11)
    made.sample(3)
    made.save(tmp_path / "pool.safetensors")
    resumed = RolloutPool.load(tmp_path / "pool.safetensors")
    assert os.listdir(tmp_path) == ["pool.safetensors"]
    assert resumed.settings == made.settings
    for _ in range(3):
        one, two = made.sample(40), resumed.sample(40)
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.quantiles, two.quantiles)
        for p in (made, resumed):
            p.add([[1]] * 30, [[2]] * 30, np.arange(30.0), round=4)
    for one, two in zip(made.epoch(50), resumed.epoch(50), strict=True):
        np.testing.assert_array_equal(one.ids, two.ids)
    assert repr(resumed) == repr(made)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "pool"
    made = many_runs()
    made.save(path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or not a pool file"):
            RolloutPool.load(path)
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match="checksum"):
        RolloutPool.load(path)
    path.write_bytes(whole.replace(b'\\"unscored\\": 0', b'\\"unscored\\": 1'))
    with pytest.raises(ValueError, match="checksum"):
        RolloutPool.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not of a RolloutPool"):
        RolloutPool.load(path)
    with pytest.raises(FileNotFoundError):
        RolloutPool.load(tmp_path / "none")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "pool"
    filled([1.0, 2.0]).save(path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "flush", full_disk)
    with pytest.raises(OSError, match="No space left"):
        filled([3.0, 4.0, 5.0]).save(path)
    assert os.listdir(tmp_path) == ["pool"]
    assert len(RolloutPool.load(path)) == 2


def test_threads_that_save_to_one_path_leave_a_whole_file(tmp_path, monkeypatch):
    """Both are between making their scratch file and giving it its name, at the same time."""
    path, flush, both = tmp_path / "pool", atomic.flush, threading.Barrier(2)

    def flush_together(name):
        if name != tmp_path:
            both.wait(20)
        flush(name)

    monkeypatch.setattr(atomic, "flush", flush_together)
    made, failures = [filled([1.0, 2.0]), filled([3.0, 4.0, 5.0])], []

    def save(one):
        try:
            one.save(path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["pool"]
    assert len(RolloutPool.load(path)) in (2, 3)


def test_settings_of_numpys_types_are_those_of_the_same_values(tmp_path):
    plain = {"quantiles": 5, "seed": 7, "dtype": "float32", "ties": "random", "remainder": "last"}
    numpys = {
        "quantiles": np.int64(5),
        "seed": np.uint32(7),
        "dtype": np.dtype("float32"),
        "ties": np.str_("random"),
        "remainder": np.str_("last"),
    }
    one, two = (filled(np.arange(90.0) // 4, **options) for options in (plain, numpys))
    assert repr(one) == repr(two)
    np.testing.assert_array_equal(one.labels(), two.labels())
    np.testing.assert_array_equal(one.sample(40).ids, two.sample(np.int32(40)).ids)
    np.testing.assert_array_equal(
        one.sample(9, quantiles=4).ids, two.sample(9, quantiles=np.array([4], np.uint8)).ids
    )
    two.save(tmp_path / "pool")
    one.load_state_dict(two.state_dict())
    resumed = RolloutPool.load(tmp_path / "pool")
    np.testing.assert_array_equal(one.sample(40).ids, resumed.sample(40).ids)


def test_state_is_arrays_and_plain_values():
    state = many_runs().state_dict()
    plain = {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
    assert json.loads(json.dumps(plain)) == plain
    assert all(value.dtype != object for name, value in state.items() if name not in plain)


def test_a_state_and_the_pools_of_it_share_no_memory():
    made = filled([1.0, 2.0, 3.0], batches=2)
    state, resumed, before = made.state_dict(), RolloutPool(), held_samples(made)
    resumed.load_state_dict(state)
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            value[:] = 9
        assert held_samples(made) == held_samples(resumed) == before, name


def samples_of(made):
    names = [f"{column}_{part}" for column in ("prompt", "completion") for part in ("tokens", "lengths")]
    return {name: made.state_dict()[name] for name in names}


def test_a_state_that_does_not_fit_changes_nothing():
    made, other = filled([1.0, 2.0, 3.0]), filled([4.0, 5.0])
    for wrong, message in [
        ({"format": 0}, "format 0"),
        ({"settings": other.settings | {"quantiles": 7}}, "quantiles=7"),
        ({"run_sizes": np.array([1])}, "run sizes"),
        ({"rewards": np.array([np.nan, 1])}, "NaN"),
        ({"rewards": np.array([1.0])}, "2 prompts, 1 rewards"),
        ({"rewards": np.array([[1.0, 2.0]])}, r"of shape \(1, 2\)"),
        ({"prompt_lengths": np.array([1, 7])}, "add up"),
        ({"completion_lengths": other.state_dict()["completion_lengths"][:0]}, "add up"),
        (
            {name: value[:0] for name, value in other.state_dict().items() if "_t" in name or "_l" in name},
            "differ",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            made.load_state_dict(other.state_dict() | wrong)
        assert made.rewards.tolist() == [1.0, 2.0, 3.0]


# --- samples in a folder ---------------------------------------------------------------------


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(store, "SMALL", 64)
    monkeypatch.setattr(store, "FLUSH_BYTES", 4000)


def held_samples(made):
    """What the pool says of all its samples, in plain values."""
    batch = made[made.ids]
    rows = [[row.tolist() for row in column] for column in (batch.prompts, batch.completions)]
    return made.ids.tolist(), *rows, batch.rewards.tolist(), batch.rounds.tolist(), made.labels().tolist()


def test_a_pool_in_a_folder_is_the_pool_in_ram(tmp_path, small_files):
    rewards = np.random.default_rng(3).choice(AWKWARD, 900)
    pools = [RolloutPool(seed=4), RolloutPool(seed=4, store=tmp_path / "samples")]
    for made in pools:
        for part in np.array_split(np.arange(900), 13):
            made.add(*rows(part.tolist()), rewards[part], round=int(part[0]) // 200)
    in_ram, in_folder = pools
    assert len(os.listdir(tmp_path / "samples")) > 3
    assert held_samples(in_ram) == held_samples(in_folder)
    for draw in ({"n": 40}, {"n": 30, "quantiles": 4}):
        one, two = (made.sample(**draw) for made in pools)
        assert [row.tolist() for row in one.completions] == [row.tolist() for row in two.completions]
        np.testing.assert_array_equal(one.ids, two.ids)
    for one, two in zip(*(made.epoch(64) for made in pools), strict=True):
        np.testing.assert_array_equal(one.ids, two.ids)


def test_a_relative_folder_stays_where_it_was_made(tmp_path, small_files, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = RolloutPool(store="samples")
    made.add(*rows(range(100)), np.arange(100.0))
    monkeypatch.chdir(tmp_path / "there")
    made.add(*rows(range(300)), np.arange(300.0))
    made.save(tmp_path / "here" / "pool")
    assert os.listdir(tmp_path / "there") == []
    assert held_samples(RolloutPool.load(tmp_path / "here" / "pool")) == held_samples(made)


def test_a_saved_folder_goes_on_after_more_was_added_and_lost(tmp_path, small_files):
    made = RolloutPool(store=tmp_path / "here" / "samples")
    made.add(*rows(range(500)), np.arange(500.0))
    made.save(tmp_path / "here" / "pool")
    before, draw = held_samples(made), made.sample(50).ids
    made.add(*rows(range(300)), np.arange(300.0))  # a crash forgets this
    del made
    (tmp_path / "here").rename(tmp_path / "there")  # the file finds its folder where both went
    resumed = RolloutPool.load(tmp_path / "there" / "pool")
    assert held_samples(resumed) == before
    np.testing.assert_array_equal(resumed.sample(50).ids, draw)
    resumed.add(*rows(range(300)), np.arange(300.0))
    resumed.save(tmp_path / "there" / "pool")
    elsewhere = (tmp_path / "there" / "samples").rename(tmp_path / "elsewhere")
    again = RolloutPool.load(tmp_path / "there" / "pool", store=elsewhere)
    assert held_samples(again) == held_samples(resumed)


def test_a_pool_that_was_saved_in_ram_is_loaded_into_a_new_folder(tmp_path):
    made = filled(np.arange(50.0))
    made.save(tmp_path / "pool")
    moved = RolloutPool.load(tmp_path / "pool", store=tmp_path / "new" / "samples")
    assert held_samples(moved) == held_samples(made)
    moved.save(tmp_path / "moved")
    assert len(os.listdir(tmp_path / "new" / "samples")) == 1
    assert held_samples(RolloutPool.load(tmp_path / "moved")) == held_samples(made)
    with pytest.raises(ValueError, match=r"its folder of samples .*none is not there; name it by store="):
        RolloutPool.load(tmp_path / "moved", store=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match=r"new is a folder; name the file that save\(\) wrote"):
        RolloutPool.load(tmp_path / "new")


def test_damaged_foreign_and_missing_files_of_samples_are_refused(tmp_path, small_files):
    made = RolloutPool(store=tmp_path / "samples")
    for part in np.array_split(np.arange(300), 6):
        made.add(*rows(part.tolist()), part.astype(float))
    made.save(tmp_path / "pool")
    first, second = sorted((tmp_path / "samples").iterdir())[:2]
    whole = first.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        first.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{first.name} is damaged or not a file of samples"):
            RolloutPool.load(tmp_path / "pool")
    for at in (len(whole) - 1, len(whole) // 2):  # one bit of a token, or of an end
        first.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=f"{first.name} is damaged: its checksum does not fit"):
            RolloutPool.load(tmp_path / "pool")
    about = b'\\"first\\": 0'
    assert whole.count(about) == 1
    first.write_bytes(whole.replace(about, about[:-1] + b"1"))
    with pytest.raises(ValueError, match=f"{first.name} is damaged: its checksum does not fit"):
        RolloutPool.load(tmp_path / "pool")
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match="not these samples"):
        RolloutPool.load(tmp_path / "pool")
    save_file({"weight": np.zeros(3)}, first)
    with pytest.raises(ValueError, match="not these samples"):
        RolloutPool.load(tmp_path / "pool")
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing"):
        RolloutPool.load(tmp_path / "pool")
    first.write_bytes(whole)
    state = made.state_dict()
    resumed = RolloutPool(store=tmp_path / "samples")
    with pytest.raises(ValueError, match="do not hold the samples"):
        resumed.load_state_dict(state | {"files": state["files"][1:]})
    with pytest.raises(ValueError, match="no name of a file of samples"):
        resumed.load_state_dict(state | {"files": ["../pool"]})
    assert len(resumed) == 0
    with pytest.raises(ValueError, match="make this one with store="):
        RolloutPool().load_state_dict(state)


def test_a_full_disk_adds_none_of_the_samples(tmp_path, small_files, monkeypatch):
    made = RolloutPool(store=tmp_path)
    made.add(*rows(range(5)), np.arange(5.0), round=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "flush", full_disk)
        with pytest.raises(OSError, match="No space left"):
            made.add(*rows(range(900)), np.arange(900.0), round=2)
    assert not list(tmp_path.iterdir())
    assert made.rounds.tolist() == [1] * 5
    made.add(*rows(range(5, 905)), np.arange(5.0, 905.0), round=3)
    assert [row.tolist() for row in made[made.ids].prompts] == rows(range(905))[0]


def live_bytes(made):
    """Of the arrays behind the samples: in RAM, and memory-mapped."""
    sizes = {"ram": sum(array.nbytes for array in made._rounds.changes), "mapped": 0}
    for segment in made._store.segments:
        sizes["mapped" if segment.name else "ram"] += segment.nbytes()
    return SimpleNamespace(**sizes)


def test_samples_in_a_folder_cost_ram_for_rewards_and_order_alone(tmp_path):
    n, batch = 1_000_000, 50_000
    prompts, completions = np.ones((batch, 8), np.int32), np.ones((batch, 8), np.int32)
    made = RolloutPool(store=tmp_path, dtype="float32")
    rng = np.random.default_rng(0)
    for step in range(n // batch):
        made.add(prompts, completions, rng.normal(size=batch).astype(np.float32), round=step // 5)
        # What waits for its turn to be written is bounded, however many samples there are.
        assert live_bytes(made).ram <= store.FLUSH_BYTES + 1000
    assert live_bytes(made).mapped + live_bytes(made).ram >= n * (8 + 8) * 4
    made.state_dict()
    assert live_bytes(made).ram <= 1000
    # The kernel calls the pages of a file map file pages: it can drop them at any time.
    _, held = made[made.ids[::1000]], made._store.segments[0].prompts.tokens
    address = held.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        spans = [line.split() for line in maps]
    behind = [line for line in spans if _holds(line[0], address)]
    assert behind and behind[0][-1].endswith(".safetensors")


def _holds(span, address):
    start, end = (int(bound, 16) for bound in span.split("-"))
    return start <= address < end


# --- threads ---------------------------------------------------------------------------------


def test_the_core_lets_other_threads_run():
    made = _C.QuantilePool64(5, _C.Ties.same, _C.Remainder.spread, 0)
    rewards = np.random.default_rng(0).normal(size=300_000)
    calls = {
        "add": lambda: made.add(rewards),
        "labels": lambda: made.labels(),
        "sample": lambda: made.sample(100_000, [], 1),
    }
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # a thread runs on until it gives the GIL up by itself
    try:
        for name, call in calls.items():
            ran, go = [], threading.Lock()
            go.acquire()
            other = threading.Thread(target=lambda go=go, ran=ran: (go.acquire(), ran.append(1)))
            other.start()
            go.release()
            for _ in range(1000):  # on a busy machine it may take several calls to get a turn
                call()
                if ran:
                    break
            assert ran, f"{name} kept the GIL"
            other.join()
    finally:
        sys.setswitchinterval(interval)


def test_readers_beside_a_writer_see_whole_samples():
    made = RolloutPool(seed=1)
    made.add([[0]], [[0]], [0.0])
    done, errors = threading.Event(), []

    def read():
        try:
            while not done.is_set():
                batch = made.sample(16)
                assert [int(row[0]) for row in batch.prompts] == batch.rewards.tolist()
                assert ((batch.quantiles >= 0) & (batch.quantiles < 5)).all()
                assert len(made.labels()) >= 1
                for part in made.epoch(50):
                    assert [int(row[0]) for row in part.completions] == part.rewards.tolist()
                    break
        except BaseException as error:
            errors.append(error)
            raise

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(60):
        values = list(range(step, step + 40))
        made.add([[v] for v in values], [[v] for v in values], values, round=step)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors


# --- several processes -----------------------------------------------------------------------

SYNC_CASES = [
    (k, ties, remainder, dtype)
    for k in (1, 2, 4, 9)
    for ties in TIES
    for remainder in REMAINDERS
    for dtype in DTYPES
]


def shard_rewards(rank, k):
    if k == 2:  # one boundary, between the first samples of two ranks
        return np.array([0.5])
    rng = np.random.default_rng(rank)
    n = {1: 0, 4: 97, 9: 4}[k] + rank  # k = 9: the union has fewer samples than quantiles, or hardly
    return np.concatenate([rng.choice(AWKWARD, n), rng.normal(rank, 1, n // 2)])


def sync_worker(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for at, (k, ties, remainder, dtype) in enumerate(SYNC_CASES):
        rewards = shard_rewards(rank, k)
        made = filled(rewards, 3, quantiles=k, ties=ties, remainder=remainder, dtype=dtype)
        made.sync()
        results[f"labels{at}"] = made.labels()
        results[f"thresholds{at}"] = made.thresholds
    stale = filled([1.0, 2.0][: 2 * rank], quantiles=2)
    stale.sync()
    assert stale.labels().tolist() == [0, 1][: len(stale)]
    stale.add([[1]], [[2]], [3.0])
    with pytest.raises(RuntimeError, match=r"sync\(\) again"):
        stale.sample(1)
    resumed = RolloutPool(2)
    resumed.load_state_dict(stale.state_dict())
    with pytest.raises(RuntimeError, match=r"sync\(\) again"):
        resumed.labels()
    with pytest.raises(ValueError, match="pools differ"):
        RolloutPool(2 + rank).sync()
    save_file(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_sync_gives_the_quantiles_of_the_union(tmp_path, world):
    start_processes(sync_worker, (world, str(tmp_path)), world, start_method=START_METHOD)
    results = [load_file(tmp_path / str(rank)) for rank in range(world)]
    for at, (k, ties, remainder, dtype) in enumerate(SYNC_CASES):
        shards = [shard_rewards(rank, k).astype(dtype) for rank in range(world)]
        labels = np.concatenate([result[f"labels{at}"] for result in results])
        union = np.concatenate(shards)
        # Among equal rewards the order is id first, rank second.
        id_of = np.concatenate([np.arange(len(shard)) for shard in shards])
        arrival = np.lexsort((np.arange(len(union)), id_of))
        by_rule = np.empty(len(union), int)
        rule = "same" if ties == "same" else "arrival"
        by_rule[arrival] = numpy_rule(union[arrival], k, rule, remainder)
        if ties == "random":
            np.testing.assert_array_equal(np.bincount(labels, minlength=k), np.bincount(by_rule, minlength=k))
        else:
            np.testing.assert_array_equal(labels, by_rule)
        if ties == "same":
            options = {"quantiles": k, "remainder": remainder, "dtype": dtype}
            np.testing.assert_array_equal(labels, filled(union, 2, **options).labels())
        for result in results:
            np.testing.assert_array_equal(result[f"thresholds{at}"], numpy_thresholds(union, by_rule, k))


def test_sync_alone_is_the_own_pool():
    made = filled([3.0, 1.0, 2.0], quantiles=3)
    made.sync()
    made.add([[1]], [[1]], [4.0])
    assert made.labels().tolist() == [2, 0, 1, 2]  # cuts of 4 samples in 3: 2, 3
    made.load_state_dict(made.state_dict() | {"synced": True})
    with pytest.raises(RuntimeError, match=r"sync\(\) again"):
        made.labels()
    made.sync()
    assert made.labels().tolist() == [2, 0, 1, 2]


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda p: RolloutPool(0), ValueError, "at least 1, got 0"),
        (lambda p: RolloutPool(2.5), TypeError, "quantiles must be a whole number, got 2.5"),
        (lambda p: RolloutPool("5"), TypeError, "quantiles must be a whole number, got '5'"),
        (lambda p: RolloutPool(2**40), ValueError, "quantiles must be at most 2147483647, got 1099511627776"),
        (lambda p: RolloutPool(seed=2.5), TypeError, "seed must be a whole number, got 2.5"),
        (lambda p: RolloutPool(seed=None), TypeError, "seed must be a whole number, got None"),
        (
            lambda p: RolloutPool(ties="older"),
            ValueError,
            "ties must be one of 'same'.*got 'older'",
        ),
        (lambda p: RolloutPool(dtype="float16"), ValueError, "dtype must be one of 'float32'"),
        (lambda p: p.add([[1]], [[1]], [1.0, 2.0]), ValueError, "2 rewards but 1 prompts"),
        (lambda p: p.add([[1]], [[1], [2]], [1.0]), ValueError, "1 rewards but 2 completions"),
        (lambda p: p.add(["text"], [[1]], [1.0]), TypeError, "prompts must be rows of integer"),
        (lambda p: p.add([[1, [2]]], [[1]], [1.0]), TypeError, "prompts must be rows of integer"),
        (lambda p: p.add([3], [[1]], [1.0]), TypeError, "prompts must be rows of integer"),
        (lambda p: p.add([[1]], [np.ones((2, 2), int)], [1.0]), TypeError, "completions must be"),
        (lambda p: p.add([[1]], [[0.5]], [1.0]), TypeError, "completions must be rows of integer"),
        (lambda p: p.add([[-1]], [[1]], [1.0]), ValueError, "token ids from -1 to -1"),
        (lambda p: p.add([[1]], [[2**31]], [1.0]), ValueError, "token ids from 2147483648"),
        (lambda p: p.add([[1]], [[1]], 1.0), ValueError, "one number per sample"),
        (lambda p: p.add([[1]], [[1]], [1.0], round=1.5), TypeError, "integer"),
        (lambda p: p.sample(-1), ValueError, "n must be at least 0, got -1"),
        (lambda p: p.sample(4, quantiles=5), ValueError, r"0 \(worst\) to 4 \(best\), got 5"),
        (lambda p: p.sample(2.5), TypeError, "n must be a whole number, got 2.5"),
        (lambda p: p.sample(2**70), ValueError, "n must be at most"),
        (lambda p: p.sample(2, quantiles=[0.5]), TypeError, r"quantiles must be integers .*, got \[0.5\]"),
        (lambda p: p.sample(2, quantiles="4"), TypeError, "quantiles must be integers .*, got '4'"),
        (lambda p: p.sample(2, quantiles=[[1]]), TypeError, "quantiles must be integers in one dimension"),
        (lambda p: p.sample(2, quantiles=[4, 2**40]), ValueError, r"to 4 \(best\), got 1099511627776"),
        (lambda p: p.epoch(2.5), TypeError, "batch_size must be a whole number, got 2.5"),
        (lambda p: p.sample(4, quantiles=[]), ValueError, "quantiles is empty"),
        (lambda p: RolloutPool().sample(1), ValueError, "the pool is empty"),
        (lambda p: p.epoch(0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda p: p[1.5], TypeError, "ids must be integers"),
        (lambda p: list(p), TypeError, "not iterable"),
        (
            lambda p: RolloutPool(dtype="float32").add([[1]], [[1]], [1e300]),
            ValueError,
            "1e.300.* is beyond float32; use dtype='float64'",
        ),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(mistake, error, message):
    made = filled([1.0, 2.0, 3.0])
    with pytest.raises(error, match=message):
        mistake(made)
    assert len(made) == 3
    made.add([[1]], [[1]], [0.0])
    assert made.labels().tolist() == [2, 3, 4, 0]  # cuts of 4 samples in 5: 1, 2, 3, 4; the lowest is in 0


def test_repr_says_what_is_in_the_pool():
    made = RolloutPool(3, dtype="float32")
    assert repr(made).startswith("RolloutPool(0 samples, 3 quantiles; ties='same'")
    made.add([[1]] * 3, [[2]] * 3, [0.25, None, 0.5], round=4)
    assert "2 samples" in repr(made) and "rewards 0.25 to 0.5" in repr(made)
    assert "1 unscored" in repr(made) and "dtype='float32'" in repr(made)


@pytest.mark.parametrize("taken", [False, True])
def test_a_ctrl_c_within_add_leaves_every_reward_with_its_sample(taken):
    """It may come before the core has the samples, or when it has them already."""
    pool = RolloutPool(2)
    pool.add([[0], [1]], [[0], [1]], [0.0, 1.0])

    class Interrupted:
        """The core, with a signal."""

        def __init__(self, core):
            self.core = core

        def add(self, rewards):
            if taken:
                self.core.add(rewards)
            raise KeyboardInterrupt

        def __len__(self):
            return len(self.core)

    core, pool._core = pool._core, Interrupted(pool._core)
    with pytest.raises(KeyboardInterrupt):
        pool.add([[2], [3]], [[2], [3]], [2.0, 3.0], round=7)
    pool._core = core
    pool.add([[4]], [[4]], [4.0])
    assert len(pool) == (5 if taken else 3)
    every = pool[pool.ids]
    assert [row.tolist() for row in every.prompts] == [[reward] for reward in every.rewards]
    assert pool.rounds.tolist() == ([0, 0, 7, 7, 7] if taken else [0, 0, 0])


def test_samples_without_a_round_are_of_the_newest_one_whatever_its_number():
    pool = RolloutPool(2)
    pool.add([[1]], [[1]], [1.0], round=-5)
    pool.add([[2]], [[2]], [2.0])
    assert pool.rounds.tolist() == [-5, -5]


def test_a_draw_that_is_refused_is_none():
    one, other = filled(np.arange(100.0)), filled(np.arange(100.0))
    empty = RolloutPool(3)
    with pytest.raises(ValueError, match="nothing to draw from"):
        empty.sample(1)
    assert empty.state_dict()["draws"] == 0
    with pytest.raises(ValueError, match="quantiles are 0"):
        one.sample(1, quantiles=99)
    assert one.sample(9).ids.tolist() == other.sample(9).ids.tolist()


def test_a_pool_is_not_saved_to_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder is not there.*none"):
        RolloutPool(2).save(tmp_path / "none" / "pool.safetensors")
