"""What identifies a reward function: the sha256 of its source, which a resumed run compares."""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
import pprint
import re
from collections.abc import Callable
from pathlib import Path
from types import CellType, CodeType
from typing import Any

from quark_fast.errors import UsageError

_ADDRESS = " at 0x[0-9a-fA-F]+"
NO_SOURCE = hashlib.sha256(b"").hexdigest()


def source_sha256(function: Callable[..., Any]) -> str:
    """Of the source of a function, of the one inside partials and wrappers, or of an object's class."""
    return hashlib.sha256(_source(_defined(function))).hexdigest()


def name_of(function: Any) -> str:
    """``module:name`` of a function, of an object's class, or of what a partial calls with its arguments.

    The same in every process: no address of an object is in it.
    """
    if isinstance(function, functools.partial):
        given = [repr(one) for one in function.args]
        given += [f"{name}={one!r}" for name, one in sorted(function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(re.sub(_ADDRESS, '', one) for one in given)})"
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}:{own.__qualname__}"


def held_by(function: Any) -> str:
    """sha256 of what a function's closure, or an object's attributes, hold now; two of one code may differ.

    Likewise the same in every process, as far as the values' own texts are.
    """
    while isinstance(function, functools.partial):  # whose arguments are in its name
        function = function.func
    own = function.__self__ if inspect.ismethod(function) else function
    cells = getattr(inspect.unwrap(function), "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]  # none in one that is empty yet
    held += [] if inspect.isroutine(own) else [getattr(own, "__dict__", {})]
    try:
        text = pprint.pformat(held)
    except Exception as error:  # of anyone's __repr__
        raise UsageError(
            f"reward {name_of(function)} holds a value that has no text ({type(error).__name__}: {error}), so"
            " its answers cannot be told apart; mend its __repr__, or give reward_cache off"
        ) from error
    return hashlib.sha256(re.sub(_ADDRESS, "", text).encode()).hexdigest()


def source_file(function: Callable[..., Any]) -> str:
    """The file where the function's code stands, or the name of a notebook's cell; "" for a builtin."""
    code = _code(_defined(function))
    return code.co_filename if code else ""


def _defined(function: Callable[..., Any]) -> Any:
    """The function inside partials and wrappers, or an object's class."""
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    plain = inspect.unwrap(plain)
    return plain if inspect.isfunction(plain) or inspect.ismethod(plain) else type(plain)


def _code(own: Any) -> CodeType | None:
    return getattr(own.__call__ if isinstance(own, type) else own, "__code__", None)


def _source(own: Any) -> bytes:
    """The file that defines it; in a notebook its cell; at a prompt its byte code; nothing for a builtin."""
    try:
        file = inspect.getsourcefile(own) or ""
    except (TypeError, OSError):  # a builtin; a class that was typed at a prompt
        file = ""
    if Path(file).is_file():
        return Path(file).read_bytes()
    lines = "".join(linecache.getlines(file)).encode()
    code = _code(own)
    return lines or (_byte_code(code).encode() if code else b"")


def _byte_code(code: CodeType) -> str:
    """What a function does, with those inside it, but not where it stands."""

    def plain(constant: Any) -> str:
        if isinstance(constant, CodeType):
            return _byte_code(constant)
        # A set of texts has another order in every process.
        return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)

    return repr((code.co_code, code.co_names, [plain(one) for one in code.co_consts]))
