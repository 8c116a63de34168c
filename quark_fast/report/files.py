"""The files of a run folder, read as far as they can be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quark_fast.files.safe_read import too_deep
from quark_fast.report.columns import COLUMNS, counted
from quark_fast.report.records import Record, number_of
from quark_fast.runtime.run_folder import HELD_OUT

# In a run's record, of one that was told not to evaluate.
NOT_EVALUATED = "left out (--no-eval)"


@dataclass(frozen=True)
class RunFiles:
    """The files of a run folder as far as they can be read; `missing` names the rest."""

    name: str
    versions: Record
    evaluation: Record
    evaluation_rows: list[Record]
    config: str = ""
    steps: list[Record] = field(default_factory=list)
    rounds: list[Record] = field(default_factory=list)
    probes: list[Record] = field(default_factory=list)
    compared: list[Record] = field(default_factory=list)
    completions: list[Record] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    chats: bool = False  # as of ``of_chats``

    @property
    def left_out(self) -> bool:
        """Whether it was not to be evaluated, which is no lack."""
        return not self.evaluation and self.versions.get("evaluation") == NOT_EVALUATED

    @property
    def kept(self) -> Record:
        """Which round's weights the model has, and why; empty where rounds were not compared.

        Of a run that was not to be evaluated its own record says so.
        """
        found = self.evaluation.get("kept_round") or self.versions.get("kept_round")
        return found if isinstance(found, dict) else {}

    @property
    def probe_of_model(self) -> Record:
        """The probe after the round whose weights the model has, the last one or ``kept``; or empty."""
        probes = {number_of(row, "step"): row for row in self.probes}
        if not self.kept:
            return probes[max(probes)] if probes else {}
        steps = {number_of(row, "round"): number_of(row, "step") for row in self.compared}
        return probes.get(steps.get(number_of(self.kept, "round"), math.nan), {})

    @property
    def begun(self) -> Record | None:
        """The first round's row of a run that goes on from another one's rounds and steps."""
        first = next(iter(self.rounds), None)
        return first if first is not None and number_of(first, "round") > 0 else None


def read_run(run_dir: Path) -> RunFiles:
    """Reads config.yaml, versions.json, metrics.jsonl, completions.jsonl, evaluation.json(l).

    A step or round that stands twice (a resumed run repeats what came after its checkpoint) counts
    as last written.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder: give the folder of a run")
    missing: list[str] = []
    config = _read_text(run_dir / "config.yaml", "the settings", missing)
    versions = _read_object(run_dir / "versions.json", "the versions", missing)
    metrics = _read_lines(run_dir / "metrics.jsonl", "the curves", missing)
    completions = _read_lines(run_dir / "completions.jsonl", "the sampled texts", missing)
    # A run that was not to be evaluated lacks nothing.
    no_lack: list[str] = []
    lacks = no_lack if versions.get("evaluation") == NOT_EVALUATED else missing
    evaluation = _well_formed(_read_object(run_dir / "evaluation.json", "the results", lacks), missing)
    rows = _read_lines(run_dir / "evaluation.jsonl", "the before and after texts", lacks)
    rows = [row for row in rows if isinstance(row.get("prompt_id", 0), int)]

    def last_of(kind: str, key: str) -> list[Record]:
        found = {number_of(row, key): row for row in metrics if row.get("kind") == kind}
        return [found[at] for at in sorted(found) if math.isfinite(at)]

    return RunFiles(
        name=run_dir.resolve().name,
        config=config,
        versions=versions,
        steps=last_of("step", "step"),
        rounds=last_of("round", "round"),
        probes=last_of("probe", "step"),
        compared=last_of("development", "round"),
        completions=completions,
        evaluation=evaluation,
        evaluation_rows=rows,
        missing=missing,
        chats=of_chats(run_dir),
    )


def of_chats(run_dir: Path) -> bool:
    """Whether all prompts that a run is measured on are chats, which its files mark as rendered."""
    rows = _read_lines(run_dir / HELD_OUT, "the prompts", [])
    return bool(rows) and all(row.get("rendered") is True for row in rows)


def _read_text(path: Path, what: str, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing.append(f"{path.name} is not there, so {what} are not shown")
    except OSError as error:
        missing.append(f"{path.name} cannot be read ({error.strerror}), so {what} are not shown")
    return ""


def _read_object(path: Path, what: str, missing: list[str]) -> Record:
    text = _read_text(path, what, missing)
    if not text:
        return {}
    try:
        value = _parsed(text)
    except ValueError as error:
        missing.append(f"{path.name} is not JSON ({error}), so {what} are not shown")
        return {}
    if not isinstance(value, dict):
        missing.append(f"{path.name} holds no JSON object, so {what} are not shown")
        return {}
    return value


def _read_lines(path: Path, what: str, missing: list[str]) -> list[Record]:
    rows: list[Record] = []
    broken: list[int] = []
    for number, line in enumerate(_read_text(path, what, missing).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        missing.append(
            f"{path.name} has {counted(len(broken), 'unreadable line')}, first line {broken[0]} "
            "(a killed run can leave its last line cut off)"
        )
    return rows


def _parsed(text: str) -> Any:
    """The JSON value; ValueError if it is none, or nested so deep that nothing could be done with it."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if too_deep(value):
        raise ValueError("nested too deep")
    return value


# What an evaluation holds under these names; a file may hold anything.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("rows", "columns", "more_columns"), list),
    **dict.fromkeys(("headline", "property", "target", "task"), str),
    **dict.fromkeys(("scorer", "sampling", "perplexity", "trained_on", "trained_by", "kept_round"), dict),
    **dict.fromkeys(("prompts", "samples_per_prompt", "text_prompt_tokens"), int),
}


def _well_formed(evaluation: Record, missing: list[str]) -> Record:
    """The evaluation without what is not of its kind, so that nothing after here has to ask."""
    found: dict[str, Any]
    found = {k: v for k, v in evaluation.items() if v is None or isinstance(v, _KINDS.get(k, object))}
    odd = evaluation.keys() - found.keys()
    if found.get("headline") not in {None, *(column.key for column in COLUMNS)}:
        odd.add("headline")
    found = {k: v for k, v in found.items() if k not in {*odd, "out_of_domain"} and v is not None}
    for name in ("columns", "more_columns"):
        if name in found:
            found[name] = [key for key in found[name] if isinstance(key, str)]
    if "rows" in found:
        found["rows"] = [
            {**row, "metrics": _objects_of(row.get("metrics")), "change": _objects_of(row.get("change"))}
            for row in found["rows"]
            if isinstance(row, dict)
        ]
    if odd:
        missing.append(f"evaluation.json holds no sound {', '.join(sorted(odd))}, so these are not shown")
    return found


def _objects_of(value: Any) -> dict[str, Record]:
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}
