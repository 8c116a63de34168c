"""What is compared: runs, models as they are, and tables of earlier evaluations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quark_fast.config import Config
from quark_fast.data import assets
from quark_fast.data.row import Row, as_rendered, from_file
from quark_fast.errors import UsageError
from quark_fast.evaluation.open_run import run_config
from quark_fast.evaluation.saved_tables import SavedTable, read_table
from quark_fast.files.atomic import sha256
from quark_fast.report.records import scorer_terms
from quark_fast.runtime.run_folder import COMPLETIONS, PROMPTS, RunFolder


@dataclass(frozen=True)
class Run:
    """A finished run."""

    given: str
    folder: Path
    config: Config

    @property
    def base(self) -> str | None:
        """The name of the base model; None: the embedded one."""
        return self.config.model

    @property
    def tokenizer_at(self) -> str:
        return str(self.folder / "model")

    @property
    def _record(self) -> Path:
        """The run's own evaluation, or what is recorded of it where it was not to have one."""
        path = self.folder / "evaluation.json"
        return path if path.exists() else self.folder / "versions.json"

    def scorer(self) -> str:
        """The name of the reward that trained the run."""
        if not (found := self.scorers()):
            raise UsageError(f"{self.unknown_reward}; name one by --reward")
        return found[0]

    def scorers(self) -> list[str]:
        """The name of the reward that trained the run; of a sum also those of its terms. Empty: not known."""
        try:
            found = json.loads(self._record.read_text(encoding="utf-8"))
            return [str(one["name"]) for one in (found["scorer"], *scorer_terms(found))]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @property
    def unknown_reward(self) -> str:
        """What is said where ``scorers`` finds none."""
        return f"{self._record} does not say what the run's scorer was"

    def trained_on(self, rows: Sequence[Row]) -> int:
        """How many of the prompts the run was trained on: its first round sampled each of its own.

        Its chats are compared as it rendered them, which a template does otherwise on another day.
        """
        seen: set[str] = set()
        first = None  # not 0 where the run goes on from another
        path = self.folder / COMPLETIONS
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    first = row["round"] if first is None else first
                    if row["round"] != first:
                        break
                    seen.add(row["prompt"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"{path} does not say what the run was trained on ({reason})") from error
        chats = map(from_file, RunFolder(self.folder).rows_of(PROMPTS))
        return len(seen & {row["prompt"] for row in as_rendered(rows, list(chats))})


def how_trained(runs: Mapping[str, Run], rows: Sequence[Row]) -> dict[str, Any]:
    """What a table says of its runs: how many of its prompts each was trained on, and by which scorers."""
    seen = {label: run.trained_on(rows) for label, run in runs.items()}
    return {
        "trained_on": {label: count for label, count in seen.items() if count},
        "trained_by": {label: names for label, run in runs.items() if (names := run.scorers())},
    }


@dataclass(frozen=True)
class Plain:
    """A model as it is, which is its own base model."""

    given: str

    @property
    def base(self) -> str:
        return self.given

    @property
    def tokenizer_at(self) -> str:
        return self.given


Model = Run | Plain
Subject = Model | SavedTable


Named = str | os.PathLike[str]


def find_subjects(given: Named | Sequence[Named]) -> dict[str, Subject]:
    """What command-line arguments, or paths of a program, name, each under a short name.

    Raises:
        UsageError: there is none, one is there twice, or one cannot be read.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str | os.PathLike)
    every: list[Any] = list(given) if several else [given]  # type: ignore[arg-type]
    if not every:
        raise UsageError("nothing to evaluate: name a run folder or a model")
    found = [find_subject(one) for one in every]
    return dict(zip(labels(found), found, strict=True))


def find_subject(given: Any) -> Subject:
    """What a command-line argument names: FILE.json, a run folder, a transformers folder, or a hub name.

    Raises:
        UsageError: it is a path, and none of these; a table without its samples.
    """
    if not isinstance(given, str | os.PathLike):  # a program may hand over anything
        raise UsageError(
            f"a {type(given).__name__} cannot be evaluated; give a run, its folder, a model's or a hub name"
        )
    given = os.fspath(given)  # of a finished run its folder, not what it shows
    path = Path(given)
    if path.suffix == ".json":
        return read_table(path)
    if (path / "config.yaml").exists():
        return Run(given, path, run_config(path))
    if path.exists() and not (path / "config.json").exists():
        raise UsageError(
            f"{given} is no run folder (no config.yaml), no transformers folder (no config.json) and no table"
            " of an earlier evaluation (.json)"
        )
    return Plain(given)


def source_of(model: str | None) -> str:
    """One text for one model: a hub name, or a folder by its whole path."""
    path = assets.default_model() if model is None else Path(model)
    return str(path.resolve()) if path.exists() else str(model)


def model_name(model: str | None) -> str:
    """What a table calls a model."""
    return assets.DEFAULT_MODEL if model is None or assets.is_default_model(model) else model


def measuring_model(model: str | None, tokens: str) -> dict[str, str]:
    """What a table says of the model that measures its perplexity, on which tokens.

    A folder's name is of one place, so its weights tell it: their hash is of all their files.
    """
    about = {"model": model_name(model), "tokens": tokens}
    if model is None or assets.is_default_model(model):
        return about
    weights = sorted(Path(model).glob("*.safetensors")) or sorted(Path(model).glob("*.bin"))
    hashes = "".join(map(sha256, weights))
    return about | ({"sha256": hashlib.sha256(hashes.encode()).hexdigest()} if weights else {})


def labels(subjects: Sequence[Subject]) -> list[str]:
    """A short name for each: as many of the last parts of its path as tell it from the others.

    Raises:
        UsageError: one is there twice.
    """
    return short_names([subject.given for subject in subjects], [_parts(subject) for subject in subjects])


def short_names(given: Sequence[str], parts: Sequence[Sequence[str]] | None = None) -> list[str]:
    """The same of paths; ``parts``: what their names may be made of, else all parts of each.

    Raises:
        UsageError: one is there twice.
    """
    places = [source_of(one) for one in given]
    for one, place in zip(given, places, strict=True):
        if places.count(place) > 1:
            raise UsageError(f"{one} is named twice; name each once")
    parts = [Path(one).resolve().parts for one in given] if parts is None else parts
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(one[-length:]) for one in parts]
        if len(set(short)) == len(short):
            return short
    return list(given)


def _parts(subject: Subject) -> list[str]:
    path = Path(subject.given)
    if isinstance(subject, Plain) and not path.exists():
        return [subject.given]  # a hub name is known by its whole
    parts = list(path.resolve().parts)
    if isinstance(subject, SavedTable):
        # A run folder is better known than its evaluation.json.
        return parts[:-1] if path.name == "evaluation.json" else [*parts[:-1], path.stem]
    return [*parts[:-2], f"{parts[-2]}/model"] if parts[-1] == "model" else parts


def agree(runs: Sequence[Run], verb: str, what: Callable[[Config], str], fix: str) -> None:
    """Raise UsageError where two runs differ in something that all rows must share."""
    for run in runs[1:]:
        first, other = what(runs[0].config), what(run.config)
        if first != other:
            raise UsageError(f"{runs[0].given} {verb} {first}, but {run.given} {verb} {other}; {fix}")
