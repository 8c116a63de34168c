"""What identifies a reward function: its name, the sha256 of its source, and what it holds.

Name and source identify a reward: a resumed run compares them. What it holds tells apart the answers that the
cache keeps of two rewards of one source.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import re
import sys
import types
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from types import CellType, CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quark_fast.errors import UsageError

_ADDRESS = re.compile(" at 0x[0-9a-fA-F]+")
NO_SOURCE = hashlib.sha256(b"").hexdigest()
DEPTH = 8  # of values within values, below which their types alone count
MOST_NUMBERS = 100_000  # of a tensor; of a larger one every so-manieth counts


def source_sha256(function: Callable[..., Any], module: types.ModuleType | None = None) -> str:
    """Of the source of a function, of the one inside partials and wrappers, or of an object's class.

    That is the file where it stands; of the program that runs, which is edited to resume, and of a notebook,
    the function itself with what it names there.

    Args:
        module: where the function was found. If it stands elsewhere, this file counts, too: it may hold the
            arguments, as in ``score = Scorer(threshold=3)``.
    """
    own = _defined(function)
    source = _source(own)
    if source and module is not None and own.__module__ != module.__name__:
        file = Path(getattr(module, "__file__", None) or "")
        source += file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(source).hexdigest()


def name_of(function: Any) -> str:
    """``module:name`` of a function, of an object's class, or of what a partial calls with its arguments.

    The same in every process. Of the arguments it has a hash: one may be a key, or a list of 5,000 words.
    """
    if isinstance(function, functools.partial):
        given = ["..."] * len(function.args) + [f"{name}=..." for name in sorted(function.keywords)]
        held = _sha256(_text([function.args, function.keywords], DEPTH, inside=False))
        return f"{name_of(function.func)}({', '.join([*given, held[:8]])})"
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}:{own.__qualname__}"


def held_by(function: Any) -> str:
    """sha256 of a function's code, defaults, arguments and closure, or of what an object holds, as it is now.

    Likewise the same in every process, as far as the values' own texts are. Of an object that has no text of
    its own, such as a client, its attributes count.
    """
    try:
        own = [] if inspect.isroutine(function) else [_attributes(function, DEPTH)]
        return _sha256(repr([_text(function, DEPTH), *own]))
    except Exception as error:  # of anyone's __repr__
        raise UsageError(
            f"reward {name_of(function)} holds a value that has no text ({type(error).__name__}: {error}), so"
            " its answers cannot be told apart; mend its __repr__, or give reward_cache off"
        ) from error


def source_file(function: Callable[..., Any]) -> str:
    """The file where the function's code stands, or the name of a notebook's cell; "" for a builtin."""
    code = _code(_defined(function))
    return code.co_filename if code else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


# --- the source ---------------------------------------------------------------------------------


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
    """The file that defines it; of the program that runs its own part; at a prompt its byte code."""
    try:
        file = inspect.getsourcefile(own) or ""
    except (TypeError, OSError):  # a builtin; a class that was typed at a prompt
        file = ""
    if own.__module__ == "__main__" and (parts := _parts(own)):
        return "\n".join(parts[name] for name in sorted(parts)).encode()
    if Path(file).is_file():
        return Path(file).read_bytes()
    lines = "".join(linecache.getlines(file)).encode()
    code = _code(own)
    return lines or (_byte_code(code).encode() if code else b"")


def _parts(own: Any) -> dict[str, str]:
    """The source of a function or class of the program that runs, and what it names there, by name.

    Empty where it has no source.
    """
    found: dict[str, str] = {}
    program, assignments = vars(sys.modules["__main__"]), functools.cache(_assignments)
    left = [(own, "")]  # with what the program assigns to its name
    while left:
        wrapped, said = left.pop()
        one = inspect.unwrap(wrapped)
        name = f"{one.__module__}:{one.__qualname__}"
        if name in found:
            continue
        try:
            found[name], file = inspect.getsource(one), inspect.getsourcefile(one)
        except (TypeError, OSError):  # a namedtuple; a class of a notebook, whose methods have sources
            found[name] = said
            inside = [*getattr(one, "__mro__", ()), *getattr(one, "__dict__", {}).values()]
            left += [(part, "") for part in inside if _is_defined_there(part)]
            continue
        assigned = assignments(file or "")
        for named in sorted(set(_names(one)) & program.keys()):
            value = program[named]
            if _is_defined_there(value):
                left.append((value, assigned.get(named, "")))
            elif not isinstance(value, types.ModuleType):
                # Not the value, which may be a list that the reward itself adds to.
                found[named] = assigned.get(named, "")
                if type(value).__module__ == "__main__":
                    left.append((type(value), assigned.get(type(value).__name__, "")))
    return found if any(found.values()) else {}


def _is_defined_there(value: Any) -> bool:
    """Whether it is a function or a class of the program that runs."""
    return getattr(value, "__module__", None) == "__main__" and hasattr(value, "__qualname__")


def _assignments(file: str) -> dict[str, str]:
    """What a program's file, or a notebook's cell, assigns to names outside of functions and classes."""
    found: dict[str, str] = {}
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # a cell with a command of the notebook's own
        return {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
            for name in names:
                found[name] = f"{found.get(name, '')}{ast.unparse(statement)};"
    return found


def _names(own: Any) -> Iterator[str]:
    """What the code of a function, or of a class's methods, names outside of itself; a class's bases."""
    if isinstance(own, type):
        yield from (base.__name__ for base in own.__mro__[1:])
        for value in vars(own).values():
            if inspect.isfunction(value):
                yield from _names(value)
        return
    left = [own.__code__]
    while left:
        code = left.pop()
        yield from code.co_names
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _byte_code(code: CodeType) -> str:
    """What a function does, with those inside it, but not where it stands."""

    def plain(constant: Any) -> str:
        if isinstance(constant, CodeType):
            return _byte_code(constant)
        # A set of texts has another order in every process.
        return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)

    return repr((code.co_code, code.co_names, [plain(one) for one in code.co_consts]))


# --- what it holds ------------------------------------------------------------------------------


def _text(value: Any, depth: int, inside: bool = True) -> str:
    """What tells a value from others, the same in every process: without addresses and the order of sets.

    ``inside``: also the numbers of arrays and models, and the attributes of objects without a text of their
    own. These may be others at the next start, such as a client's: they tell answers apart, but no rewards.
    """
    if depth == 0:
        return type(value).__qualname__
    inner = functools.partial(_text, depth=depth - 1, inside=inside)
    if isinstance(value, functools.partial):
        return f"partial{[inner(part) for part in (value.func, value.args, value.keywords)]}"
    if inspect.ismethod(value):
        own = value.__self__
        held = _attributes(own, depth - 1) if inside else ""
        return f"method{[inner(value.__func__), inner(own), held]}"
    if inspect.isfunction(value):
        return _of_function(value, inner)
    # A class of the user's that is one of these says itself what it is.
    if type(value) is dict:
        return f"dict{sorted(f'{inner(k)}: {inner(v)}' for k, v in value.items())}"
    if type(value) in (list, tuple, set, frozenset):
        parts = [inner(one) for one in value]
        return f"{type(value).__qualname__}{sorted(parts) if isinstance(value, Set) else parts}"
    if inside and isinstance(value, Tensor):
        return _of_numbers(value)
    if inside and isinstance(value, np.ndarray) and value.dtype != object:
        return _of_numbers(torch.from_numpy(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))
    if inside and isinstance(value, torch.nn.Module):
        return f"{type(value).__qualname__}{[(name, inner(one)) for name, one in value.state_dict().items()]}"
    said = repr(value)
    plain = _ADDRESS.sub("", said)
    # Of an object that says where it lies, and not what it is: its attributes, and the types of theirs.
    return f"{plain}{_attributes(value, min(depth - 1, 3))}" if inside and plain != said else plain


def _of_function(function: Any, inner: Callable[[Any], str]) -> str:
    """Its code, its defaults and what its closure holds; of what it wraps, likewise."""
    inside = inspect.unwrap(function)
    cells = inside.__closure__ or ()
    held = [cell.cell_contents for cell in cells if cell != CellType()]  # none in one that is empty yet
    values = [held, inside.__defaults__, inside.__kwdefaults__]
    return f"{inside.__qualname__}{_byte_code(inside.__code__)}{[inner(one) for one in values]}"


def _attributes(own: Any, depth: int) -> str:
    """The attributes of an object, also those in slots, but not those of a module or a class."""
    if isinstance(own, types.ModuleType | type) or depth <= 0:
        return ""
    held: dict[str, Any] = dict(getattr(own, "__dict__", {}))
    for base in type(own).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(own, name) and not name.startswith("__"):
                held[name] = getattr(own, name)
    return _text(held, depth)


def _of_numbers(tensor: Tensor) -> str:
    """The shape, dtype and numbers of a tensor, of a large one some thousand numbers."""
    flat = tensor.detach().reshape(-1)
    some = flat[:: 1 + len(flat) // MOST_NUMBERS].cpu().contiguous()
    numbers = some.view(torch.uint8).numpy().tobytes() if some.numel() else b""
    return f"{tuple(tensor.shape)}{tensor.dtype}{hashlib.sha256(numbers).hexdigest()}"
