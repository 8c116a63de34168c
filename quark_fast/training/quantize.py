"""Quantize: every sample of the pool gets its quantile's label, and a round its plan of draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quark_fast.config import Config
from quark_fast.pool.tokens import Ints
from quark_fast.runtime.seeds import seed_for
from quark_fast.training.state import State

Labels = npt.NDArray[np.int32]

WINDOW = 8  # batches whose samples are sorted by length together: little padding, still mixed


def plan_round(config: Config, state: State, prompts: Sequence[Sequence[int]]) -> Ints:
    """(steps, batch size) indices into the pool: what the round's steps draw, whose tokens are trained then.

    Args:
        prompts: ids of the training prompts.
    """
    labels = state.pool.labels()
    lengths = np.array([len(prompts[i]) for i in state.prompt_of])
    rng = np.random.default_rng(seed_for(config.seed, "draws", state.round))
    plan = plan_batches(
        labels, config.quantile_shares(), lengths, state.draws, config.steps, config.batch_size, rng
    )
    drawn = set(np.unique(labels[plan]).tolist())
    state.trained |= drawn
    if config.contrast_coef:  # it trains each sample's mirror token, too
        state.trained |= {config.quantiles - 1 - k for k in drawn}
    return plan


def plan_batches(
    labels: Labels,
    weights: Sequence[float],
    lengths: Ints,
    draws: Ints,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> Ints:
    """(steps, batch_size) indices into the pool: what each step of a round draws.

    Quantile k gets the share ``weights[k]`` of the draws. Within a quantile the samples drawn least
    often come first, ties at random: many samples seen once teach more than few seen often, and none is
    left out while another is repeated. A quantile without members gives its share to the others.

    Args:
        labels: quantile of every sample.
        lengths: prompt length of every sample, by which neighbours in a batch are chosen.
        draws: how often every sample was drawn before.
    """
    needed = steps * batch_size
    chosen = []
    for k, count in enumerate(_counts(labels, weights, needed)):
        members = np.flatnonzero(labels == k)
        if count == 0:
            continue
        order = members[np.lexsort((rng.random(len(members)), draws[members]))]
        chosen.append(np.resize(order, count))
    indices = rng.permutation(np.concatenate(chosen))
    batches = []
    for window in np.split(indices, range(WINDOW * batch_size, needed, WINDOW * batch_size)):
        by_length = window[np.argsort(lengths[window], kind="stable")].reshape(-1, batch_size)
        batches.append(rng.permutation(by_length, axis=0))
    return np.concatenate(batches)


def _counts(labels: Labels, weights: Sequence[float], needed: int) -> Ints:
    """How many draws each quantile gets: largest remainders, so that they add up to ``needed``."""
    shares = np.array([w * bool((labels == k).any()) for k, w in enumerate(weights)])
    if not shares.sum() > 0:
        shares = np.bincount(labels, minlength=len(weights)).astype(float)
    exact = shares / shares.sum() * needed
    counts: Ints = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: needed - counts.sum()]] += 1
    return counts
