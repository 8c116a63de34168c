"""Asynchronous rewards: several calls at once, each with a time-out and retries."""

from __future__ import annotations

import asyncio
import copy
import functools
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Any

import tenacity

from quark_fast.errors import UsageError
from quark_fast.rewards.failure import told
from quark_fast.rewards.turns import Turns, retry_after
from quark_fast.runtime.distributed import process_count

LONGEST_WAIT = 60.0  # seconds between two attempts
# For asyncio.to_thread in a reward; each is begun when a call needs it. asyncio's own limit, a few more than
# there are cores, would hold up calls that count as under way.
MOST_THREADS = 10_000
# Errors in the reward's code, which trying again does not fix; the last two would end the event loop.
MISTAKES = (
    *(TypeError, AttributeError, NameError, ImportError, NotImplementedError),
    *(SystemExit, KeyboardInterrupt),
)

_jitter = random.Random()  # apart from the global generator, whose state is the user's


@dataclass(frozen=True)
class Calls:
    """How an asynchronous reward is called.

    Attributes:
        batch: completions in one call.
        concurrency: calls under way at once.
        timeout: seconds for one attempt; 0: no limit.
        retries: further attempts after a failed one.
        backoff: seconds before the second attempt, doubled before each further one (60 at most), times a
            random factor in [0.5, 1], so that calls which failed together do not come back together. Where
            the server says when to come back (``retry_after``), no call of the function is made before.
        per_minute, tokens_per_minute: attempts, and tokens, of all processes in any 60 s; 0: no limit.
    """

    batch: int = 16
    concurrency: int = 16
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0
    per_minute: int = 0
    tokens_per_minute: int = 0


DEFAULT_CALLS = Calls()


@functools.cache
def turns(name: str, calls: Calls) -> Turns:
    """Of the reward ``name``: one for the life of the process, as the limits are kept over all batches."""
    return Turns(calls.concurrency, calls.per_minute, calls.tokens_per_minute, process_count())


def begin_calls(
    name: str,
    function: Callable[..., Any],
    calls: Calls,
    jobs: Sequence[tuple[list[int], dict[str, Any]]],
    keep: Callable[[list[int], Any], Any],
) -> Future[None]:
    """Call the function of the reward ``name`` for all jobs, and keep each answer as it returns.

    The calls of several batches share their limits, and those of the first batch go out first.

    Args:
        jobs: (indices of the call's completions, its arguments).
        keep: called in the event loop's thread.
    Returns:
        Ends with the last call. Raises UsageError where the function failed at its last attempt.
    """
    own = turns(name, calls)
    left = sum(len(part) for part, _ in jobs)

    async def one(part: list[int], arguments: dict[str, Any]) -> None:
        nonlocal left
        async with own.free:
            keep(part, await _answer(name, function, calls, own, arguments))
        own.unanswered, left = own.unanswered - len(part), left - len(part)

    async def every() -> None:
        own.unanswered += left
        try:
            async with asyncio.TaskGroup() as group:
                for part, arguments in jobs:
                    group.create_task(one(part, arguments))
        except ExceptionGroup as failed:  # the first failure has ended the other calls
            raise failed.exceptions[0] from failed.exceptions[0].__cause__
        finally:
            own.unanswered -= left

    return asyncio.run_coroutine_threadsafe(every(), _event_loop())


async def _answer(
    name: str, function: Callable[..., Any], calls: Calls, turns: Turns, arguments: dict[str, Any]
) -> Any:
    """What the function returns, called again after an error or a time-out."""

    async def attempt() -> Any:
        request = await turns.next()
        deadline = asyncio.timeout(calls.timeout or None)
        try:
            async with deadline:
                answered = await function(**own_copies(arguments))
                answer, tokens = _tokens_apart(answered, "completion" in arguments)
        except TimeoutError as error:
            if deadline.expired():
                raise TimeoutError(f"no answer in {calls.timeout:g} s") from error
            raise
        except Exception as error:
            turns.pause(retry_after(error))
            raise
        if tokens is None and calls.tokens_per_minute:
            raise UsageError(
                f"reward_tokens_per_minute = {calls.tokens_per_minute}, but reward {name} does not say how"
                " many it used; have it return (values, tokens), or leave the setting out"
            )
        turns.answered(request, tokens or 0)
        return answer

    backoff = tenacity.wait_exponential(calls.backoff, max=LONGEST_WAIT)
    attempts = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(1 + calls.retries),
        # tenacity's own jitter is drawn from the global generator.
        wait=lambda state: backoff(state) * _jitter.uniform(0.5, 1.0),
        reraise=True,
    )
    try:
        return await attempts(attempt)
    except MISTAKES as error:
        raise UsageError(f"reward {name} raised {told(error, function, arguments)}") from error
    except UsageError:
        raise
    except (Exception, asyncio.CancelledError) as error:
        if not _may_pass(error):
            raise
        first = arguments["completion"] if "completion" in arguments else arguments["completions"][0]
        hint = "; --reward-per-minute keeps within a server's limit" if retry_after(error) else ""
        raise UsageError(
            f"reward {name} failed at {1 + calls.retries} attempts, at last with"
            f" {told(error, function, arguments)}; the first completion of the call: {first!r:.80}{hint}"
        ) from error


def own_copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for one attempt, which may append to a chat's messages without changing the run's."""

    def own(value: Any) -> Any:
        return copy.deepcopy(value) if isinstance(value, list | dict | set) else value

    if "completion" in arguments:
        return {name: own(value) for name, value in arguments.items()}
    return {name: [own(value) for value in values] for name, values in arguments.items()}


def _tokens_apart(answer: Any, one: bool) -> tuple[Any, float | None]:
    """(values, tokens) of an answer that says how many tokens it used, (values, None) of any other.

    Args:
        one: the answer is for one completion; else its values are a list, which tells (values, tokens) from
            the values of two completions.
    """
    if isinstance(answer, tuple) and len(answer) == 2:
        values, tokens = answer
        apart = one or (hasattr(values, "__len__") and getattr(values, "ndim", 1) != 0)
        number = isinstance(tokens, Real) and not isinstance(tokens, bool)  # numpy's, too
        if apart and number and 0 <= tokens < float("inf"):
            return values, float(tokens)
    return answer, None


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or not task.cancelling()  # by the function, not by us
    return isinstance(error, Exception) and not isinstance(error, (*MISTAKES, UsageError))


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the life of the process, in a thread of its own.

    A scorer can keep its connections from call to call, and a caller may have a running loop: notebooks do.
    """
    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(MOST_THREADS, "quark_fast reward"))
    threading.Thread(target=loop.run_forever, name="quark_fast rewards", daemon=True).start()
    return loop


def _forget_the_loop() -> None:
    """Its thread does not outlive a fork."""
    for of_loop in (_event_loop, turns):
        of_loop.cache_clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget_the_loop)
