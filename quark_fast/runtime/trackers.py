"""Where a run's numbers go beside its JSONL files: accelerate's trackers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from quark_fast.errors import UsageError

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio"}  # tracker -> what it needs
OWN_AXES = {"kind", "step"}


def trackers(report_to: str) -> list[str]:
    """The names in a text such as "tensorboard,trackio"; each is known and has its package.

    Raises:
        UsageError: one is not, or has not.
    """
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",") if name.strip()))
    for name in names:
        if name not in PACKAGES:
            raise UsageError(
                f"report_to = {report_to!r}: no tracker {name!r}; choose from {', '.join(PACKAGES)}, several"
                " with commas between"
            )
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UsageError(f"report_to = {name} needs its package: pip install {PACKAGES[name]}")
    return names


def start(accelerator: Accelerator, run: str, config: Mapping[str, Any], step: int) -> None:
    """Begin to track on the main process, or go on after ``step``: what was tracked beyond it is void.

    trackio has no means for that: it keeps the steps since the checkpoint beside those that repeat them.
    """
    if accelerator.log_with:
        resuming = {"purge_step": step + 1} if step else {}
        own = {"tensorboard": resuming, "trackio": {"name": run, "resume": "allow"}}
        project = {name: str(value) if value is None else value for name, value in config.items()}
        accelerator.init_trackers("quark_fast", project, own)


def track(accelerator: Accelerator, row: Mapping[str, Any]) -> None:
    """The numbers of one row of metrics.jsonl, at its step: "loss" of a row of kind "step" is "step/loss"."""
    if accelerator.trackers:
        accelerator.log(dict(_numbers(row)), step=int(row["step"]))


def finish(accelerator: Accelerator) -> None:
    """Write out what trackers hold back; the processes stay together."""
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
                yield f"{row['kind']}/{name}{suffix}", float(one)
