"""Limits a minute, and waits that a server asks for, by a clock of their own."""

from __future__ import annotations

import asyncio
import email.message
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quark_fast.errors import UsageError
from quark_fast.rewards.asynchronous import Calls, turns
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.reward import Reward, describe
from quark_fast.rewards.turns import Turns, retry_after
from quark_fast.rewards.weighted_sum import waiting_for

ROWS = [{"prompt": f"p{i}"} for i in range(6)]
TEXTS = [f"t{i}" for i in range(6)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A time that passes while ``Turns`` sleeps, and at no other moment."""
    own = SimpleNamespace(now=1000.0)
    yields = asyncio.sleep

    async def sleep(seconds: float) -> None:
        own.now += seconds
        await yields(0)

    monkeypatch.setattr("quark_fast.rewards.turns.time", SimpleNamespace(monotonic=lambda: own.now))
    monkeypatch.setattr("quark_fast.rewards.turns.asyncio.sleep", sleep)
    return own


async def begin(own: Turns, clock: SimpleNamespace, count: int, tokens: float = 0) -> list[float]:
    """When each of so many requests went out, all ready from the start and answered at once."""

    async def one() -> float:
        own.answered(await own.next(), tokens)
        return float(clock.now)

    return sorted(await asyncio.gather(*(one() for _ in range(count))))


@pytest.mark.parametrize(
    ("limit", "processes", "most", "window"), [(7, 1, 7, 60), (7, 3, 2, 60), (2, 6, 1, 180)]
)
def test_no_minute_has_more_requests_than_its_limit_and_none_is_wasted(
    clock: SimpleNamespace, limit: int, processes: int, most: int, window: float
) -> None:
    own = Turns(4, requests=limit, processes=processes)
    times = asyncio.run(begin(own, clock, 3 * most + 1))
    assert times == pytest.approx([1000 + window * (i // most) for i in range(3 * most + 1)])


def test_no_minute_has_more_tokens_than_its_limit(clock: SimpleNamespace) -> None:
    own = Turns(4, tokens=100)
    times = asyncio.run(begin(own, clock, 7, tokens=30))
    assert times == [1000.0] * 3 + [1060.0] * 3 + [1120.0]
    assert asyncio.run(begin(Turns(4, tokens=100), clock, 3, tokens=500))[1:] == [1180.0, 1240.0]


def test_without_a_limit_nothing_waits(clock: SimpleNamespace) -> None:
    assert asyncio.run(begin(Turns(4), clock, 500, tokens=1e6)) == [1000.0] * 500


def test_pause_holds_up_every_request(clock: SimpleNamespace) -> None:
    own = Turns(4)
    own.pause(12)
    own.pause(3)
    assert asyncio.run(begin(own, clock, 3)) == [1012.0] * 3


def headers(name: str, value: str) -> email.message.Message:
    message = email.message.Message()
    message[name] = value
    return message


@pytest.mark.parametrize(
    ("attributes", "seconds"),
    [
        ({"headers": headers("retry-after", "2.5")}, 2.5),  # urllib; aiohttp's look like it
        ({"response": SimpleNamespace(headers={"retry-after": "7"})}, 7.0),  # httpx, openai
        ({"response": SimpleNamespace(headers={"Retry-After": "7"}), "headers": None}, 7.0),
        ({"response": None, "headers": {}}, 0.0),
        ({"headers": {"Retry-After": "soon"}}, 0.0),
        ({"headers": {"Retry-After": "-3"}}, 0.0),
        ({"headers": {"Retry-After": "nan"}}, 0.0),
        ({"headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}}, 0.0),
        ({}, 0.0),
    ],
)
def test_wait_that_a_server_asks_for_is_read_where_clients_have_it(
    attributes: dict[str, Any], seconds: float
) -> None:
    error = ConnectionError("429")
    for name, value in attributes.items():
        setattr(error, name, value)
    assert retry_after(error) == seconds


def test_wait_may_be_a_date() -> None:
    error = ConnectionError("429")
    error.headers = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)}  # type: ignore[attr-defined]
    assert 3500 < retry_after(error) <= 3600


def test_refused_call_is_repeated_no_earlier_than_the_server_asks_and_says_what_is_waited_for() -> None:
    asked: list[tuple[float, str]] = []
    shown: list[dict[str, float]] = []

    async def reward(prompt: str, completion: str) -> float:
        asked.append((time.monotonic(), completion))
        if len(asked) == 1:
            error = ConnectionError("429")
            error.headers = {"Retry-After": "1"}  # type: ignore[attr-defined]
            raise error
        return 1.0

    own = describe(reward, "refused", Calls(concurrency=2, backoff=0.01))
    begun = own.begin(ROWS, TEXTS)
    while not begun.wait(0.05):
        shown.append(waiting_for([own]))
    assert begun.finish().tolist() == [1.0] * 6
    (first, text), *later = asked
    repeated = next(at for at, completion in later if completion == text)
    assert repeated - first >= 1 and len(asked) == 7
    assert any("rate limit, s" in one and one["waiting for the reward"] > 0 for one in shown)
    assert waiting_for([own]) == {}


def test_error_of_a_refused_call_hints_at_the_limit() -> None:
    async def reward(prompts: list[str], completions: list[str]) -> list[float]:
        error = ConnectionError("429")
        error.headers = {"Retry-After": "0.01"}  # type: ignore[attr-defined]
        raise error

    with pytest.raises(UsageError, match=r"at 2 attempts.*--reward-per-minute"):
        describe(reward, "always refused", Calls(retries=1, backoff=0.01))(ROWS, TEXTS)


@pytest.mark.parametrize("attempts_a_call", [1, 2])
def test_every_attempt_of_every_batch_counts_for_the_limit(
    monkeypatch: pytest.MonkeyPatch, attempts_a_call: int
) -> None:
    attempts: list[str] = []

    async def reward(prompt: str, completion: str) -> float:
        attempts.append(completion)
        if attempts.count(completion) % attempts_a_call:
            raise ConnectionError("down")
        return 1.0

    counted: list[int] = []
    usual = Turns.next

    async def next_turn(self: Turns) -> Any:
        counted.append(1)
        return await usual(self)

    monkeypatch.setattr(Turns, "next", next_turn)
    own = describe(reward, f"{attempts_a_call} attempts", Calls(backoff=0.001, per_minute=1000))
    for _ in range(2):
        own(ROWS, TEXTS)
    assert len(counted) == len(attempts) == 12 * attempts_a_call
    assert len(turns(own.name, own.calls)._sent) == 12 * attempts_a_call, "kept over batches"


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_tokens_are_told_apart_from_the_values(batch: int) -> None:
    async def pair(prompts: list[str], completions: list[str]) -> tuple[float, ...]:
        return tuple(float(text[1:]) for text in completions)

    async def used(prompts: list[str], completions: list[str]) -> tuple[list[float], int]:
        return [float(text[1:]) for text in completions], 10

    async def one(prompt: str, completion: str) -> tuple[float | None, Any]:
        return float(completion[1:]), np.int64(10)

    for function in (pair, used, one):
        calls = Calls(batch=batch, tokens_per_minute=0 if function is pair else 1000)
        own = describe(function, f"{function.__name__} by {batch}", calls)
        assert own(ROWS, TEXTS).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        answered = turns(own.name, calls)._answered_tokens
        requests = 6 if function is one else -(-6 // batch)
        assert answered == (0 if function is pair else 10 * requests)


def test_limit_of_tokens_is_refused_for_a_function_that_does_not_say_them() -> None:
    calls: list[int] = []

    async def reward(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(1)
        return [0.0] * len(prompts)

    with pytest.raises(UsageError, match=r"reward_tokens_per_minute = 50.*\(values, tokens\)"):
        describe(reward, "silent", Calls(tokens_per_minute=50))(ROWS, TEXTS)
    assert len(calls) == 1


def test_batches_share_the_calls_that_may_be_under_way() -> None:
    most, now = 0, 0

    async def reward(prompt: str, completion: str) -> float:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return 1.0

    own = describe(reward, "shared", Calls(concurrency=2))
    batches = [own.begin(ROWS, TEXTS) for _ in range(3)]
    for batch in batches:
        batch.result()
    assert most == 2


def cached_reward(tmp_path: Path, function: Callable[..., Any]) -> Reward:
    return Reward(function, "mine", "1", "0" * 64, cache=RewardCache(tmp_path / "rewards.sqlite"))


def test_what_another_batch_asks_by_now_is_not_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []
    gate = asyncio.Event()

    async def reward(prompt: str, completion: str) -> float | None:
        asked.append(completion)
        if completion == "open":
            gate.set()
        await gate.wait()
        return None if completion == "t1" else float(len(asked))

    own = cached_reward(tmp_path, reward)
    first = own.begin(ROWS[:3], TEXTS[:3])
    second = own.begin([*ROWS[1:3], {"prompt": "q"}], [*TEXTS[1:3], "open"])
    once, again = first.result(), second.result()
    assert sorted(asked) == ["open", "t0", "t1", "t2"]
    assert [str(value) for value in once[1:]] == [str(value) for value in again[:2]]
