"""Asynchronous rewards: several calls at once, each with a time-out and retries."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import tenacity

from quark_fast.errors import UsageError

LONGEST_WAIT = 60.0  # seconds between two attempts
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
            random factor in [0.5, 1], so that calls which failed together do not come back together.
    """

    batch: int = 16
    concurrency: int = 16
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0


DEFAULT_CALLS = Calls()


def call_side_by_side(
    name: str,
    function: Callable[..., Any],
    calls: Calls,
    jobs: Iterable[tuple[list[int], dict[str, Any]]],
    keep: Callable[[list[int], Any], None],
) -> None:
    """Call the function of the reward ``name`` for all jobs, and keep each answer as it returns.

    Args:
        jobs: (indices of the call's completions, its arguments).
    Raises:
        UsageError: the function failed at its last attempt.
    """
    free = asyncio.Semaphore(calls.concurrency)

    async def one(part: list[int], arguments: dict[str, Any]) -> None:
        async with free:
            keep(part, await _answer(name, function, calls, arguments))

    async def every() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for part, arguments in jobs:
                    group.create_task(one(part, arguments))
        except ExceptionGroup as failed:  # the first failure has ended the other calls
            raise failed.exceptions[0] from failed.exceptions[0].__cause__

    waiting = asyncio.run_coroutine_threadsafe(every(), _event_loop())
    try:
        # Woken now and then: a signal that another thread received is handled by this one.
        while not concurrent.futures.wait([waiting], timeout=0.5).done:
            pass
        waiting.result()
    except BaseException:  # Ctrl-C, too: the calls are not waited for any more
        waiting.cancel()
        raise


async def _answer(name: str, function: Callable[..., Any], calls: Calls, arguments: dict[str, Any]) -> Any:
    """What the function returns, called again after an error or a time-out."""

    async def attempt() -> Any:
        deadline = asyncio.timeout(calls.timeout or None)
        try:
            async with deadline:
                return await function(**arguments)
        except TimeoutError as error:
            if deadline.expired():
                raise TimeoutError(f"no answer in {calls.timeout:g} s") from error
            raise

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
        raise UsageError(f"reward {name} raised {type(error).__name__}: {error}") from error
    except (Exception, asyncio.CancelledError) as error:
        if not _may_pass(error):
            raise
        first = arguments["completion"] if "completion" in arguments else arguments["completions"][0]
        raise UsageError(
            f"reward {name} failed at {1 + calls.retries} attempts, at last with {type(error).__name__}:"
            f" {error}; the first completion of the call: {first!r:.80}"
        ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is None or not task.cancelling()  # by the function, not by us
    return isinstance(error, Exception) and not isinstance(error, MISTAKES)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the life of the process, in a thread of its own.

    A scorer can keep its connections from call to call, and a caller may have a running loop: notebooks do.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="quark_fast rewards", daemon=True).start()
    return loop
