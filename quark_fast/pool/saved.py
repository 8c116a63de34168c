"""A pool as arrays and plain values, and the safetensors file that holds them."""

from __future__ import annotations

import errno
import json
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quark_fast.files import atomic
from quark_fast.pool.store import Rounds, SampleStore, Segment, checksum
from quark_fast.pool.tokens import TokenRows

State = dict[str, Any]

FORMAT = 2
_METADATA = "quark_fast.pool.pool"


@dataclass(frozen=True)
class PoolState:
    """What a state holds, after all checks that need no core."""

    rewards: npt.NDArray[np.floating]
    run_sizes: list[int]
    synced: bool
    store: SampleStore
    rounds: Rounds
    newest_round: int
    draws: int
    unscored: int


def samples_state(store: SampleStore) -> State:
    """The samples as arrays, or the names of their files, which are then on disk."""
    if store.folder is not None:
        return {"files": store.flush()}
    whole = Segment.joined(store.segments)
    return {
        "prompt_tokens": whole.prompts.tokens,
        "prompt_lengths": whole.prompts.lengths,
        "completion_tokens": whole.completions.tokens,
        "completion_lengths": whole.completions.lengths,
    }


def parse(state: State, settings: dict[str, Any], folder: Path | None) -> PoolState:
    """Check a state for a pool of these settings. ValueError says what does not fit."""
    if state.get("format") != FORMAT:
        raise ValueError(f"pool format {state.get('format')!r}; this version reads {FORMAT}")
    try:
        return _parse(state, settings, folder)
    except (LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"the saved pool is damaged: {type(error).__name__}: {error}") from error


def _parse(state: State, settings: dict[str, Any], folder: Path | None) -> PoolState:
    for name, mine in settings.items():
        theirs = state["settings"].get(name)
        if theirs != mine:
            raise ValueError(
                f"the saved pool has {name}={theirs!r}, this one {name}={mine!r}; make the pool with the "
                "saved settings"
            )
    rewards = np.asarray(state["rewards"], settings["dtype"])
    if rewards.ndim != 1:
        raise ValueError(f"stored rewards are of shape {rewards.shape}")
    starts, numbers = (_ints(name, state[name]) for name in ("round_starts", "rounds"))
    if len(starts) != len(numbers) or (np.diff(starts) < 1).any() or (starts[:1] > 0).any():
        raise ValueError("stored rounds do not belong to the stored samples")
    if rewards.size and not len(starts):
        raise ValueError("stored samples are of no round")
    if not isinstance(state["synced"], bool):
        raise ValueError(f"stored synced is {state['synced']!r}, neither true nor false")
    return PoolState(
        rewards,
        _ints("run_sizes", state["run_sizes"]).tolist(),
        state["synced"],
        _stored_samples(state, folder, rewards.size),
        Rounds(starts, numbers),
        round_number(state["newest_round"]),
        operator.index(state["draws"]),
        operator.index(state["unscored"]),
    )


def _stored_samples(state: State, folder: Path | None, n: int) -> SampleStore:
    store = SampleStore(folder)
    if "files" in state:
        if folder is None:
            raise ValueError("the saved pool has its samples in a folder: make this one with store=FOLDER")
        store.open(state["files"], n)
        return store
    prompts, completions = (
        TokenRows.of_lengths(
            # A copy: only the pool writes to its samples.
            _ints(f"{name}_tokens", state[f"{name}_tokens"], np.int32).copy(),
            _ints(f"{name}_lengths", state[f"{name}_lengths"]),
        )
        for name in ("prompt", "completion")
    )
    if len(prompts) != n:
        raise ValueError(f"columns of one pool differ in length: {len(prompts)} prompts, {n} rewards")
    store.append(Segment(0, prompts, completions))
    return store


def round_number(round: Any) -> int:
    number = operator.index(round)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"round = {round}; give a number of 64 bits")
    return number


def _ints(name: str, values: Any, dtype: type[np.signedinteger[Any]] = np.int64) -> npt.NDArray[Any]:
    """A saved column of integers."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"stored {name} are {array.dtype} of shape {array.shape}, not {dtype.__name__}")
    return array


# --- the file --------------------------------------------------------------------------------


def write(path: Path, state: State, folder: Path | None) -> None:
    """The state in a safetensors file: whole or not at all, even if the machine stops."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the pool's folder is not there; make it", str(path.parent))
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    values = {name: value for name, value in state.items() if name not in arrays}
    if folder is not None:
        values["store"] = os.path.relpath(folder.resolve(), path.parent.resolve())
    text = json.dumps(values)
    with atomic.replacing(path) as scratch:
        save_file(arrays, scratch, {_METADATA: text, "crc32": checksum(text, arrays)})


def read(path: Path) -> State:
    """The state that write() wrote, `store` as seen from the file. ValueError if the file is not whole."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file that save() wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if _METADATA not in metadata:
                raise ValueError(f"{path} is a safetensors file, but not of a RolloutPool")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a pool file: {error}") from error
    text = metadata[_METADATA]
    if metadata.get("crc32") != checksum(text, arrays):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content")
    try:
        return {**json.loads(text), **arrays}
    except (TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} holds no sound pool: {error}") from error
