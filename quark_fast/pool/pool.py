"""The pool of scored samples, in quantiles of reward at any moment.

Every rollout that was scored is kept: prompt and completion as token ids, reward, round. Its
quantile (0 = the lowest rewards, K - 1 = the best) is that of the *whole* pool as it stands when
it is asked for, so nothing is relabelled in bulk. The C++ core (csrc/quantile_pool.hpp) holds the
rewards and their order; store.py holds the samples, in RAM or on disk; this module is what a
user sees of both, and saves and restores them.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from quark_fast import _C
from quark_fast.files import atomic
from quark_fast.pool.groups import GroupQuantiles
from quark_fast.pool.store import SampleStore, Segment, TokenRows, checksum, parts_of
from quark_fast.pool.union import union_boundaries

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Tokens = npt.NDArray[np.int32]
Row = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor
Rows = Sequence[Row] | npt.NDArray[np.integer] | torch.Tensor
Generator = np.random.Generator | torch.Generator

_CORES = {"float32": _C.QuantilePool32, "float64": _C.QuantilePool64}
_FORMAT = 2
_METADATA = "quark_fast.pool.pool"


@dataclass(frozen=True)
class RolloutBatch:
    """Samples of the pool, one per position; `quantiles` as they were when the batch was made."""

    ids: Ints
    prompts: list[Tokens]
    completions: list[Tokens]
    rewards: Floats
    quantiles: Ints
    rounds: Ints

    def __len__(self) -> int:
        return len(self.ids)


class RolloutPool:
    """Scored samples and their quantiles of reward, exact and deterministic.

    With n samples, counted from the best, the best j of K quantiles end at the c_j-th sample:
    c_j = ceil(j n / K) for remainder "spread", j (n // K) for "last" (the worst quantile takes
    the remainder).

    Args:
        quantiles: K, how many.
        ties: what decides between equal rewards. "same": nothing, they share a quantile, the one in
            which the middle of their block lies: with p rewards better and m equal, quantile
            K - 1 - #{j : c_j < p + m / 2}. Where there are two rewards or more, the lowest is in quantile
            0 and the highest in K - 1; quantiles between may be empty. "arrival": the older ranks better.
            "random": a fixed hash of each sample.
        remainder: see above.
        dtype: of the rewards; float32 halves their memory and merges close neighbours.
        seed: of the pool's own draws and of ties="random".
        group_by: None: quantiles of the whole pool. "prompt": of the samples of one prompt.
            "groups": of the samples with one number in `groups` of add(). Labels are then computed
            anew after each change, in O(n log n).
        max_rounds: samples of older rounds than the newest so many are expired by add().
        max_size: the oldest samples beyond so many are dropped by add().
        store: a folder for prompts and completions, which then cost no RAM; it belongs to this pool
            alone (ranks take one each). None: they are kept in RAM. Rewards and order always are.
        missing: "skip" counts rewards that are None or NaN in `unscored` and leaves these samples
            out; "error" refuses them.
        preset: "paper" is the authors' rule: ties="arrival", remainder="last", dtype="float64".

    Any method may be called from any thread; readers run beside an add().
    """

    def __init__(
        self,
        quantiles: int = 5,
        *,
        ties: Literal["same", "arrival", "random"] = "same",
        remainder: Literal["spread", "last"] = "spread",
        dtype: Literal["float32", "float64"] = "float64",
        seed: int = 0,
        group_by: Literal["prompt", "groups"] | None = None,
        max_rounds: int | None = None,
        max_size: int | None = None,
        store: str | os.PathLike[str] | None = None,
        missing: Literal["skip", "error"] = "skip",
        preset: Literal["paper"] | None = None,
    ) -> None:
        _require_one_of("preset", preset, (None, "paper"))
        if preset == "paper":
            if (ties, remainder, dtype) != ("same", "spread", "float64"):
                raise ValueError("preset='paper' sets ties, remainder and dtype: leave them out")
            ties, remainder = "arrival", "last"
        _require_one_of("ties", ties, ("same", "arrival", "random"))
        _require_one_of("remainder", remainder, ("spread", "last"))
        _require_one_of("dtype", dtype, tuple(_CORES))
        _require_one_of("group_by", group_by, (None, "prompt", "groups"))
        _require_one_of("missing", missing, ("skip", "error"))
        for name, bound in (("max_rounds", max_rounds), ("max_size", max_size)):
            if bound is not None and bound < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {bound}")
        self.settings: dict[str, Any] = {
            "quantiles": quantiles,
            "ties": ties,
            "remainder": remainder,
            "dtype": dtype,
            "seed": seed,
            "group_by": group_by,
            "max_rounds": max_rounds,
            "max_size": max_size,
            "missing": missing,
        }
        self.quantiles = quantiles
        self.unscored = 0
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._tie_key = _hash64("ties", seed)
        self._core = _CORES[dtype](
            quantiles, getattr(_C.Ties, ties), getattr(_C.Remainder, remainder), self._tie_key
        )
        self._store = SampleStore(None if store is None else Path(store))
        self._rounds = _Rounds()
        self._newest_round = 0
        self._draws = 0  # with the seed, the whole state of the pool's own randomness
        self._grouped: GroupQuantiles | None = None  # with group_by: as of the last change, once asked for
        # Held in this order. Looking samples up excludes removing them, but not adding more; but
        # quantiles within groups are computed from columns that must not grow meanwhile.
        self._writing = threading.RLock()
        self._reading = self._writing if group_by else threading.RLock()

    # --- what the pool holds -----------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._core)

    __iter__ = None  # without it, Python would count ids up from 0 until one is missing

    @property
    def ids(self) -> Ints:
        """(n,) the ids of all samples, oldest first; ids count up and are never used again."""
        return self._core.ids()

    @property
    def rewards(self) -> Floats:
        """(n,) the rewards of all samples, aligned with `ids`."""
        return self._core.rewards()

    @property
    def rounds(self) -> Ints:
        """(n,) the rounds of all samples, aligned with `ids`."""
        with self._reading:
            return self._rounds.of(self.ids)

    def labels(self, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """(n,) the quantiles of all samples, aligned with `ids`; torch.from_numpy shares their memory.

        Args:
            out: where to write them, of len(pool) or more uint8 (up to 256 quantiles), int32 or int64:
                memory that is used again saves most of the time of labelling a large pool.
        Returns:
            the part of `out` that was written; int32 without `out`.
        """
        source = self._source()
        if out is None:
            return source.labels()
        if out.ndim != 1 or len(out) < len(self) or out.dtype not in (np.uint8, np.int32, np.int64):
            raise ValueError(
                f"out must be {len(self)} or more uint8, int32 or int64 in one dimension, got {out.dtype} of "
                f"shape {out.shape}"
            )
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("out must be contiguous and writable")
        return out[: source.labels_into(out)]

    def quantile_sizes(self) -> Ints:
        """(K,) how many samples each quantile holds now, the worst first."""
        if self.settings["group_by"]:
            return np.bincount(self.labels(), minlength=self.quantiles)
        return self._core.quantile_sizes()

    @property
    def thresholds(self) -> Floats:
        """(K - 1,) ascending: thresholds[k] is the least reward that reaches quantile k + 1.

        Rewards of the pool, never interpolated. NaN where none of them is enough: an empty pool; with
        ties="same" a pool of one reward, which is in the middle; else remainder="last" with fewer samples
        than quantiles.
        """
        if self.settings["group_by"]:
            raise ValueError("with group_by each group has its own thresholds; use labels()")
        return self._core.thresholds()[::-1].copy()

    def quantile_of(self, reward: npt.ArrayLike) -> Any:
        """The best quantile that the thresholds of now give to a reward (or to each of many)."""
        thresholds = self.thresholds
        if len(self) == 0:
            raise ValueError("an empty pool has no quantiles: add scored samples first")
        rewards = _as_rewards(np.atleast_1d(np.asarray(reward)), thresholds.dtype)
        if np.isnan(rewards).any():
            raise ValueError("reward is NaN, which has no quantile")
        with np.errstate(invalid="ignore"):  # NaN thresholds: nothing reaches them
            quantiles = (rewards[..., None] >= thresholds).sum(-1)
        return int(quantiles[0]) if np.ndim(reward) == 0 else quantiles

    def __getitem__(self, ids: int | npt.ArrayLike) -> RolloutBatch:
        """The samples with these ids, in this order. KeyError for an id that is not in the pool."""
        wanted = _as_ids(ids)
        with self._reading:
            return self._batch(wanted, *self._look_up(wanted))

    def __repr__(self) -> str:
        parts = [f"{len(self):,} samples", f"{self.quantiles} quantiles"]
        if len(self):
            rewards = self.rewards
            parts.append(f"rewards {rewards.min():.4g} to {rewards.max():.4g}")
            parts.append(f"rounds {self.rounds.min()} to {self.rounds.max()}")
        if self.unscored:
            parts.append(f"{self.unscored:,} unscored")
        kept = ("ties", "remainder", "dtype", "seed", "group_by", "max_rounds", "max_size")
        settings = [f"{k}={self.settings[k]!r}" for k in kept if self.settings[k] is not None]
        if self._store.folder is not None:
            settings.append(f"store={str(self._store.folder)!r}")
        return f"RolloutPool({', '.join(parts)}; {', '.join(settings)})"

    # --- changing it -------------------------------------------------------------------------

    def add(
        self,
        prompts: Rows,
        completions: Rows,
        rewards: npt.ArrayLike | Sequence[float | None],
        round: int | None = None,
        groups: npt.ArrayLike | None = None,
    ) -> Ints:
        """Add scored samples.

        Args:
            prompts, completions: token ids, one row per sample, each of its own length (or (n, length)).
            rewards: higher is better; None or NaN: not scored, left out and counted.
            round: when they were made; None: the newest round so far.
            groups: integers, with group_by="groups" only.
        Returns:
            (n,) ids, -1 where the sample was left out. With max_rounds or max_size, samples (even
            new ones) may be gone at once.
        """
        values = _as_rewards(rewards, self._dtype)
        scored = ~np.isnan(values)
        if self.settings["missing"] == "error" and not scored.all():
            raise ValueError(
                f"rewards[{int(np.argmin(scored))}] is None or NaN; "
                "missing='skip' counts such samples and leaves them out"
            )
        prompt_rows = _pack("prompts", prompts, scored)
        completion_rows = _pack("completions", completions, scored)
        group_numbers = self._group_numbers(prompt_rows, groups, scored)
        with self._writing:
            made_in = self._newest_round if round is None else _round(round)
            segment = Segment(0, prompt_rows, completion_rows, group_numbers)
            ids = self._append(values, np.array([made_in][: len(segment)], np.int64), [segment])
            self.unscored += len(values) - len(segment)
            self._enforce_bounds()
        return ids

    def merge(self, other: RolloutPool) -> Ints:
        """Add all samples of another pool, oldest first, with their rounds; returns the new ids."""
        if other is self:
            raise ValueError("a pool cannot be merged with itself")
        if self.settings["group_by"] != other.settings["group_by"]:
            raise ValueError(
                f"a pool with group_by={self.settings['group_by']!r} cannot take samples from one "
                f"with group_by={other.settings['group_by']!r}"
            )
        with other._writing:  # segments do not change: this is all of the other pool at this moment
            theirs, rewards, unscored = other.ids, other.rewards, other.unscored
            rounds, segments = other._rounds.of(theirs), other._store.segments
        values = _as_rewards(rewards, self._dtype)
        with self._writing:
            ids = self._append(values, rounds, parts_of(segments, theirs))
            self.unscored += unscored
            self._enforce_bounds()
        return ids

    def expire(self, before: int) -> int:
        """Take out the samples of rounds before `before`; returns how many these were."""
        with self._writing:
            if self._rounds.oldest() >= before:
                return 0
            ids = self.ids
            leaving = ids[self._rounds.of(ids) < before]
            self._remove(leaving)
            return len(leaving)

    def drop(self, ids: int | npt.ArrayLike) -> None:
        """Take out these samples. KeyError, and none is taken out, if one is not in the pool."""
        leaving = np.unique(_as_ids(ids))
        with self._writing:
            self._require_known(leaving)
            self._remove(leaving)

    def clear(self) -> None:
        """Take out all samples. Ids, rounds, draws and `unscored` go on from where they are."""
        with self._writing:
            self._remove(self.ids)

    def compact(self) -> None:
        """Rewrite the store's files without the samples that are gone, and delete all others.

        Dropped and expired samples stay on disk until then, so that a pool saved earlier still finds its
        samples. Afterwards it does not: save() the pool anew.
        """
        if self._store.folder is None:
            raise ValueError("compact() is for a pool with store=FOLDER; in RAM, memory is freed by itself")
        with self._writing, self._reading:
            self._store.compact(self._core.contains)

    # --- drawing from it ---------------------------------------------------------------------

    def sample(
        self,
        n: int,
        generator: Generator | None = None,
        quantiles: int | Sequence[int] | None = None,
        replace: bool = True,
        stratified: bool = False,
    ) -> RolloutBatch:
        """Draw n samples, uniformly from the whole pool or from some of its quantiles.

        Args:
            generator: where the randomness comes from; None: the pool's own, which is saved with
                it. The same state of pool and generator gives the same draw on every platform.
            quantiles: one or more of 0 (worst) .. K - 1 (best); None: all.
            replace: False: no sample twice.
            stratified: turn by turn from each of the quantiles that is not empty, so that their
                counts differ by at most one; uniformly within each.
        Raises:
            ValueError: nothing to draw from, or too few samples for replace=False.
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        chosen = [] if quantiles is None else np.atleast_1d(np.asarray(quantiles)).tolist()
        if quantiles is not None and not chosen:
            raise ValueError("quantiles is empty; None draws from all of them")
        with self._reading:
            key = self._draw_key(generator)
            return self._batch(*self._source().sample(n, chosen, replace, stratified, key))

    def epoch(self, batch_size: int, generator: Generator | None = None) -> Iterator[RolloutBatch]:
        """Every sample once, in random order, in batches (the last may be smaller).

        The order is a keyed permutation that is never written out. Samples added meanwhile wait for
        the next epoch; samples removed meanwhile are left out. Quantiles are as of each batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        with self._reading:
            key = self._draw_key(generator)
            first_id, end = self._oldest_id(), self._core.next_id
        return self._epoch(batch_size, key, first_id, max(end - first_id, 0))

    def _epoch(self, batch_size: int, key: int, first_id: int, size: int) -> Iterator[RolloutBatch]:
        waiting = np.empty(0, np.int64)
        for start in range(0, size, batch_size):
            stop = min(start + batch_size, size)
            ids = first_id + _C.permutation_slice(size, key, start, stop)
            waiting = np.concatenate([waiting, ids])
            while len(waiting) and (len(waiting) >= batch_size or stop == size):
                with self._reading:
                    waiting = waiting[self._core.contains(waiting)]
                    if len(waiting) < batch_size and stop < size:
                        break
                    ids, waiting = waiting[:batch_size], waiting[batch_size:]
                    batch = self._batch(ids, *self._look_up(ids))
                if len(batch):
                    yield batch

    # --- several processes -------------------------------------------------------------------

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Use the exact quantiles of the union of all ranks' pools, until the pool changes.

        Every rank calls it. Afterwards thresholds, labels and draws of this rank's samples go by
        the union's boundaries; after a change whatever needs boundaries raises RuntimeError until
        sync() or unsync(). With ties="arrival" the order among equal rewards is that of the ids,
        then of the ranks.
        """
        if self.settings["group_by"]:
            raise ValueError("sync() has no meaning with group_by: a group lives on one rank")
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return  # the union is this pool
        with self._writing:
            self._core.impose(*union_boundaries(self._core, self.settings, group))

    def unsync(self) -> None:
        """Go back to the quantiles of this rank's own pool."""
        self._core.imposed = False

    # --- saving it ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The pool as numpy arrays and plain values; a pool restored from it draws the same.

        With store=FOLDER the samples are not in it, but the names of their files, which are then on disk.
        """
        with self._writing:
            ids = self.ids
            starts, rounds = self._rounds.changes
            return {
                "format": _FORMAT,
                "settings": dict(self.settings),
                "next_id": self._core.next_id,
                "run_sizes": np.array(self._core.run_sizes, np.int64),
                "synced": self._core.imposed,
                "draws": self._draws,
                "unscored": self.unscored,
                "newest_round": self._newest_round,
                "ids": ids,
                "rewards": self.rewards,
                "round_starts": starts,
                "rounds": rounds,
            } | self._samples_state(ids)

    def _samples_state(self, ids: Ints) -> dict[str, Any]:
        if self._store.folder is not None:
            return {"files": self._store.flush()}
        parts = list(parts_of(self._store.segments, ids))
        prompts = TokenRows.joined([part.prompts for part in parts])
        completions = TokenRows.joined([part.completions for part in parts])
        state = {
            "prompt_tokens": prompts.tokens,
            "prompt_lengths": prompts.lengths,
            "completion_tokens": completions.tokens,
            "completion_lengths": completions.lengths,
        }
        if self.settings["group_by"]:
            state["groups"] = _groups_of(parts)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by a saved one. ValueError, and no change, if it does not fit.

        A pool that was synced asks to be synced again before it gives quantiles.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"pool format {state.get('format')!r}; this version reads {_FORMAT}")
        try:
            self._load(state)
        except (LookupError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"the saved pool is damaged: {type(error).__name__}: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        for name, mine in self.settings.items():
            theirs = state["settings"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"the saved pool has {name}={theirs!r}, this one {name}={mine!r}; make the "
                    "pool with the saved settings, or take its samples over with merge()"
                )
        ids, rewards = _ints("ids", state["ids"]), np.asarray(state["rewards"], self._dtype)
        if (ids[1:] <= ids[:-1]).any():
            raise ValueError("stored ids must ascend")
        store = self._stored_samples(state, ids)
        starts, numbers = (_ints(name, state[name]) for name in ("round_starts", "rounds"))
        if len(starts) != len(numbers) or (np.diff(starts) < 1).any() or (starts[:1] > ids[:1]).any():
            raise ValueError("stored rounds do not belong to the stored samples")
        if len(ids) and not len(starts):
            raise ValueError("stored samples are of no round")
        rounds = _Rounds(starts, numbers)
        run_sizes = _ints("run_sizes", state["run_sizes"]).tolist()
        synced = state["synced"]
        if not isinstance(synced, bool):
            raise ValueError(f"stored synced is {synced!r}, neither true nor false")
        draws, unscored = operator.index(state["draws"]), operator.index(state["unscored"])
        newest_round = _round(state["newest_round"])
        with self._writing, self._reading:
            self._core.restore(ids, rewards, run_sizes, state["next_id"])
            self._core.imposed = synced
            self._store, self._rounds, self._grouped = store, rounds, None
            self._draws, self.unscored, self._newest_round = draws, unscored, newest_round

    def _stored_samples(self, state: dict[str, Any], ids: Ints) -> SampleStore:
        store = SampleStore(self._store.folder)
        if "files" in state:
            if store.folder is None:
                raise ValueError(
                    "the saved pool has its samples in a folder: make this one with store=FOLDER"
                )
            store.open(state["files"], ids)
            return store
        if len(ids):
            rows = [
                TokenRows.of_lengths(
                    _ints(f"{name}_tokens", state[f"{name}_tokens"], np.int32),
                    _ints(f"{name}_lengths", state[f"{name}_lengths"]),
                )
                for name in ("prompt", "completion")
            ]
            groups = _ints("groups", state["groups"]) if self.settings["group_by"] else None
            store.append(Segment(int(ids[0]), rows[0], rows[1], groups, ids))
        return store

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pool to a safetensors file: whole or not at all, even if the machine stops.

        With store=FOLDER that folder belongs to the file: move both together.
        """
        path = Path(path)
        state = self.state_dict()
        arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
        values = {name: value for name, value in state.items() if name not in arrays}
        if self._store.folder is not None:
            values["store"] = os.path.relpath(self._store.folder.resolve(), path.parent.resolve())
        text = json.dumps(values)
        with atomic.replacing(path) as scratch:
            save_file(arrays, scratch, {_METADATA: text, "crc32": checksum(text, arrays)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], store: str | os.PathLike[str] | None = None) -> RolloutPool:
        """The pool that save() wrote, with its settings. ValueError if the file is not whole.

        Args:
            store: the folder of samples, if it is no longer where it was as seen from `path`.
        """
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
            state = json.loads(text)
            if store is None and "store" in state:
                store = Path(path).parent / state["store"]
            if (
                store is not None and not Path(store).is_dir()
            ):  # a file does not decide where folders are made
                raise ValueError(f"its folder of samples {store} is not there; name it by store=")
            pool = cls(**state["settings"], store=store)
            pool.load_state_dict(state | arrays)
        except (LookupError, TypeError, OverflowError, RecursionError, ValueError) as error:
            raise ValueError(f"{path} holds no sound pool: {error}") from error
        return pool

    # --- helpers -----------------------------------------------------------------------------

    def _draw_key(self, generator: Generator | None) -> int:
        """64 random bits, from which the core makes the whole draw."""
        if generator is None:
            self._draws += 1
            return _hash64("draw", self.settings["seed"], self._draws)
        if isinstance(generator, np.random.Generator):
            return int(generator.integers(0, 2**64, dtype=np.uint64))
        if isinstance(generator, torch.Generator):
            bits = torch.empty((), dtype=torch.int64, device=generator.device)
            return int(bits.random_(generator=generator))
        raise TypeError(
            "generator must be a numpy.random.Generator, a torch.Generator or None, got "
            f"{type(generator).__name__}"
        )

    def _source(self) -> _C.QuantilePool32 | GroupQuantiles:
        """What tells quantiles: the core, or with group_by what is computed anew after each change."""
        if not self.settings["group_by"]:
            return self._core
        with self._writing:
            if self._grouped is None:
                ids = self.ids
                groups = _groups_of(list(parts_of(self._store.segments, ids)))
                self._grouped = GroupQuantiles(ids, self.rewards, groups, self.settings, self._tie_key)
            return self._grouped

    def _group_numbers(self, prompts: TokenRows, groups: Any, scored: Any) -> Ints | None:
        group_by = self.settings["group_by"]
        if (groups is not None) != (group_by == "groups"):
            raise ValueError(f"groups belongs to group_by='groups'; this pool has {group_by!r}")
        if group_by == "groups":
            numbers = np.asarray(groups)
            if numbers.shape != scored.shape or (numbers.size and numbers.dtype.kind not in "iu"):
                raise ValueError(f"groups must be {len(scored)} integers, got {groups!r}")
            chosen: Ints = numbers[scored].astype(np.int64)
            return chosen
        if group_by is None:
            return None
        # 64 bits of a cryptographic hash: two prompts of ten million collide once in 300,000 runs.
        rows = prompts.copies(np.arange(len(prompts)))
        return np.array([_hash64(row.tobytes()) for row in rows], np.uint64).view(np.int64)

    def _append(self, rewards: Floats, rounds: Ints, segments: Iterable[Segment]) -> Ints:
        """Ids of the samples in these segments, -1 for each NaN among the rewards, which is in none.

        Samples behind the last of `rounds` are of that round.
        """
        # The sample before its reward: whatever the core can draw can then be looked up.
        end = first_id = self._core.next_id
        before = self._store.segments, self._rounds.changes
        try:
            for segment in segments:
                self._store.append(segment.starting_at(end))
                end += len(segment)
            self._rounds.append(first_id, rounds)
            ids = self._core.add(rewards)
        except BaseException:
            self._store.segments, self._rounds.changes = before
            raise
        self._newest_round = int(rounds.max(initial=self._newest_round))
        self._grouped = None
        return ids

    def _enforce_bounds(self) -> None:
        max_rounds, max_size = self.settings["max_rounds"], self.settings["max_size"]
        if max_rounds is not None:
            self.expire(self._newest_round - max_rounds + 1)
        if max_size is not None and len(self) > max_size:
            self._remove(self._core.ids(len(self) - max_size))

    def _remove(self, ids: Ints) -> None:
        if len(ids):
            with self._reading:
                self._core.remove(ids)
                self._store.forget(ids, self._core.contains)
                self._rounds.forget_before(self._oldest_id())
                self._grouped = None

    def _oldest_id(self) -> int:
        """Of the samples in the pool; the next one's if it is empty."""
        oldest = self._core.ids(1)
        return int(oldest[0]) if len(oldest) else self._core.next_id

    def _require_known(self, ids: Ints) -> None:
        known = self._core.contains(ids)
        if not known.all():
            raise KeyError(f"sample {ids[int(np.argmin(known))]} is not in the pool")

    def _look_up(self, ids: Ints) -> tuple[Floats, Ints]:
        self._require_known(ids)
        return self._source().look_up(ids)

    def _batch(self, ids: Ints, rewards: Floats, quantiles: Ints) -> RolloutBatch:
        prompts, completions = self._store.look_up(ids)
        return RolloutBatch(ids, prompts, completions, rewards, quantiles, self._rounds.of(ids))


class _Rounds:
    """The round of every sample, as the ids where it changes and the rounds from there on."""

    def __init__(self, starts: Ints | None = None, rounds: Ints | None = None) -> None:
        empty = np.empty(0, np.int64)
        # Replaced, never written to: readers in other threads need no lock.
        self.changes = (empty if starts is None else starts, empty if rounds is None else rounds)

    def of(self, ids: Ints) -> Ints:
        starts, rounds = self.changes
        return rounds[np.searchsorted(starts, ids, side="right") - 1]

    def oldest(self) -> float:
        return float(self.changes[1].min(initial=np.iinfo(np.int64).max))

    def append(self, first_id: int, rounds: Ints) -> None:
        starts, known = self.changes
        changed = np.flatnonzero(np.diff(rounds, prepend=known[-1:] if len(known) else rounds[:1] - 1))
        self.changes = np.append(starts, first_id + changed), np.append(known, rounds[changed])

    def forget_before(self, id: int) -> None:
        starts, rounds = self.changes
        gone = max(int(np.searchsorted(starts, id, side="right")) - 1, 0)
        self.changes = starts[gone:], rounds[gone:]


def _groups_of(parts: Sequence[Segment]) -> Ints:
    return np.concatenate(
        [np.empty(0, np.int64), *(part.groups for part in parts if part.groups is not None)]
    )


# --- checks and conversions ------------------------------------------------------------------


def _require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _round(round: Any) -> int:
    number = operator.index(round)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"round = {round}; give a number of 64 bits")
    return number


def _as_ids(ids: Any) -> Ints:
    array = np.atleast_1d(np.asarray(ids))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"ids must be integers in one dimension, got {ids!r}")
    return array.astype(np.int64)


def _ints(name: str, values: Any, dtype: type[np.signedinteger[Any]] = np.int64) -> npt.NDArray[Any]:
    """A saved column of integers."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"stored {name} are {array.dtype} of shape {array.shape}, not {dtype.__name__}")
    return array


def _as_rewards(rewards: Any, dtype: np.dtype[Any]) -> Floats:
    """(n,) in the pool's dtype; None becomes NaN."""
    if isinstance(rewards, np.ndarray) and rewards.dtype == dtype and rewards.ndim == 1:
        return rewards
    values = np.asarray(rewards, np.float64)
    if values.ndim != 1:
        raise ValueError(f"rewards must be one number per sample, got shape {values.shape}")
    with np.errstate(over="ignore", under="ignore"):
        cast_values: Floats = values.astype(dtype)
    lost = np.isinf(cast_values) & np.isfinite(values)
    if lost.any():
        raise ValueError(f"reward {values[lost][0]!r} is beyond {dtype}; use dtype='float64'")
    return cast_values


def _pack(name: str, rows: Rows, scored: npt.NDArray[np.bool_]) -> TokenRows:
    """The rows of the scored samples, end to end."""
    if len(rows) != len(scored):
        raise ValueError(f"{len(scored)} rewards but {len(rows)} {name}")
    if isinstance(rows, torch.Tensor):
        rows = rows.numpy(force=True)
    if isinstance(rows, list) and scored.all():
        kept: Any = rows
    elif isinstance(rows, np.ndarray) and rows.ndim > 1:
        kept = rows[scored]
    else:
        kept = [row for row, keep in zip(rows, scored.tolist(), strict=True) if keep]
    packed = _C.pack_rows(kept) if isinstance(kept, list) else None  # much faster than row by row
    if packed is not None:
        return TokenRows(*packed)
    try:
        if isinstance(kept, np.ndarray):
            lengths, tokens = np.full(len(kept), kept.shape[1]), kept.reshape(-1, *kept.shape[2:])
        else:
            lengths = np.array([len(row) for row in kept], np.int64)
            filled = [np.asarray(row) for row in kept if len(row)]
            tokens = np.concatenate(filled) if filled else np.empty(0, np.int32)
    except (TypeError, ValueError) as error:  # what numpy says of rows that are no rows of numbers
        raise TypeError(f"{name} must be rows of integer token ids: {error}") from error
    if tokens.dtype.kind not in "iu" or tokens.shape != (lengths.sum(),):
        raise TypeError(f"{name} must be rows of integer token ids, got {tokens.dtype}")
    low, high = (tokens.min(), tokens.max()) if len(tokens) else (0, 0)
    if low < 0 or high >= 2**31:
        raise ValueError(f"{name} hold token ids from {low} to {high}; 0 to 2^31 - 1 are possible")
    return TokenRows.of_lengths(tokens.astype(np.int32), lengths)


def _hash64(*values: object) -> int:
    """64 bits that are the same on every platform and in every process."""
    data = values[0] if isinstance(values[0], bytes) else repr(values).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
