"""Ablations: a grid of runs around a base, each axis varied alone, and what came out of them."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quark_fast.ablation.axes import binding, distinct_settings, name_of, points_of, run_path
from quark_fast.ablation.plot import plot
from quark_fast.ablation.summary import summarise
from quark_fast.ablation.table import markdown
from quark_fast.arguments import settings_in
from quark_fast.config import Config
from quark_fast.errors import Interrupted, OutOfResources, UsageError, other_weights
from quark_fast.files.atomic import replacing
from quark_fast.rollout.shared_samples import SharedSamples
from quark_fast.runtime.distributed import Processes
from quark_fast.runtime.machine import settled_precision
from quark_fast.runtime.run_folder import RunFolder
from quark_fast.training.trainer import Trainer


def run_grid(
    base: Config,
    axes: Sequence[str],
    seeds: Sequence[int],
    *,
    note: Callable[[str], None] = lambda _: None,
    **given: Any,
) -> Path:
    """Run what is not finished of the grid in ``base.output``, and write its table and plot.

    A point is a run folder ``seed-N/SETTINGS`` of its own. All take the base model's samples of a seed
    from one folder, which changes no number (``shared_samples.SharedSamples``). Calling this again goes on
    where the last call ended, also within a point, and may have other axes or seeds; the table has those of
    the last call. It may have another ``keep_best``, too, as long as no point is finished with the old one.

    Args:
        note: called with a line before every run, of several processes on the first.
        given: to the ``Trainer``.
    Raises:
        UsageError: before any long work, as the trainer's; or the folder is of a grid with other settings
            or another base model, or holds a finished point that was resumed with others; after all other
            runs, if one ended without a result.
        Interrupted: Ctrl-C or SIGTERM; calling again goes on.
    """
    if not seeds or not axes:
        raise UsageError("a grid needs at least one axis and one seed")
    points = points_of(base, axes)
    folder = base.output_folder
    processes = Processes.join()
    base = processes.on_rank_0(partial(_begin, folder, base))
    say = note if processes.main else lambda _: None
    sampler = SharedSamples(folder / "base-model")
    wanted = [(seed, settings) for seed in seeds for settings in distinct_settings(points)]
    processes.on_rank_0(partial(_check_finished, folder, base, wanted, given.keys()))
    failed: list[str] = []
    for number, (seed, settings) in enumerate(wanted, start=1):
        path = run_path(folder, seed, settings)
        line = f"run {number}/{len(wanted)}: seed {seed}, {name_of(settings)}"
        # Of several processes the first one looks: the others might see what it has written since.
        finished, resume = processes.on_rank_0(partial(_seen, path))
        if finished:
            say(f"{line}: finished")
            continue
        say(line)
        config = dataclasses.replace(base, **settings, seed=seed, output=str(path), resume=resume)
        try:
            trainer = _trainer(folder, config, processes, sampler=sampler, **given)
            why = _run_point(trainer, processes)
        except Interrupted as stop:
            raise Interrupted(f"stopped in {line}; the same command goes on") from stop
        if why:
            failed.append(f"{path}: {why}")
            say(f"{line}: no result: {why}")
        gc.collect()  # two models and an optimizer that refer to each other
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(wanted)} runs ended without a result, so there is no table; the others"
            f" are kept. {_advice(folder, base)}. {'; '.join(failed)}"
        )
    processes.on_rank_0(lambda: _write(folder, summarise(folder, base, points, seeds)))
    return folder


def _advice(folder: Path, base: Config) -> str:
    """What to do about runs without a result."""
    anew = "choose a base, or axes, without such runs, and another --output"
    if base.goal() and not _finished_points(folder):
        return (
            "Where no round meets --keep-best, give this whole grid another one, with which it goes on;"
            f" else {anew}"
        )
    return anew.capitalize()


def _finished_points(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.glob("seed-*/*/finished.json"))]


def _check_finished(
    folder: Path, base: Config, wanted: Sequence[tuple[int, dict[str, Any]]], of_program: Iterable[str]
) -> None:
    """Refuse a finished point of other settings, as one has that was resumed by itself.

    Args:
        of_program: what the settings do not say, since a program gave it.
    """
    for seed, settings in wanted:
        path = run_path(folder, seed, settings)
        if not RunFolder(path).finished:
            continue
        config = dataclasses.replace(base, **settings, seed=seed)
        mine, its = {**binding(config), "seed": seed}, settings_in(path / "config.yaml")
        for name in sorted(mine.keys() & its.keys() - {*of_program}):
            if mine[name] != its[name]:
                raise UsageError(
                    f"{path} is finished with {name} = {its[name]!r}, but in this grid it has {mine[name]!r};"
                    " give the grid that, remove that folder, or choose another --output"
                )


def _trainer(folder: Path, config: Config, processes: Processes, **given: Any) -> Trainer:
    """A point's trainer, of the base model that all points of the grid in ``folder`` have."""
    trainer = Trainer(config, **given)
    with trainer.folder.free_after_errors():
        processes.on_rank_0(partial(_check_base, folder, config.model, trainer.setup.base))
    return trainer


def _check_base(folder: Path, model: str | None, digest: str) -> None:
    """Refuse another base model than the grid's first: its samples are shared, and its runs compared.

    Args:
        digest: of the base model's weights, see ``start.base_digest``.
    """
    record = folder / "base-model.sha256"
    if not record.exists():
        with replacing(record) as scratch:
            scratch.write_text(f"{digest}\n", encoding="utf-8")
    elif record.read_text(encoding="utf-8").strip() != digest:
        raise other_weights(model, f"the grid in {folder}", "choose")


def _seen(path: Path) -> tuple[bool, bool]:
    """Whether a point is finished, and whether it was begun."""
    return RunFolder(path).finished, (path / "config.yaml").exists()


def _run_point(trainer: Trainer, processes: Processes) -> str:
    """Train a point; "", or why it ended without a result, as one that diverged does."""
    try:
        trainer.train()
    except OutOfResources:
        raise
    except UsageError as error:
        if processes.count > 1:  # the other processes have ended
            raise
        return str(error)
    return ""


def _begin(folder: Path, base: Config) -> Config:
    """Make the grid's folder, or check that it is this grid's; the base with its precision settled."""
    record = folder / "grid.json"
    if not record.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is no grid (no grid.json); choose another --output")
        base = dataclasses.replace(base, precision=settled_precision(base.precision))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
        _record(record, base)
        return base
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{record} is damaged ({error}); choose another --output") from error
    if base.precision == "auto":
        base = dataclasses.replace(base, precision=saved["precision"])
    mine = binding(base)
    others = sorted(name for name in mine.keys() | saved.keys() if mine.get(name) != saved.get(name))
    if others == ["keep_best"] and _chooses_anew(folder, base, saved):
        _record(record, base)
    elif others:
        name = others[0]
        raise UsageError(
            f"{name} = {mine.get(name)!r}, but the grid in {folder} was made with {saved.get(name)!r};"
            " give it its own, or choose another --output"
        )
    return base


def _chooses_anew(folder: Path, base: Config, saved: dict[str, Any]) -> bool:
    """Whether the rounds of all points may be chosen by the base's keep_best in place of the saved one.

    They were compared by one from the beginning, and no point is finished with any other.
    """
    finished = _finished_points(folder)
    chosen_by = {settings_in(path / "config.yaml").get("keep_best") for path in finished}
    return bool(base.goal() and str(saved.get("keep_best", "")).strip()) and chosen_by <= {base.keep_best}


def _record(record: Path, base: Config) -> None:
    with replacing(record) as scratch:
        scratch.write_text(json.dumps(binding(base), indent=2), encoding="utf-8")


def _write(folder: Path, results: dict[str, Any]) -> None:
    """The numbers first: whatever should be wrong with showing them, they are there."""
    files: dict[str, Callable[[dict[str, Any]], str]] = {
        "ablations.json": lambda found: json.dumps(found, indent=2, ensure_ascii=False) + "\n",
        "ablations.md": markdown,
        "ablations.svg": plot,
    }
    for name, text_of in files.items():
        with replacing(folder / name) as scratch:
            scratch.write_text(text_of(results), encoding="utf-8")
