"""The checkpoints of a run: folders of its state in JSON and its tensors in safetensors, with checksums.

A checkpoint is a folder made under another name, flushed to disk, read back for its checksums and renamed:
whatever kills the run, the folder named "checkpoint" is complete. The one before it stays in "checkpoint.old"
until the next one is complete, in case the disk loses what it reported as written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quark_fast.errors import UsageError
from quark_fast.files.atomic import flush, flush_all, give_usual_permissions, replacing_folder, sha256
from quark_fast.files.safe_text import clean
from quark_fast.runtime.run_folder import COMPLETIONS, METRICS, STATE, RunFolder

CHECKSUMS = "checksums.json"  # sha256 of every other file of a checkpoint

StateAndTensors = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]


def save_checkpoint(
    folder: RunFolder, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Add a checkpoint of ``state`` (JSON) and one safetensors file for each of ``tensors``."""
    scratch, current, old = (folder / f"checkpoint{suffix}" for suffix in (".tmp", "", ".old"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    # How far the JSONL files had come: rows written after this are repeated by a resumed run.
    sizes = {name: _size(folder / name) for name in (METRICS, COMPLETIONS)}
    for name, size in sizes.items():
        if size:
            flush(folder / name)
    _write_state(scratch, {**state, "sizes": sizes}, tensors)
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        os.rename(current, old)
    os.rename(scratch, current)
    flush(folder.at)


def keep_state(
    folder: RunFolder, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write what another run can go on from when this one is finished: ``state/``, as a checkpoint is."""
    with replacing_folder(folder / STATE) as scratch:
        _write_state(scratch, state, tensors)


def kept_state(folder: RunFolder) -> StateAndTensors:
    """(state, tensors) of ``keep_state``.

    Raises:
        UsageError: it is damaged.
    """
    if not (folder / STATE).exists():
        raise UsageError(f"{folder / STATE} is not there any more: nothing to go on from; put the run back")
    try:
        return _read_state(folder / STATE)
    except Exception as error:  # as in ``load_checkpoint``
        reason = clean(" ".join(str(error).split()))[:200]
        raise UsageError(f"{folder / STATE} is damaged ({reason}): nothing to go on from") from error


def load_checkpoint(folder: RunFolder) -> StateAndTensors | None:
    """(state, tensors) of the last whole checkpoint; None: none was made yet. See ``cut_back``.

    Raises:
        UsageError: all that there are (two at most) are damaged.
    """
    current, old = folder / "checkpoint", folder / "checkpoint.old"
    found = [path for path in (current, old) if path.exists()]
    damage: list[str] = []
    for path in found:
        try:
            state, tensors = _read(folder, path)
        except Exception as error:  # truncated or foreign files fail in many ways; all mean the same
            reason = clean(" ".join(str(error).split()))[:200]
            damage.append(f"{path.name} is damaged ({reason})")
            continue
        break
    else:
        if found:
            raise UsageError(f"nothing to go on with in {folder.path}: {'; '.join(damage)}; start a new run")
        return None
    if path == old:
        if damage:
            aside = folder / "checkpoint.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(current, aside)
            message = "%s: %s; going on from the one before it, of step %s"
            logging.getLogger(__name__).warning(message, folder.path, damage[0], state.get("step"))
        os.rename(old, current)
    return state, tensors


def cut_back(folder: RunFolder, state: Mapping[str, Any] | None) -> None:
    """Cut the JSONL files back to a checkpoint's ``state``; None: to nothing. The rest is made again."""
    sizes = dict.fromkeys((METRICS, COMPLETIONS), 0) if state is None else state["sizes"]
    for name, size in sizes.items():
        if size:
            os.truncate(folder / name, size)
        else:
            (folder / name).unlink(missing_ok=True)


def _read(folder: RunFolder, path: Path) -> StateAndTensors:
    """(state, tensors) of one checkpoint; an error of any kind if it is not as it was written."""
    state, tensors = _read_state(path)
    sizes = state["sizes"]
    # They name what is cut: nothing else in the world may be.
    if sizes.keys() != {METRICS, COMPLETIONS} or not all(type(n) is int and n >= 0 for n in sizes.values()):
        raise ValueError(f"sizes of {', '.join(map(str, sizes))}")
    for name, size in sizes.items():
        if not _ends_a_line(folder / name, size):
            raise ValueError(f"{name} has lost rows since")
    return state, tensors


def _write_state(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Files of a state in a folder of theirs, flushed to disk and read back for their checksums."""
    for name, group in tensors.items():
        save_file(dict(group), folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for file in list(folder.iterdir()):
        give_usual_permissions(file)
    flush_all(folder)
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
    flush(folder / CHECKSUMS)
    flush(folder)


def _read_state(path: Path) -> StateAndTensors:
    """(state, tensors) of ``_write_state``; an error of any kind if they are not as they were written."""
    sums: dict[str, str] = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    files = {file.name for file in path.iterdir()} - {CHECKSUMS}
    if files != sums.keys():
        raise ValueError(f"it holds {sorted(files)}, not {sorted(sums)}")
    for name, expected in sums.items():
        if sha256(path / name) != expected:
            raise ValueError(f"{name} has another checksum than when it was written")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {file.stem: _copied(file) for file in sorted(path.glob("*.safetensors"))}
    return state, tensors


def _copied(file: Path) -> dict[str, Tensor]:
    """Tensors in memory of their own: mapped ones would keep a file that is removed later.

    On NFS it then stays in its folder, which so cannot be removed; elsewhere it keeps its room on the disk.
    """
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _ends_a_line(path: Path, size: int) -> bool:
    """Whether a JSONL file has its first ``size`` bytes, and they are whole lines."""
    if size <= 0 or _size(path) < size:
        return size == 0
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"
