"""The run folder: what a run writes, so that it can be read, resumed and never silently overwritten."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quark_fast.config import UsageError
from quark_fast.durable import flush

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
REWARDS = "rewards.sqlite"
HELD_OUT = "held_out.jsonl"  # the prompts of the evaluation, with their columns


class RunFolder:
    """Paths and atomic writes of one run.

    config.yaml, versions.json, held_out.jsonl, metrics.jsonl, completions.jsonl, evaluation.json(l),
    report.html, model/, rewards.sqlite for rewards that are cached and, while the run is not finished,
    checkpoint/.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check_free(self) -> None:
        """Refuse a path with anything in it: no run is overwritten."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(f"{self.path} exists; go on with it by --resume, or choose another --output")

    def check_resumable(self) -> None:
        """Refuse what is not an unfinished run."""
        if not (self / "config.yaml").exists():
            raise UsageError(f"{self.path} is no run folder (no config.yaml): nothing to resume")
        if self.finished:
            raise UsageError(f"the run in {self.path} is finished: nothing to resume")

    def create(self) -> None:
        """Make the folder; one with anything in it is refused."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the run folder {self.path}: {error.strerror}") from error

    @property
    def finished(self) -> bool:
        return (self / "report.html").exists() and not (self / "checkpoint").exists()

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a JSONL file."""
        # What UTF-8 cannot spell, half a character out of somebody's JSON, is written as JSON spells it.
        with (self / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        scratch = self / f".{name}.tmp"
        text = json.dumps(value, indent=2, ensure_ascii=False)
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(scratch, self / name)

    # A checkpoint is a folder made under another name, flushed to disk and renamed: whatever kills the
    # run, the folder named "checkpoint" is complete. While the old one makes room it is "checkpoint.old".

    def save_checkpoint(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace the checkpoint by ``state`` (JSON) and one safetensors file for each of ``tensors``."""
        scratch, current, old = (self / f"checkpoint{suffix}" for suffix in (".tmp", "", ".old"))
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        # How far the JSONL files had come: rows written after this are repeated by a resumed run.
        sizes = {name: _size(self / name) for name in (METRICS, COMPLETIONS)}
        for name, group in tensors.items():
            save_file(dict(group), scratch / f"{name}.safetensors")
        (scratch / "state.json").write_text(json.dumps({**state, "sizes": sizes}))
        for path in [*scratch.iterdir(), scratch]:
            flush(path)
        if current.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(current, old)
        os.rename(scratch, current)
        flush(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
        """(state, tensors) of the last complete checkpoint, JSONL files cut back to it; None: none yet."""
        current, old = self / "checkpoint", self / "checkpoint.old"
        if not current.exists() and old.exists():
            os.rename(old, current)
        if not current.exists():
            for name in (METRICS, COMPLETIONS):
                (self / name).unlink(missing_ok=True)
            return None
        try:
            state = json.loads((current / "state.json").read_text())
            tensors = {path.stem: load_file(path) for path in sorted(current.glob("*.safetensors"))}
            sizes: dict[str, int] = state.pop("sizes")
            # They name what is cut: nothing else in the world may be.
            if sizes.keys() != {METRICS, COMPLETIONS} or not all(
                type(n) is int and n >= 0 for n in sizes.values()
            ):
                raise ValueError(f"sizes of {', '.join(map(str, sizes))}")
        except Exception as error:  # truncated or foreign files fail in many ways; all mean the same
            raise UsageError(f"the checkpoint in {current} is damaged: {error}") from error
        for name, size in sizes.items():
            if _size(self / name) < size:
                raise UsageError(f"{self / name} is shorter than when the checkpoint was written")
            if size:
                os.truncate(self / name, size)
            else:
                (self / name).unlink(missing_ok=True)
        return state, tensors

    def drop_checkpoint(self) -> None:
        """The run is finished: its checkpoint, many times the model's size, goes."""
        shutil.rmtree(self / "checkpoint", ignore_errors=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
