"""Reward and judges, tried out before a run begins: on a few completions of the base model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from quark_fast.errors import UsageError
from quark_fast.evaluation.held_out import EncodedPrompts, first_completions
from quark_fast.rewards.reward import Reward
from quark_fast.rewards.weighted_sum import asynchronous_terms
from quark_fast.training.run_prompts import RunPrompts
from quark_fast.training.setup import Setup


def try_rewards(setup: Setup) -> None:
    """Try reward and judges on a few completions, and what was scored before on the reward.

    Raises:
        UsageError: one of them fails, or a pool would have rewards of two scales.
    """
    config, processes, prompts = setup.config, setup.processes, setup.prompts
    limit = config.reward_per_minute or config.reward_tokens_per_minute
    if limit and not asynchronous_terms((setup.reward, *setup.judges)):
        raise UsageError(
            f"reward {setup.reward.name} is a plain function, whose requests nothing here can limit; write it"
            " as async def, or leave out --reward-per-minute and --reward-tokens-per-minute"
        )
    if processes.main:
        sampling = setup.round_sampling(0)
        for asked, scorer in itertools.product(_tried_on(prompts), _not_tried_yet(setup)):
            scorer.check(first_completions(setup.policy, setup.reference, asked, sampling, config.seed))
        if not config.resume:
            _check_scored(setup)


def _not_tried_yet(setup: Setup) -> list[Reward]:
    """The scorers that this run has not asked before: all, or those that are others at a resume."""
    config = setup.config
    # The task's own judge is known to work, and once tried out it would stay in memory to the end.
    named = list(setup.judges) if config.judge != "auto" else []
    if not config.resume:
        return [setup.reward, *named]
    return [setup.reward] * config.accept_changed_reward + named * (config.judge != setup.saved.judge)


def _tried_on(prompts: RunPrompts) -> Iterator[EncodedPrompts]:
    """Prompts to try a scorer on: training prompts; held-out ones, too, if columns are missing there."""
    yield EncodedPrompts(prompts.train, prompts.train_ids, 1)
    trained, held_out = (
        {name for row in rows for name, value in row.items() if value is not None}
        for rows in (prompts.train, prompts.held_out.rows)
    )
    if trained - held_out:
        yield dataclasses.replace(prompts.held_out, samples=1)


def _check_scored(setup: Setup) -> None:
    """Refuse to rank one pool by two scales: what was brought along must have the run's own rewards."""
    config, prompts = setup.config, setup.prompts
    brought = [one for one in prompts.scored if not math.isnan(one.reward)]
    if setup.reward.is_none:
        if not brought:
            raise UsageError(
                f"reward = none, but {config.scored} brings no rewards; name what scores it by --reward"
            )
        prompts.notes.append("no reward: the table has no score" + "; --judge adds one" * (not setup.judges))
        return
    # At random: preferences come by turns.
    chosen = np.random.default_rng(config.seed).permutation(len(brought))[:32]
    some = [brought[i] for i in chosen]
    if not some or config.accept_changed_reward:
        return
    own = setup.reward([one.row or prompts.train[one.prompt] for one in some], [one.text for one in some])
    pairs = [(one, float(value)) for one, value in zip(some, own, strict=True) if not math.isnan(value)]
    others = [
        (one, value)
        for one, value in pairs
        if not math.isclose(one.reward, value, rel_tol=1e-2, abs_tol=1e-3)
    ]
    if not others:
        return
    (one, value), name = others[0], setup.reward.name
    has = f"{one.counts}: these are not the rewards" if one.counts else "rewards that are not those"
    found = (
        f"{config.scored} has {has} of {name} ({len(others)} of {len(pairs)} looked at):"
        f" {one.reward:g} for {one.text!r:.60}, which {name} gives {value:g}"
    )
    if config.initial_samples == 0 and config.rounds == 1 and not config.from_run:
        prompts.notes.append(f"{found}; only the evaluation uses {name}")
        return
    if len(others) <= len(pairs) // 4:  # which few texts at the margin of a rule may explain
        prompts.notes.append(f"{found}; the others agree, so one pool ranks both")
        return
    if one.counts:
        raise UsageError(
            f"{found}, and one pool cannot rank both; learn from the file alone by --reward none"
            f" --initial-samples 0 --rounds 1 (without --reward none {name} still scores the evaluation), or"
            " mix them on purpose by --accept-changed-reward"
        )
    raise UsageError(
        f"{found}, and one pool cannot rank both; name their reward by --reward, leave the column out to have"
        " them scored, sample nothing by --initial-samples 0 --rounds 1, or mix them on purpose by"
        " --accept-changed-reward"
    )
