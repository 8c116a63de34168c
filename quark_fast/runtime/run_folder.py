"""The run folder: what a run writes, so that it can be read, resumed and never silently overwritten."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from quark_fast.errors import OutOfResources, UsageError
from quark_fast.files.atomic import TRIAL, disk_error, replacing
from quark_fast.files.locks import try_lock, unlock

METRICS = "metrics.jsonl"
LOG = "run.log"  # what the run showed, with times
COMPLETIONS = "completions.jsonl"
REWARDS = "rewards.sqlite"
ROLLOUT = "rollout"  # weights for vLLM, while there are rounds to sample
PENDING = "pending"  # batches of the stage under way
ROUNDS = "rounds"  # weights of rounds that may yet be the best, with --keep-best
STATE = "state"  # of a finished run: what another goes on from
FINISHED = "finished.json"  # there once everything else is
HELD_OUT = "held_out.jsonl"  # the prompts of the evaluation, with their columns
PROMPTS = "prompts.jsonl"  # prompts that were rendered from messages, as they were
LOCK = ".lock"  # held by the process that runs the run


class RunFolder:
    """Paths and atomic writes of one run.

    config.yaml, versions.json, held_out.jsonl, for chats prompts.jsonl, metrics.jsonl, completions.jsonl,
    evaluation.json(l), report.html, model/, state/ for a run that goes on from this one, run.log,
    finished.json, rewards.sqlite for rewards that are cached and, while the run is not finished, checkpoint/,
    the one before it in checkpoint.old/, pending/ with the batches of the stage under way, rounds/ with
    weights of rounds that may be kept, rollout/ with weights for vLLM, and .lock.

    Attributes:
        path: as it was given, for messages.
        at: where that is, also when the program goes to another folder later.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.at = self.path.absolute()
        self._locked = False

    @property
    def nearest(self) -> Path:
        """The run's folder, where it exists, else the nearest one above that does."""
        return next(path for path in (self.at, *self.at.parents) if path.is_dir())

    def __truediv__(self, name: str) -> Path:
        return self.at / name

    @property
    def typed(self) -> str:
        """The path as a shell takes it."""
        return shlex.quote(str(self.path))

    @property
    def resumed_by(self) -> str:
        """The flags that go on with the run."""
        return f"--resume --output {self.typed}"

    @property
    def how_to_go_on(self) -> str:
        """What to do once an error is mended."""
        if (self / "config.yaml").exists():
            return f"go on with {self.resumed_by}; what was done is kept"
        return "start the run again"

    def check_free(self) -> None:
        """Refuse a path with anything in it: no run is overwritten. What there is decides what to type."""
        path = self.path
        if not path.exists() or (path.is_dir() and not any(map(_lasting, path.iterdir()))):
            return
        anew = "to train anew choose another --output"
        if path.is_dir() and self.finished:
            raise UsageError(
                f"{path} exists: a finished run. Its report is {path / 'report.html'}, its texts come by"
                f' `python -m quark_fast.generate {self.typed} "The man said"`; {anew}'
            )
        if (self / "config.yaml").exists():
            raise UsageError(f"{path} exists: a run that is not finished. Go on by {self.resumed_by}; {anew}")
        raise UsageError(f"{path} exists and is no run: choose another --output")

    def check_writable(self) -> None:
        """Refuse a place that takes no folder, before the long work whose results it is to hold."""
        try:
            with tempfile.TemporaryDirectory(prefix=TRIAL, dir=self.nearest):
                pass
        except OSError as error:
            raise _unusable(error)(
                f"cannot write to {self.nearest}: {error.strerror}; choose another --output"
            ) from error

    def check_resumable(self) -> None:
        """Refuse what is not an unfinished run; one is this process's alone from here on."""
        if not (self / "config.yaml").exists():
            raise UsageError(f"{self.path} is no run folder (no config.yaml): nothing to resume")
        if not self.finished or (self / LOCK).exists():
            self._lock()
        if self.finished:
            self.drop_checkpoint()  # of a process that ended while it did
            raise UsageError(
                f"the run in {self.path} is finished: nothing to resume; its report is"
                f" {self.path}/report.html, and `python -m quark_fast.report {self.typed}` writes that again"
            )
        for left in (".*.tmp", f"{TRIAL}*"):  # of a process that ended while it wrote
            for path in self.at.glob(left):
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def check_results(self) -> None:
        """Refuse to begin anew over what only a run that had a checkpoint has."""
        if not self.has_checkpoint and (lost := self._results()):
            raise UsageError(
                f"{self.path} has results ({', '.join(lost)}) but no checkpoint to go on from, and is left as"
                " it is; choose another --output"
            )

    def create(self) -> None:
        """Make the folder, from here on this process's alone; one with anything in it is refused."""
        self.check_free()
        try:
            self.at.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot make the run folder {self.path}: {error.strerror}; choose another --output"
            raise _unusable(error)(what) from error
        self._lock()
        self.check_free()

    def _lock(self) -> None:
        with self.disk_errors():
            held = try_lock(self / LOCK)
        if not held:
            holder = (self / LOCK).read_text(encoding="utf-8").strip() or "another process"
            raise UsageError(f"{holder} is at work in {self.path}; wait for it, or choose another --output")
        self._locked = True

    @contextmanager
    def free_after_errors(self) -> Iterator[None]:
        """Give the folder back where an error ends the work: the process may live on, like a notebook's."""
        try:
            yield
        except BaseException:
            if self._locked:  # else it may be another run's of this process
                unlock(self / LOCK)
            raise

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Have a full disk, or a folder that may not be written to, end the run with a one-line error."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if (what := disk_error(error)) is None:
                raise
            name = getattr(error, "filename", None)
            foreign = isinstance(name, str) and not Path(name).resolve().is_relative_to(self.at.resolve())
            where = name if foreign else f"to the run folder {self.path}"
            how = f"fix that, then {self.how_to_go_on}"
            raise OutOfResources(f"cannot write {where}: {what}; {how}") from error

    @property
    def finished(self) -> bool:
        return (self / FINISHED).exists()

    def _results(self) -> list[str]:
        """What only a run that had a checkpoint has."""
        names = ("model", "evaluation.json", "evaluation.jsonl", "report.html")
        found = [name for name in names if (self / name).exists()]
        metrics = self / METRICS
        rows = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
        return [*found, *([METRICS] if '"kind": "step"' in rows else [])]

    def add_start(self, record: Mapping[str, Any]) -> None:
        """``versions.json``: what the run was begun with and, under ``starts``, every start with its time."""
        record = {**record, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        known = self._record() or {**record, "starts": []}
        self.write_json("versions.json", {**known, "starts": [*known["starts"], record]})

    @property
    def mark(self) -> str:
        """12 letters and digits, the same at every start of the run: a hash of the first one's record."""
        first = self._record()["starts"][0]
        return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()[:12]

    def _record(self) -> dict[str, Any]:
        path = self / "versions.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add_end(self, record: Mapping[str, Any]) -> None:
        """Into ``versions.json``: how long the run took, the most memory of any start, and so on."""
        self.write_json("versions.json", self._record() | dict(record))

    def finish(self) -> None:
        """Everything is written: from here on this is a finished run."""
        self.write_json(FINISHED, {"finished": datetime.now(UTC).isoformat(timespec="seconds")})
        self.drop_checkpoint()

    @property
    def has_checkpoint(self) -> bool:
        """Whether ``checkpoint_files.load_checkpoint`` finds one, damaged or not."""
        return any((self / name).exists() for name in ("checkpoint", "checkpoint.old"))

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a JSONL file."""
        # What UTF-8 cannot spell, half a character of a user's JSON, is written as JSON spells it.
        with (self / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(_line(row) for row in rows)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSONL file whole or not at all."""
        self._write(name, "".join(_line(row) for row in rows))

    def rows_of(self, *names: str) -> list[dict[str, Any]]:
        """The rows of those of the JSONL files that are there."""
        texts = [(self / name).read_text(encoding="utf-8") for name in names if (self / name).exists()]
        try:
            return [json.loads(line) for text in texts for line in text.split("\n") if line]
        except ValueError as error:
            raise UsageError(f"{' or '.join(names)} in {self.path} is damaged: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        self._write(name, json.dumps(value, indent=2, ensure_ascii=False))

    def remove(self, *names: str) -> None:
        """Files that may be there."""
        for name in names:
            (self / name).unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        with replacing(self / name) as scratch:
            scratch.write_text(text, encoding="utf-8", errors="backslashreplace")

    def drop_checkpoint(self) -> None:
        """The run is finished: its checkpoints, many times the model's size, go, and its lock."""
        current, scratch = self / "checkpoint", self / "checkpoint.tmp"
        # One of them at least stays whole until the last moment, which makes the run a finished one.
        for suffix in (".old", ".damaged", ".tmp"):
            shutil.rmtree(self / f"checkpoint{suffix}", ignore_errors=True)
        if current.exists():
            os.rename(current, scratch)
            shutil.rmtree(scratch)
        for name in (PENDING, ROUNDS):
            shutil.rmtree(self / name, ignore_errors=True)
        unlock(self / LOCK)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), ensure_ascii=False, default=str, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON does not have; arrays as lists."""
    if hasattr(value, "tolist"):  # numpy's and torch's, single numbers, too
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _lasting(path: Path) -> bool:
    """Whether a file is more than what a process that was killed in its first moments leaves."""
    return path.name != LOCK and not path.name.startswith(TRIAL) and not path.match(".*config.yaml.*.tmp")


def _unusable(error: OSError) -> type[UsageError]:
    """Whose fault it is that nothing can be written: the disk's, or the name's, such as one below a file."""
    return OutOfResources if disk_error(error) else UsageError
