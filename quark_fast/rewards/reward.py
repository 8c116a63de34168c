"""What a reward is and how it is called: any callable in TRL's signature, checked at every call."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quark_fast.data.readers import listed
from quark_fast.data.row import Row
from quark_fast.errors import UsageError
from quark_fast.metrics import LARGEST
from quark_fast.rewards.asynchronous import DEFAULT_CALLS, Calls, begin_calls, own_copies
from quark_fast.rewards.cache import RewardCache
from quark_fast.rewards.failure import told
from quark_fast.rewards.identity import held_by, name_of, source_sha256
from quark_fast.runtime.overlap import Begun

IDENTITY = ("name", "version", "sha256")

Function = Callable[..., Any]

RESERVED = frozenset({"prompt", "prompts", "completion", "completions"})  # no columns of a reward

_OF_TRL = frozenset({"completion_ids", "trainer_state", "log_extra", "log_metric"})  # besides columns


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
        held: hash of what a function that is to be cached held when it was given, ``identity.held_by``. It
            tells apart values in the cache, not rewards: a counter in it may be another at a resume.
    """

    function: Function
    name: str
    version: str
    sha256: str
    property: str | None = None
    calls: Calls = DEFAULT_CALLS
    cache: RewardCache | None = None
    held: str = ""

    def __call__(self, rows: Sequence[Row], completions: Sequence[str]) -> npt.NDArray[np.float64]:
        """(N,) rewards of completions of the rows' prompts; NaN where the function gave None or NaN.

        Raises:
            UsageError: the function raised (an asynchronous one: at its last attempt), or returned anything
                but one number or None each.
        """
        return self.begin(rows, completions).result()

    def begin(self, rows: Sequence[Row], completions: Sequence[str]) -> Begun[npt.NDArray[np.float64]]:
        """The same, without waiting for the answers of an asynchronous function.

        A plain function is called here and now: it would hold up the sampling, if only by Python's lock, and
        need not be made for being called beside it.
        """
        keys = [self._key(row, text) for row, text in zip(rows, completions, strict=True)]
        # First what is asked by now, then what is known: an answer that comes in between is in the cache.
        asked = {key: future for key, future in self._asked.items() if not future.done()}
        known = self._known(keys)
        rewards = np.array([math.nan if key is None else known.get(key, math.nan) for key in keys])

        awaited = [i for i, key in enumerate(keys) if key in asked and key not in known]
        to_ask, repeats = _without_repeats(keys, {*known, *asked})

        def keep(part: list[int], answer: Any) -> npt.NDArray[np.float64]:
            values = _numbers(self.name, [answer] if self.one_at_a_time else answer, len(part))
            for i, value in zip(part, values, strict=True):
                rewards[[i, *repeats.get(i, ())]] = value
            if self.cache is not None:
                pairs = zip((keys[i] for i in part), values, strict=True)
                self.cache.add({key: value for key, value in pairs if key is not None})
            return rewards

        parts = self._parts(to_ask)
        names = sorted({name for row in rows for name in row if name not in RESERVED})
        if parts:
            self._check_arguments(names)
        jobs = (
            (part, self._arguments([rows[i] for i in part], [completions[i] for i in part], names))
            for part in parts
        )
        if self.asynchronous:
            futures = {asked[key] for i in awaited if (key := keys[i]) is not None}
            if parts:
                called = begin_calls(self.name, self.function, self.calls, list(jobs), keep)
                asked |= {key: called for part in parts for i in part if (key := keys[i]) is not None}
                futures.add(called)
            self._asked.clear()
            self._asked.update(asked)

            def finish() -> npt.NDArray[np.float64]:
                answered = self._known([keys[i] for i in awaited])
                rewards[awaited] = [answered[key] for i in awaited if (key := keys[i]) is not None]
                return rewards

            return Begun(finish, list(futures))
        for part, arguments in jobs:
            answer = self._call(arguments)
            if isinstance(answer, Begun):  # a sum's, whose completions are all of one part
                return answer.then(functools.partial(keep, part))
            keep(part, answer)
        return Begun(lambda: rewards)

    @functools.cached_property
    def asynchronous(self) -> bool:
        """Whether the function is awaited."""
        own_call = getattr(self.function, "__call__", None)  # noqa: B004, the method itself is asked about
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(own_call)

    @functools.cached_property
    def one_at_a_time(self) -> bool:
        """Whether the function is called for one completion at a time."""
        try:
            names = inspect.signature(self.function).parameters.keys()
        except (TypeError, ValueError):  # some builtins have none
            return False
        return "completion" in names and "completions" not in names

    def to_be_cached(self, mode: Literal["auto", "on", "off"]) -> bool:
        """Whether ``reward_cache`` asks for a cache: "auto" where there are many calls a batch.

        These are slow or paid for, and a batch of them is not to be lost by a kill in the middle of it.
        """
        return mode == "on" or (mode == "auto" and (self.asynchronous or self.one_at_a_time))

    @functools.cached_property
    def call_size(self) -> int:
        """Completions in one call of an asynchronous function."""
        return 1 if self.one_at_a_time else self.calls.batch

    def _parts(self, indices: list[int]) -> list[list[int]]:
        """The completions of each call."""
        size = self.call_size if self.asynchronous or self.one_at_a_time else max(1, len(indices))
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _arguments(self, rows: Sequence[Row], texts: list[str], names: Sequence[str]) -> dict[str, Any]:
        """Of one call; ``names`` are the columns of any row."""
        if self.one_at_a_time:
            (row,), (text,) = rows, texts
            return {"prompt": row["prompt"], "completion": text, **{name: row.get(name) for name in names}}
        columns = {name: [row.get(name) for row in rows] for name in names}
        return {"prompts": [row["prompt"] for row in rows], "completions": texts, **columns}

    def _check_arguments(self, columns: Sequence[str]) -> None:
        """Raise UsageError for a function that needs an argument which it is not passed."""
        first = ["prompt", "completion"] if self.one_at_a_time else ["prompts", "completions"]
        missing = [name for name in self._needed if name not in (*first, *columns)]
        if not missing:
            return
        passed = f"{' and '.join(first)}, no columns"
        if columns:
            passed = f"{', '.join(first)} and the columns {listed(columns)}"
        trls = [name for name in missing if name in _OF_TRL]
        hint = f" (TRL's {' and '.join(trls)} {'is' if len(trls) == 1 else 'are'} not passed)" if trls else ""
        if kept := [name for name in missing if name in RESERVED]:
            hint += (
                f" ({' and '.join(kept)} names an argument, and no column of that name is passed: rename it)"
            )
        raise UsageError(
            f"reward {self.name} needs {' and '.join(missing)}, which it is not passed{hint};"
            f" passed: {passed}; leave it out of the signature, give it a default, or give the prompts such"
            " a column"
        )

    @functools.cached_property
    def _needed(self) -> list[str]:
        """The arguments that the function cannot be called without, as far as its own code says so."""
        plain = inspect.isfunction(self.function) or inspect.ismethod(self.function)
        own = self.function if plain else getattr(self.function, "__call__", None)  # noqa: B004
        if not (inspect.isfunction(own) or inspect.ismethod(own)) or hasattr(own, "__signature__"):
            return []
        # Not of what a wrapper wraps: it may add the rest.
        parameters = inspect.signature(own, follow_wrapped=False).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [one.name for one in parameters if one.kind in kinds and one.default is one.empty]

    @functools.cached_property
    def _asked(self) -> dict[bytes, Future[None]]:
        """The keys whose values are asked for by now, with what ends when they are in the cache."""
        return {}

    def _known(self, keys: Sequence[bytes | None]) -> dict[bytes, float]:
        """Those of the keys that the cache has."""
        return {} if self.cache is None else self.cache.find([key for key in keys if key is not None])

    def _call(self, arguments: dict[str, Any]) -> Any:
        """What a plain function returns."""
        try:
            return self.function(**own_copies(arguments))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # it may call a command, which exits
            raise UsageError(f"reward {self.name} raised {told(error, self.function, arguments)}") from error

    def _key(self, row: Row, completion: str) -> bytes | None:
        """What a value in the cache stands for.

        None without a cache, and for a row with a column that cannot be spelled.
        """
        if self.cache is None:
            return None
        columns = {name: value for name, value in row.items() if name not in RESERVED}
        try:
            content = [self.identity, self.held, row["prompt"], completion, columns]
            text = json.dumps(content, sort_keys=True, default=_spelled)
        except (TypeError, ValueError):
            return None
        return hashlib.sha256(text.encode()).digest()

    def check(self, scored: Iterable[tuple[Sequence[Row], Sequence[str]]]) -> None:
        """Call the reward on a few completions before any long work, so that its mistakes show at once.

        Args:
            scored: (rows of prompts, a completion of each), one batch after another. The first with a
                completion that is scored ends the check: a reward may leave some out.
        Raises:
            UsageError: none of all the completions is scored.
        """
        if self.is_none:
            return
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
    def is_none(self) -> bool:
        """Whether there is no reward: it is ``NO_REWARD``."""
        return self.function is _nothing

    @functools.cached_property
    def identity(self) -> list[str]:
        """``IDENTITY`` of this reward; it changes with its code, its weights and the terms of a sum."""
        return [self.name, self.version, self.sha256]

    def described(self) -> dict[str, Any]:
        """``identity`` as tables hold it."""
        return dict(zip(IDENTITY, self.identity, strict=True))


def _spelled(value: Any) -> str:
    """What JSON has no form for, if its text tells it from every other value; else a TypeError."""
    if isinstance(value, date | time | timedelta | Decimal | bytes | np.generic):
        return repr(value)
    raise TypeError


def _nothing(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[None]:
    return [None] * len(completions)


# In place of a reward that a run does without: it samples nothing, and learns from what is scored already.
NO_REWARD = Reward(_nothing, "none", "", "")


def describe(
    function: Function,
    name: str | None = None,
    calls: Calls = DEFAULT_CALLS,
    cache: Literal["auto", "on", "off"] = "auto",
    module: types.ModuleType | None = None,
) -> Reward:
    """Wrap a function; the hash of its source stands for its version.

    Args:
        cache: as ``reward_cache`` of the settings; what the function holds is read for that alone.
        module: where the function was found, for the hash.
    Raises:
        UsageError: it is none: a class, a model, or what cannot be called.
    """
    named = name or name_of(function)
    if isinstance(function, type):
        raise UsageError(
            f"reward {named} is a class, which makes no numbers of completions; give an instance of it"
            f" ({function.__name__}(...)), or a function"
        )
    if type(function).__module__.startswith("transformers."):  # TRL takes models, too
        raise UsageError(
            f"reward is of type {type(function).__name__}; save that, and its tokenizer, by"
            " save_pretrained(FOLDER), and give 'hf:FOLDER:LABEL' with the label to reward"
        )
    if not callable(function):
        raise UsageError(
            f"reward is of type {type(function).__name__}, which cannot be called; give a function"
            " reward(prompts, completions, **columns), the name of one, a list of them, which are added up,"
            ' or a weighted sum by name, as in "0.7*package.module:f + 0.3*package.module:g"'
        )
    made = Reward(function, named, "source", source_sha256(function, module), calls=calls)
    return dataclasses.replace(made, held=held_by(function)) if made.to_be_cached(cache) else made


def _without_repeats(
    keys: Sequence[bytes | None], answered: Set[bytes | None]
) -> tuple[list[int], dict[int, list[int]]]:
    """(which samples to ask of, by their keys in the cache; of each of these the later ones of its key).

    Without a cache (None) every sample is asked of.
    """
    first: dict[bytes, int] = {}
    to_ask: list[int] = []
    repeats: dict[int, list[int]] = {}
    for i, key in enumerate(keys):
        if key in answered:
            continue
        asked = i if key is None else first.setdefault(key, i)
        if asked == i:
            to_ask.append(i)
        else:
            repeats.setdefault(asked, []).append(i)
    return to_ask, repeats


def _numbers(name: str, values: Any, count: int) -> list[float]:
    """The values of so many completions, NaN for None; UsageError for anything but numbers."""
    if inspect.iscoroutine(values):
        values.close()
        raise UsageError(f"reward {name} returned a coroutine; define it by async def")
    # A scalar tensor has __len__, too, but no length; a table lists its columns; a set has no order.
    flat = getattr(values, "ndim", 1) == 1 and hasattr(values, "__len__")
    if not flat or isinstance(values, str | bytes | Mapping | Set):
        raise UsageError(f"reward {name} returned {values!r:.80}; return a list of numbers")
    if len(values) != count:
        raise UsageError(
            f"reward {name} returned {len(values)} values for {count} completions;"
            " return one each, None to leave one out"
        )
    return [_number(name, value) for value in values]


def _number(name: str, value: Any) -> float:
    if value is None or value is np.ma.masked:
        return math.nan
    # numpy and torch scalars have item(); a bool is 0 or 1; a text or a row of a matrix is a mistake.
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(plain, Real | Decimal):
        raise UsageError(f"reward {name} returned {value!r:.80}; return numbers or None")
    try:
        number = float(plain)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    except ValueError:  # a Decimal that signals that it is none
        number = math.nan
    if abs(number) >= LARGEST:
        raise UsageError(
            f"reward {name} returned {value!r:.80}; return finite numbers below {LARGEST:g} in size, or None:"
            " scale larger ones down, or take their logarithm"
        )
    return number
