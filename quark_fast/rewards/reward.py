"""What a reward is and how it is called: any callable in TRL's signature, checked at every call.

Coroutine functions are awaited: several calls at once, each with a time-out and retries.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import hashlib
import inspect
import json
import linecache
import math
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import numpy.typing as npt

from quark_fast.data.row import Row
from quark_fast.errors import UsageError
from quark_fast.rewards.cache import RewardCache

Function = Callable[..., Any]

NO_SOURCE = hashlib.sha256(b"").hexdigest()
RESERVED = frozenset({"prompt", "prompts", "completion", "completions"})  # no columns of a reward
LONGEST_WAIT = 60.0  # seconds between two attempts
# Errors in the reward's code, which trying again does not mend; the last two would end the event loop.
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


@dataclass(frozen=True)
class Reward:
    """A reward function with what identifies it in every table: name, version, hash.

    Attributes:
        function: ``function(prompts, completions, **columns) -> list[float | None]``; higher is better,
            None leaves a sample out. ``columns`` are the other fields of the prompts' rows, as lists. With a
            parameter named ``completion`` it is instead ``function(prompt, completion, **columns) -> float |
            None``, called for one at a time. Either may be ``async def``.
        property: what ``1 - reward`` measures ("toxicity"), or None when the reward is not of that form.
        calls: how it is called if it is asynchronous.
        cache: where values that are known are looked up; None: always call.
    """

    function: Function
    name: str
    version: str
    sha256: str
    property: str | None = None
    calls: Calls = Calls()
    cache: RewardCache | None = None

    @functools.cached_property
    def asynchronous(self) -> bool:
        """Whether the function is awaited."""
        own_call = getattr(self.function, "__call__", None)  # noqa: B004, the method itself is asked about
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(own_call)

    def __call__(self, rows: Sequence[Row], completions: Sequence[str]) -> npt.NDArray[np.float64]:
        """(N,) rewards of completions of the rows' prompts; NaN where the function gave None or NaN.

        Raises:
            UsageError: the function raised (an asynchronous one: at its last attempt), or returned anything
                but one number or None each.
        """
        names = {name for row in rows for name in row if name not in RESERVED}
        batch = _Batch(rows, completions, sorted(names))
        rewards = np.full(len(rows), np.nan)
        left = list(range(len(rows)))
        keys: list[bytes | None] = [None] * len(rows)
        if self.cache is not None:
            keys = [self._key(row, text) for row, text in zip(rows, completions, strict=True)]
            known = self.cache.find([key for key in keys if key is not None])
            for i, key in enumerate(keys):
                if key in known:
                    rewards[i] = known[key]
            left = [i for i in left if keys[i] not in known]

        def keep(part: Sequence[int], values: Sequence[float]) -> None:
            rewards[list(part)] = values
            if self.cache is not None:
                pairs = zip((keys[i] for i in part), values, strict=True)
                self.cache.add({key: value for key, value in pairs if key is not None})

        if left and self.asynchronous:
            self._wait_for(batch, left, keep)
        elif self.one_at_a_time:
            for i in left:
                keep([i], self._call(batch, [i]))
        elif left:
            keep(left, self._call(batch, left))
        return rewards

    def _key(self, row: Row, completion: str) -> bytes | None:
        """What a value in the cache stands for; None for a row with a column that JSON cannot spell."""
        columns = {name: value for name, value in row.items() if name not in RESERVED}
        try:
            text = json.dumps([self.identity, row["prompt"], completion, columns], sort_keys=True)
        except (TypeError, ValueError):
            return None
        return hashlib.sha256(text.encode()).digest()

    @functools.cached_property
    def one_at_a_time(self) -> bool:
        """Whether the function is called for one completion at a time."""
        try:
            names = inspect.signature(self.function).parameters.keys()
        except (TypeError, ValueError):  # some builtins have none
            return False
        return "completion" in names and "completions" not in names

    def _call(self, batch: _Batch, part: Sequence[int]) -> list[float]:
        """The rewards of some of the batch by a plain function."""
        try:
            values = self.function(**(batch.one(part[0]) if self.one_at_a_time else batch.several(part)))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        return self._numbers([values] if self.one_at_a_time else values, len(part))

    # ------------------------------------------------------------- asynchronous

    def _wait_for(
        self, batch: _Batch, left: Sequence[int], keep: Callable[[Sequence[int], list[float]], None]
    ) -> None:
        """Call an asynchronous function for all that is left, and keep each call's values as it returns."""
        size = 1 if self.one_at_a_time else self.calls.batch
        free = asyncio.Semaphore(self.calls.concurrency)

        async def one(part: Sequence[int]) -> None:
            async with free:
                keep(part, await self._attempts(batch, part))

        async def every() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for start in range(0, len(left), size):
                        group.create_task(one(left[start : start + size]))
            except ExceptionGroup as failed:  # the first failure has ended the other calls
                raise failed.exceptions[0] from failed.exceptions[0].__cause__

        waiting = asyncio.run_coroutine_threadsafe(every(), _event_loop())
        try:
            # Woken now and then: a signal that another thread received is handled by this one.
            while not concurrent.futures.wait([waiting], timeout=0.5).done:
                pass
            waiting.result()
        except BaseException:  # Ctrl-C, too: nobody waits for the calls any more
            waiting.cancel()
            raise

    async def _attempts(self, batch: _Batch, part: Sequence[int]) -> list[float]:
        """One call's values, tried again after an error or a time-out."""
        arguments = batch.one(part[0]) if self.one_at_a_time else batch.several(part)
        attempts = 1 + self.calls.retries
        for attempt in range(1, attempts + 1):
            deadline = asyncio.timeout(self.calls.timeout or None)
            try:
                async with deadline:
                    values = await self.function(**arguments)
                break
            except MISTAKES as error:
                raise UsageError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise  # by us, not by the function
                why = f"no answer in {self.calls.timeout:g} s" if deadline.expired() else str(error)
                if attempt == attempts:
                    raise UsageError(
                        f"reward {self.name} failed at {attempts} attempts, at last with"
                        f" {type(error).__name__}: {why}; the first completion of the call:"
                        f" {batch.completions[part[0]]!r:.80}"
                    ) from error
            wait = min(LONGEST_WAIT, self.calls.backoff * 2.0 ** (attempt - 1))
            await asyncio.sleep(wait * _jitter.uniform(0.5, 1.0))
        return self._numbers([values] if self.one_at_a_time else values, len(part))

    # ------------------------------------------------------------- what came back

    def _numbers(self, values: Any, count: int) -> list[float]:
        if inspect.iscoroutine(values):
            values.close()
            raise UsageError(f"reward {self.name} returned a coroutine; define it by async def")
        # A scalar tensor has __len__, too, but no length.
        scalar = getattr(values, "ndim", 1) == 0 or not hasattr(values, "__len__")
        if scalar or isinstance(values, str | bytes | Mapping):
            raise UsageError(f"reward {self.name} returned {values!r:.80}; return a list of numbers")
        if len(values) != count:
            raise UsageError(
                f"reward {self.name} returned {len(values)} values for {count} completions;"
                " return one each, None to leave one out"
            )
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        # numpy and torch scalars have item(); a bool is 0 or 1; a text or a row of a matrix is a mistake.
        plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if not isinstance(plain, int | float):
            raise UsageError(f"reward {self.name} returned {value!r:.80}; return numbers or None")
        try:
            number = float(plain)
        except OverflowError:  # a whole number of more than 308 digits
            number = math.inf
        if math.isinf(number):
            raise UsageError(f"reward {self.name} returned {value!r:.80}; return finite numbers or None")
        return number

    def check(self, scored: Iterable[tuple[Sequence[Row], Sequence[str]]]) -> None:
        """Call the reward on a few completions before any long work, so that its mistakes show at once.

        Args:
            scored: (rows of prompts, a completion of each), one batch after another. The first with a
                completion that is scored ends the check: a reward may leave some out.
        Raises:
            UsageError: none of all the completions is scored.
        """
        tried: list[str] = []
        for rows, completions in scored:
            tried += completions
            if not np.isnan(self(rows, completions)).all():
                return
        raise UsageError(
            f"reward {self.name} scored none of {len(tried)} completions (None or NaN for {tried[0]!r});"
            " return a number for ordinary text"
        )

    @functools.cached_property
    def identity(self) -> list[str]:
        """What tells this reward from another, also from itself after its code, weights or sum changed."""
        return [self.name, self.version, self.sha256]


@dataclass(frozen=True)
class _Batch:
    """What a call's arguments are taken from."""

    rows: Sequence[Row]
    completions: Sequence[str]
    names: Sequence[str]

    def several(self, part: Sequence[int]) -> dict[str, Any]:
        rows = [self.rows[i] for i in part]
        columns = {name: [row.get(name) for row in rows] for name in self.names}
        texts = [self.completions[i] for i in part]
        return {"prompts": [row["prompt"] for row in rows], "completions": texts, **columns}

    def one(self, i: int) -> dict[str, Any]:
        columns = {name: self.rows[i].get(name) for name in self.names}
        return {"prompt": self.rows[i]["prompt"], "completion": self.completions[i], **columns}


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the life of the process, in a thread of its own.

    A scorer can keep its connections from call to call, and a caller may have a running loop: notebooks do.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="quark_fast rewards", daemon=True).start()
    return loop


def describe(function: Function, name: str | None = None, calls: Calls = Calls()) -> Reward:
    """Wrap a function; the hash of its source stands for its version."""
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    plain = inspect.unwrap(plain)
    own = plain if inspect.isfunction(plain) or inspect.ismethod(plain) else type(plain)
    named = name or f"{function.__module__}:{getattr(function, '__qualname__', repr(function))}"
    return Reward(function, named, "source", hashlib.sha256(_source(own)).hexdigest(), calls=calls)


def _source(own: Any) -> bytes:
    """The file that defines it; in a notebook its cell; at a prompt its byte code; nothing for a builtin."""
    try:
        file = inspect.getsourcefile(own) or ""
    except (TypeError, OSError):  # a builtin; a class that was typed at a prompt
        file = ""
    if Path(file).is_file():
        return Path(file).read_bytes()
    lines = "".join(linecache.getlines(file)).encode()
    code = getattr(own.__call__ if isinstance(own, type) else own, "__code__", None)
    return lines or (_byte_code(code).encode() if code else b"")


def _byte_code(code: CodeType) -> str:
    """What a function does, with those inside it, but not where it stands."""

    def plain(constant: Any) -> str:
        if isinstance(constant, CodeType):
            return _byte_code(constant)
        # A set of texts has another order in every process.
        return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)

    return repr((code.co_code, code.co_names, [plain(one) for one in code.co_consts]))
