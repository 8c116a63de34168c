"""A finished run, opened for use: the exported policy, the base model, the settings."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quark_fast.arguments import load_config
from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.row import Row, from_file
from quark_fast.errors import UsageError
from quark_fast.model.check_reading import check_reading
from quark_fast.model.copies import frozen_copy
from quark_fast.model.loading import load_reference
from quark_fast.model.policy import Policy
from quark_fast.runtime.machine import sampling_dtype
from quark_fast.runtime.run_folder import HELD_OUT, RunFolder


@dataclass(frozen=True)
class OpenRun:
    """What ``generate`` and ``evaluate`` need of a run."""

    config: Config
    policy: Policy
    device: torch.device

    @functools.cached_property
    def reference(self) -> Any:
        """The base model, loaded when it is first asked for."""
        dtype = sampling_dtype(self.config.precision, self.device)
        source = self.config.model or assets.default_model()
        return load_reference(source, dtype, self.device, self.config.trust_remote_code)

    @property
    def guidance(self) -> float:
        """The run's own w: the first that it was evaluated with; 1 where one token alone is trained."""
        return (self.config.guidances() or [1.0])[0]


def run_config(folder: Path) -> Config:
    """The settings of a finished run.

    Raises:
        UsageError: no run folder, or one whose run is not finished.
    """
    if not (folder / "config.yaml").exists():
        raise UsageError(f"{folder} is no run folder (no config.yaml); give the --output of a run")
    if not (folder / "model" / "config.json").exists():
        raise UsageError(f"{folder} holds no model: its run is not finished; go on with --resume")
    config = load_config(folder / "config.yaml")
    config.model = _base_from_here(folder, config)
    return config


def held_out_rows(folder: Path) -> list[Row]:
    """The prompts of a run's own evaluation, all of them: a program may have given one twice."""
    rows = [from_file(row) for row in RunFolder(folder).rows_of(HELD_OUT)]
    if not rows:
        raise UsageError(f"{folder / HELD_OUT} holds no prompts; give some by --prompts")
    return rows


def _base_from_here(folder: Path, config: Config) -> str | None:
    """The base model; one that lies beside the run is found from other folders than the run began in."""
    base, output = config.model, config.output_folder
    if base is None or Path(base).is_absolute() or Path(base).exists() or output.is_absolute():
        return base
    parts = folder.resolve().parts
    began_in, under = parts[: -len(output.parts)], parts[-len(output.parts) :]
    beside = Path(*began_in, base)
    return os.path.relpath(beside) if under == output.parts and beside.exists() else base


def open_run(folder: Path, trust_remote_code: bool = False) -> OpenRun:
    """Load ``folder/model``; what the run started from is loaded when it is asked for.

    Args:
        trust_remote_code: run what Python code these bring along. The folder's own setting does not count:
            it may be anyone's.
    Raises:
        UsageError: no run folder, or one whose run is not finished.
    """
    config = run_config(folder)
    config.trust_remote_code = trust_remote_code
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = sampling_dtype(config.precision, device)
    policy = Policy.from_export(folder / "model", dtype, trust_remote_code)
    policy.model = frozen_copy(policy, dtype).to(device)
    check_reading(policy, policy.model, [policy.quantiles - 1, 0, None])
    return OpenRun(config, policy, device)
