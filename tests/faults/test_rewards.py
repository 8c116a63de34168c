"""Rewards that hang, raise or return NaN in the middle of a run, which then goes on by --resume."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from tiny_runs import PROMPTS, Told, even_words, rows, small, timeless

from quark_fast.errors import Interrupted, UsageError
from quark_fast.rewards.reward import describe
from quark_fast.rewards.weighted_sum import weighted_sum
from quark_fast.rollout import transformers
from quark_fast.training.trainer import Trainer

SHORT = {
    "rounds": 2,
    "steps": 2,
    "batch_size": 8,
    "initial_samples": 2,
    "explore_samples": 2,
    "eval_samples": 1,
}
GIVEN: dict[str, Any] = {"prompts": PROMPTS, "held_out": PROMPTS[:2]}
FILES = ("metrics.jsonl", "completions.jsonl", "evaluation.jsonl")
# Calls of a plain reward in such a run: the check, the first round's sampling, the probe's, the second's.
SECOND_ROUND = 3


def run(folder: Path, model: Path, reward: Any, **settings: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(small(folder, model, **(SHORT | settings)), reward=reward, **GIVEN).train()


def failing(fail: Callable[[], None], at: int) -> Callable[..., list[float | None]]:
    calls = iter(range(10**9))

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if next(calls) == at:
            fail()
        return even_words(prompts, completions)

    return reward


def hang() -> None:
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    time.sleep(600)


def down() -> None:
    raise ConnectionError("scorer is down")


@pytest.mark.parametrize(
    ("fail", "error", "says"),
    [(hang, Interrupted, "go on from the last checkpoint"), (down, UsageError, "scorer is down")],
)
def test_plain_reward_that_hangs_or_raises_costs_the_round_and_no_more(
    tmp_path: Path, tiny_model: Callable[..., Path], fail: Any, error: Any, says: str
) -> None:
    model = tiny_model()
    with pytest.raises(error, match=says):
        run(tmp_path / "run", model, failing(fail, SECOND_ROUND))
    assert len(rows(tmp_path / "run" / "metrics.jsonl", kind="step")) == 2, "the first round is done"
    run(tmp_path / "run", model, even_words, resume=True, accept_changed_reward=True)
    run(tmp_path / "whole", model, even_words)
    for name in FILES:
        assert timeless(tmp_path / "run" / name) == timeless(tmp_path / "whole" / name), name


def test_reward_that_always_raises_is_refused_before_any_work(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match="scorer is down"):
        run(tmp_path / "run", tiny_model(), lambda prompts, completions: down())
    assert not (tmp_path / "run").exists()


def test_asynchronous_reward_that_hangs_and_raises_once_each_changes_nothing(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    calls = iter(range(10**9))

    async def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        number = next(calls)
        if number == 2:
            await asyncio.sleep(600)
        if number == 4:
            down()
        return even_words(prompts, completions)

    async def healthy(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return even_words(prompts, completions)

    model = tiny_model()
    calm = {"reward_timeout": 0.2, "reward_backoff": 0.01, "rounds": 1}
    run(tmp_path / "run", model, reward, **calm)
    run(tmp_path / "whole", model, healthy, **calm)
    for name in FILES:
        assert timeless(tmp_path / "run" / name) == timeless(tmp_path / "whole" / name), name


def test_nan_from_a_reward_is_as_none_counted_and_left_out(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    def some(left_out: float | None) -> Callable[..., list[float | None]]:
        def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
            scores = even_words(prompts, completions)
            return [left_out if s is None or s < 0.3 else s for s in scores]

        return reward

    model = tiny_model()
    for name, value in (("none", None), ("nan", math.nan)):
        run(tmp_path / name, model, some(value), rounds=1)
    for file in FILES:
        assert timeless(tmp_path / "none" / file) == timeless(tmp_path / "nan" / file), file
    (about,) = rows(tmp_path / "nan" / "metrics.jsonl", kind="round")
    missing = [row for row in rows(tmp_path / "nan" / "completions.jsonl") if row["reward"] is None]
    assert about["unscored"] == len(missing) > 0


@pytest.mark.parametrize("term", ["alone", "beside a plain one"])
def test_batch_is_scored_while_the_next_is_sampled_with_the_same_results(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    sampled: list[int] = []
    asked: list[tuple[str, str]] = []
    in_vain: list[int] = []
    usual = transformers._sample_by_parts

    def sample(*arguments: Any) -> Any:
        sampled.append(1)
        return usual(*arguments)

    async def slow(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        batch = len(asked)
        asked.extend(zip(prompts, completions, strict=True))
        # The check is the first call, of one batch. The first two of the round wait for the next to be
        # sampled, which without the overlap would not begin.
        try:
            async with asyncio.timeout(30):
                while 4 <= batch < 4 + 2 * 16 and len(sampled) < 2 + 1 + (batch - 4) // 16:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            in_vain.append(batch)
        return even_words(prompts, completions)

    def mixed(function: Any) -> Any:
        if term == "alone":
            return function
        return weighted_sum([(1.0, describe(even_words, "plain")), (0.5, describe(function, "slow"))], 0.0)

    model = tiny_model()
    settings = {"rounds": 1, "sample_batch": 16}
    whole = mixed(even_words)
    run(tmp_path / "whole", model, whole, **settings)
    monkeypatch.setattr("quark_fast.rollout.transformers._sample_by_parts", sample)
    run(tmp_path / "run", model, mixed(slow), **settings)
    assert not in_vain
    for name in FILES:
        assert timeless(tmp_path / "run" / name) == timeless(tmp_path / "whole" / name), name


def test_failure_of_a_batch_keeps_what_was_answered_and_asks_nothing_twice(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    asked, broken = Told(), Told([True])

    async def reward(prompt: str, completion: str) -> float | None:
        asked.append((prompt, completion))
        if broken and len(asked) == 30:
            await asyncio.sleep(0.2)  # the others have answered by then
            down()
        return even_words([prompt], [completion])[0]

    model = tiny_model()
    settings = {"rounds": 1, "sample_batch": 16, "reward_retries": 0, "reward_concurrency": 64}
    with pytest.raises(UsageError, match="scorer is down"):
        run(tmp_path / "run", model, reward, **settings)
    answered = set(asked) - {asked[29]}
    before = len(asked)
    broken.clear()
    run(tmp_path / "run", model, reward, resume=True, **settings)
    assert not answered & set(asked[before:])
    run(tmp_path / "whole", model, reward, **settings)
    for name in FILES:
        assert timeless(tmp_path / "run" / name) == timeless(tmp_path / "whole" / name), name


def test_limit_a_minute_of_a_plain_function_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match=r"plain function.*async def.*--reward-per-minute"):
        run(tmp_path / "run", tiny_model(), even_words, reward_per_minute=60)
    assert not (tmp_path / "run").exists()
