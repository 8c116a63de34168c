"""A weighted sum of rewards, which rewards are cached, and which are waited for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quark_fast.errors import UsageError
from quark_fast.rewards.asynchronous import turns
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.identity import NO_SOURCE
from quark_fast.rewards.reward import Reward
from quark_fast.runtime.overlap import Begun, together

# --------------------------------------------------------------------- sums


@dataclass(frozen=True)
class WeightedSum:
    """offset + sum of weight times reward; NaN, which leaves a sample out, where any part is."""

    parts: Sequence[tuple[float, Reward]]
    offset: float = 0.0

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> Begun[npt.NDArray[np.float64]]:
        rows = [
            {"prompt": prompt, **{name: values[i] for name, values in columns.items()}}
            for i, prompt in enumerate(prompts)
        ]
        # Servers answer while this thread calls the plain functions.
        order = sorted(range(len(self.parts)), key=lambda i: not asynchronous_terms([self.parts[i][1]]))

        def total(found: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
            values = dict(zip(order, found, strict=True))
            total = np.full(len(rows), self.offset)
            for i, (weight, _) in enumerate(self.parts):
                total += weight * values[i]
            return total

        return together(self.parts[i][1].begin(rows, completions) for i in order).then(total)


def weighted_sum(parts: Sequence[tuple[float, Reward]], offset: float) -> Reward:
    names = [part.name if weight == 1 else f"{weight:g}*{part.name}" for weight, part in parts]
    name = f"1 - {parts[0][1].name}" if offset else " + ".join(names)
    version = "; ".join(part.version for _, part in parts)
    content = repr([offset, *((weight, part.name, part.version, part.sha256) for weight, part in parts)])
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    measures = _measured(parts[0][1]) if offset else None
    return Reward(WeightedSum(tuple(parts), offset), name, version, sha256, measures)


def terms(reward: Reward) -> list[Reward]:
    """The terms of a sum; of any other reward itself."""
    if not isinstance(reward.function, WeightedSum):
        return [reward]
    return [term for _, part in reward.function.parts for term in terms(part)]


def asynchronous_terms(rewards: Iterable[Reward]) -> list[Reward]:
    """Those of the rewards and of their sums' terms that are awaited."""
    return [term for reward in rewards for term in terms(reward) if term.asynchronous]


def forget_unscored(rewards: Iterable[Reward]) -> None:
    """Have what was left out asked again, where answers are kept: a scorer was out of order."""
    for reward in rewards:
        for term in terms(reward):
            if term.cache is not None:
                term.cache.forget_unscored()


def batches_ahead(rewards: Iterable[Reward], rows: int) -> int:
    """How many batches of ``rows`` completions may be scored while a further one is sampled.

    So many that all calls which may be under way at once have something to do; 0 without asynchronous
    rewards.
    """
    every = asynchronous_terms(rewards)
    sizes = (one.calls.concurrency * min(one.call_size, rows) for one in every)
    return max((1 + size // rows for size in sizes), default=0)


def waiting_for(rewards: Iterable[Reward]) -> dict[str, float]:
    """For the progress: how many completions have no reward yet, and for how long a limit holds them up."""
    found: dict[str, float] = {}
    for one in asynchronous_terms(rewards):
        for name, value in turns(one.name, one.calls).waiting().items():
            found[name] = max(value, found.get(name, 0.0))
    return found


def _measured(part: Reward) -> str:
    """What the tables call the values of a reward of which less is better."""
    label = getattr(part.function, "label", None)  # a classifier's
    word = str(label).lower() if label else part.name.rpartition(":")[2]
    return part.name if word == "reward" else word  # tables call a value of which more is better so


# --------------------------------------------------------------------- the cache


def cached(reward: Reward, mode: Literal["auto", "on", "off"], path: Path) -> Reward:
    """The reward with a cache in the file ``path``, if it is to be cached.

    A sum's parts are cached each by itself. A key holds the hash of the scorer, prompt, completion and
    columns; the hash of a function is that of the file it stands in, and of the one that names it, not of
    what these import, and of what its closure or its object holds.

    Raises:
        UsageError: mode "on" for a function without source, whose versions no key could tell apart.
    """
    if mode == "off":
        return reward
    if isinstance(reward.function, WeightedSum):
        parts = [(weight, cached(part, mode, path)) for weight, part in reward.function.parts]
        return dataclasses.replace(reward, function=dataclasses.replace(reward.function, parts=parts))
    if reward.sha256 == NO_SOURCE:
        if mode == "on":
            raise UsageError(
                f"reward_cache = on, but reward {reward.name} has no source to tell its versions apart by;"
                " give reward_cache off"
            )
        return reward
    return dataclasses.replace(reward, cache=RewardCache(path)) if reward.to_be_cached(mode) else reward
