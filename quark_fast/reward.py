"""Rewards: any callable in TRL's signature, checked at every call."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quark_fast.config import UsageError
from quark_fast.prompts import Row

Function = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Reward:
    """A reward function with what identifies it in every table: name, version, hash.

    Attributes:
        function: ``function(prompts, completions, **columns) -> list[float | None]``; higher is better,
            None leaves a sample out. ``columns`` are the other fields of the prompts' rows, as lists.
        property: what ``1 - reward`` measures ("toxicity"), or None when the reward is not of that form.
    """

    function: Function
    name: str
    version: str
    sha256: str
    property: str | None = None

    def __call__(self, rows: Sequence[Row], completions: Sequence[str]) -> npt.NDArray[np.float64]:
        """(N,) rewards of completions of the rows' prompts; NaN where the function gave None or NaN.

        Raises:
            UsageError: the function raised, or returned anything but one number or None each.
        """
        prompts = [row["prompt"] for row in rows]
        names = {name for row in rows for name in row if name != "prompt"}
        columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
        try:
            values = self.function(prompts=prompts, completions=list(completions), **columns)
        except Exception as error:
            raise UsageError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        # A scalar tensor has __len__, too, but no length.
        scalar = getattr(values, "ndim", 1) == 0 or not hasattr(values, "__len__")
        if scalar or isinstance(values, str | bytes | Mapping):
            raise UsageError(f"reward {self.name} returned {values!r:.80}; return a list of numbers")
        if len(values) != len(prompts):
            raise UsageError(
                f"reward {self.name} returned {len(values)} values for {len(prompts)} completions;"
                " return one each, None to leave one out"
            )
        return np.array([self._number(value) for value in values], dtype=np.float64)

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        # numpy and torch scalars have item(); a text, a list, a row of a matrix or a bool is a mistake.
        plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
        if isinstance(plain, bool) or not isinstance(plain, int | float):
            raise UsageError(f"reward {self.name} returned {value!r:.80}; return numbers or None")
        if math.isinf(plain):
            raise UsageError(f"reward {self.name} returned {value!r:.80}; return finite numbers or None")
        return float(plain)

    def check(self, rows: Sequence[Row]) -> None:
        """Call the reward on a few texts before any long work, so that its mistakes show at once."""
        rows = rows[:3]
        texts = [row["prompt"] for row in rows]  # as good as any text of the user's own domain
        rewards = self(rows, texts)
        if np.isnan(rewards).all():
            raise UsageError(
                f"reward {self.name} scored none of {len(texts)} texts (None or NaN for"
                f" {texts[0]!r}); return a number for ordinary text"
            )


def load_reward(spec: str) -> Reward:
    """The reward named ``package.module:function``. Importing it runs its code."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UsageError(f"reward {spec!r}: write it as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise UsageError(
            f"reward {spec!r}: importing {module_name} failed, {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"reward {spec!r}: {module_name} has no function {name!r}")
    return describe(function, spec)


def describe(function: Function, name: str | None = None) -> Reward:
    """Wrap a plain function; its source file's hash stands for its version."""
    plain = inspect.unwrap(function)
    has_source = inspect.isfunction(plain) or inspect.ismethod(plain)
    source = inspect.getsourcefile(plain) if has_source else None
    content = Path(source).read_bytes() if source and Path(source).is_file() else b""
    named = name or f"{function.__module__}:{getattr(function, '__qualname__', repr(function))}"
    return Reward(function, named, "source", hashlib.sha256(content).hexdigest())
