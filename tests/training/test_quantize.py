"""Which samples each step draws."""

from __future__ import annotations

import numpy as np
import pytest

from quark_fast.training.quantize import WINDOW, plan_batches


def plan(
    labels: list[int] | np.ndarray,
    weights: list[float],
    steps: int,
    batch_size: int,
    *,
    draws: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    labels = np.asarray(labels, np.int32)
    lengths = np.arange(len(labels)) % 7 if lengths is None else lengths
    rng = np.random.default_rng(seed)
    draws = np.zeros(len(labels), np.int64) if draws is None else draws
    return plan_batches(labels, weights, lengths, draws, steps, batch_size, rng)


@pytest.mark.parametrize("steps", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 5])
def test_plan_has_exactly_the_steps_and_shares_asked_for(steps: int) -> None:
    labels = np.arange(2000) % 5
    weights = [0.4, 0.1, 0.0, 0.1, 0.4]
    places = plan(labels, weights, steps, 16)
    assert places.shape == (steps, 16)
    assert len(np.unique(places)) == places.size, "no sample twice while others wait"
    counts = np.bincount(labels[places].ravel(), minlength=5)
    # Largest remainders: each count is its share rounded down or up, and they add up.
    exact = np.array(weights) * steps * 16
    assert (np.floor(exact) <= counts).all() and (counts <= np.ceil(exact)).all()


def test_remainders_go_to_the_largest() -> None:
    labels = np.arange(300) % 3
    counts = np.bincount(labels[plan(labels, [0.26, 0.33, 0.41], 1, 10)].ravel(), minlength=3)
    assert counts.tolist() == [3, 3, 4]  # 2.6, 3.3, 4.1


def test_least_drawn_come_first_and_ties_come_at_random() -> None:
    labels = np.zeros(100, int)
    draws = np.where(np.arange(100) < 60, 2, 1)
    places = plan(labels, [1.0], 3, 10, draws=draws)
    assert (places >= 60).all()
    assert set(places.ravel()) != set(plan(labels, [1.0], 3, 10, draws=draws, seed=1).ravel())
    # More than the least drawn are needed: all of them, and the rest from the others.
    assert set(range(60, 100)) < set(plan(labels, [1.0], 5, 10, draws=draws).ravel().tolist())


def test_nothing_repeats_until_the_members_run_out_and_then_evenly() -> None:
    labels = np.array([0] * 100 + [1] * 7)
    places = plan(labels, [0.5, 0.5], 4, 10).ravel()
    counts = np.bincount(places, minlength=107)
    assert counts[:100].max() == 1 and counts[:100].sum() == 20
    assert sorted(counts[100:]) == [2, 3, 3, 3, 3, 3, 3]


def test_empty_quantile_gives_its_share_to_the_others_in_proportion() -> None:
    labels = np.array([0] * 200 + [2] * 200)  # ties can leave a quantile empty
    counts = np.bincount(labels[plan(labels, [0.2, 0.6, 0.2], 8, 10)].ravel(), minlength=3)
    assert counts.tolist() == [40, 0, 40]


def test_quantiles_of_weight_zero_are_drawn_when_no_other_has_members() -> None:
    labels = np.array([1] * 50 + [2] * 150)
    counts = np.bincount(labels[plan(labels, [1.0, 0.0, 0.0], 4, 10)].ravel(), minlength=3)
    assert counts.tolist() == [0, 10, 30]


def test_neighbours_in_a_batch_have_prompts_of_similar_length() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 1600)
    places = plan(np.arange(1600) % 4, [0.25] * 4, 20, 16, lengths=lengths)

    def padding(places: np.ndarray) -> float:
        longest = lengths[places].max(1, keepdims=True)
        return float((longest - lengths[places]).mean())

    shuffled = np.random.default_rng(2).permutation(places.ravel()).reshape(places.shape)
    assert padding(places) < padding(shuffled) / 4
    # Only within a window, and in no order of length: a phase does not start short and end long.
    means = lengths[places].mean(1)
    assert any(np.diff(means[:WINDOW]) < 0) and any(np.diff(means[:WINDOW]) > 0)
    assert abs(means[:WINDOW].mean() - means[WINDOW : 2 * WINDOW].mean()) < 10


def test_batches_mix_the_quantiles() -> None:
    labels = np.repeat(np.arange(4), 200)
    places = plan(labels, [0.25] * 4, 16, 16, lengths=np.ones(800, int))
    assert all(len(set(labels[row])) >= 3 for row in places)


def test_plan_depends_on_the_seed_alone() -> None:
    labels = np.arange(500) % 5
    first, again, other = (plan(labels, [0.2] * 5, 9, 8, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_phases_go_through_the_pool_before_any_sample_comes_twice() -> None:
    labels, draws = np.arange(120) % 3, np.zeros(120, np.int64)
    for phase in range(4):
        np.add.at(draws, plan(labels, [1 / 3] * 3, 2, 15, draws=draws, seed=phase).ravel(), 1)
    assert (draws == 1).all()


def test_samples_added_later_are_drawn_first() -> None:
    draws = np.bincount(plan(np.zeros(40, int), [1.0], 4, 10).ravel(), minlength=60)
    places = plan(np.zeros(60, int), [1.0], 2, 10, draws=draws, seed=1)
    assert set(places.ravel()) == set(range(40, 60))
