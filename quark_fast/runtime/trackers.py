"""Where a run's numbers go beside its JSONL files: accelerate's trackers."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from quark_fast.errors import UsageError

OWN_AXES = {"kind", "step"}
# What mlflow refuses in a name, as of "guided w=1.5".
_REFUSED = re.compile(r"[^\w/.\- :]")


def trackers(report_to: str) -> list[str]:
    """The names in a text such as "tensorboard,wandb", or of all that are installed; each has its package.

    A tracker's name is that of its package.

    Raises:
        UsageError: one is not known, or not installed; "all", and none is.
    """
    known, installed = list(LOGGER_TYPE_TO_CLASS), [str(one) for one in get_available_trackers()]
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip()))
    if names == ["none"]:
        return []
    if names == ["all"]:
        if not installed:
            raise UsageError(
                "report_to = all, but no tracker is installed: pip install tensorboard, or another"
            )
        return installed
    for name in names:
        if name not in known:
            raise UsageError(
                f"report_to = {report_to!r}: no tracker {name!r}; give none, all, or with commas between"
                f" some of {', '.join(known)}"
            )
        if name not in installed:
            raise UsageError(f"report_to = {name} needs its package: pip install {name}")
    return names


def start(accelerator: Accelerator, folder: Path, config: Mapping[str, Any], step: int, mark: str) -> None:
    """Begin to track on the main process, or go on after ``step``: what was tracked beyond it is void.

    trackio has no means for that: it keeps the steps since the checkpoint beside those that repeat them.
    wandb keeps the first of two, which are the same numbers.

    Args:
        folder: the run's, whose path is the run's name.
        mark: the same for every start of the run, and no other run's.
    """
    if accelerator.log_with:
        name = {"name": str(folder), "resume": "allow"}
        void = {"purge_step": step + 1}
        own = {"tensorboard": void, "trackio": name, "wandb": name | {"id": mark, "dir": str(folder)}}
        project = {name: str(value) if value is None else value for name, value in config.items()}
        accelerator.init_trackers("quark_fast", project, own)


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """The numbers of one row of metrics.jsonl, at its step: "loss" of a row of kind "step" is "step/loss".

    Of what not every tracker takes in a name stands a space: "evaluation/guided w 1.5/mean".
    """
    if accelerator.trackers:
        accelerator.log(dict(_numbers(row)), step=int(row["step"]))


@contextlib.contextmanager
def ended(accelerator: Accelerator) -> Iterator[None]:
    """In the end trackers write out what they hold back; what they are asked for later is another run's."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name in OWN_AXES:
            continue
        several: Iterable[tuple[Any, Any]] = [(None, value)]
        if isinstance(value, list | dict):
            several = value.items() if isinstance(value, dict) else enumerate(value)
        for index, one in several:
            if isinstance(one, int | float) and math.isfinite(one):
                suffix = "" if index is None else f"/{index}"
                yield _REFUSED.sub(" ", f"{row['kind']}/{name}{suffix}"), float(one)
