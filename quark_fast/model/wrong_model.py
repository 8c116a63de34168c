"""What is wrong with a model, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from quark_fast.errors import UsageError
from quark_fast.files.atomic import disk_error
from quark_fast.model.loading import first_line
from quark_fast.runtime.memory import OutOfMemory


class WrongModel(UsageError):
    """A model that cannot be read, trained or exported right; ``what`` is the reason."""

    def __init__(self, who: str, what: str, fix: str) -> None:
        super().__init__(f"{who} {what}; {fix}")
        self.what = what


def message_of(error: Exception) -> str:
    kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
    return kind + first_line(error)


@contextlib.contextmanager
def blamed(model: Any, what: str, export: str | None = None) -> Iterator[None]:
    """Whatever fails here, but for memory or disk, is the model's fault: foreign code fails in any way."""
    try:
        yield
    except (torch.OutOfMemoryError, OutOfMemory):
        raise
    except Exception as error:
        if disk_error(error):
            raise
        # Our loader's message names the scratch folder; transformers' own, its cause, does not.
        loader = isinstance(error, UsageError) and isinstance(error.__cause__, Exception)
        said = message_of(error.__cause__ if loader else error)  # type: ignore[arg-type]
        if export is not None:
            said = said.replace(repr(export), "the export")
        raise wrong(model, f"{what}: {said}") from error


def coarsest_dtype(model: Any) -> torch.dtype:
    """That of its parameters which rounds most: beside adapters and reward tokens the others may be lower."""
    dtypes: set[torch.dtype] = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def wrong(model: Any, what: str) -> WrongModel:
    low = coarsest_dtype(model) != torch.float32
    fix = "give --precision fp32, or another --model" if low else "give another --model"
    dtype = str(coarsest_dtype(model)).removeprefix("torch.")
    return WrongModel(f"{type(model).__name__} ({model.config.model_type}, {dtype})", what, fix)
