"""What a reward raised, for an error of one line: its kind, where in the user's own code, and its message."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quark_fast.data.row import Rendered
from quark_fast.rewards.identity import source_file

_OURS = Path(__file__).resolve().parents[1]
_PYTHONS = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))


def told(
    error: BaseException,
    function: Callable[..., Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Such as "KeyError at rw.py:7: 'x'".

    Args:
        function: the reward, whose own file counts as the user's, installed or not; None: a module's import.
        arguments: what it was called with.
    """
    kind = f"{type(error).__name__}{_place(error, function)}"
    return f"{kind}: {error}{_hint(error, arguments or {})}"


def _place(error: BaseException, function: Callable[..., Any] | None) -> str:
    """Where: the innermost frame that stands neither in a library nor here; "" without one."""
    own = source_file(function) if function is not None else ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == own or _users(frame.filename):
            return f" at {_short(frame.filename)}:{frame.lineno}"
    return ""


def _users(name: str) -> bool:
    file = Path(name)
    if not file.is_file():  # "<frozen importlib._bootstrap>", "<string>"
        return False
    file = file.resolve()
    installed = {"site-packages", "dist-packages"} & {*file.parts}
    return not installed and not any(file.is_relative_to(folder) for folder in (_OURS, *_PYTHONS))


def _short(name: str) -> str:
    """A file below the working folder as it is found from there."""
    path = Path(os.path.abspath(name)) if Path(name).is_file() else Path(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _hint(error: BaseException, arguments: Mapping[str, Any]) -> str:
    """For rewards written for TRL, which hands completions of a chat over as messages."""
    prompts = arguments.get("prompts", [arguments.get("prompt")])
    chats = any(isinstance(prompt, Rendered) for prompt in prompts)
    said = str(error)
    if "string indices" not in said and not (chats and "'str'" in said):
        return ""
    if not isinstance(error, TypeError | AttributeError):
        return ""
    return "; completions are texts here, also those of chats: completion, not completion[0]['content']"
