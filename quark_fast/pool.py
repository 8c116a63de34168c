"""The pool of scored samples, in quantiles of reward at any moment.

Every rollout that was scored is kept: prompt and completion as token ids, reward, round. Its
quantile (0 = the lowest rewards, K - 1 = the best) is that of the *whole* pool as it stands when
it is asked for, so nothing is relabelled in bulk. The C++ core (csrc/quantile_pool.hpp) holds the
rewards and their order; this module holds the samples, and saves and restores both.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
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

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Tokens = npt.NDArray[np.int32]
Places = npt.NDArray[np.unsignedinteger]
TokenRows = Sequence[Sequence[int] | npt.NDArray[np.integer] | torch.Tensor]
Generator = np.random.Generator | torch.Generator

_CORES = {"float32": _C.QuantilePool32, "float64": _C.QuantilePool64}
_FORMAT = 1
_METADATA = "quark_fast.pool"


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
        ties: what decides between equal rewards. "same": nothing, they share a quantile (the one
            of the best of them; quantiles may then be empty, the best never is). "arrival": the
            older ranks better. "random": a fixed hash of each sample.
        remainder: see above.
        dtype: of the rewards; float32 halves their memory and merges close neighbours.
        seed: of the pool's own draws and of ties="random".
        group_by: None: quantiles of the whole pool. "prompt": of the samples of one prompt.
            "groups": of the samples with one number in `groups` of add(). Labels are then computed
            anew after each change, in O(n log n).
        max_rounds: samples of older rounds than the newest so many are expired by add().
        max_size: the oldest samples beyond so many are dropped by add().
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
        self._core = _CORES[dtype](
            quantiles,
            getattr(_C.Ties, ties),
            getattr(_C.Remainder, remainder),
            _hash64("ties", seed),
        )
        self._samples = _Samples()
        self._newest_round = 0
        self._version = 0  # counts changes
        self._draws = 0  # with the seed, the whole state of the pool's own randomness
        # Held in this order. Looking samples up excludes removing them, but not adding more; but
        # quantiles within groups are computed from columns that must not grow meanwhile.
        self._grouped = _GroupedQuantiles(self) if group_by else None
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
        with self._writing:
            return self._samples.rounds.values.copy()

    def labels(self) -> npt.NDArray[np.int32]:
        """(n,) the quantiles of all samples, aligned with `ids`."""
        return self._grouped.labels() if self._grouped else self._core.labels()

    def quantile_sizes(self) -> Ints:
        """(K,) how many samples each quantile holds now, the worst first."""
        if self._grouped:
            return np.bincount(self._grouped.labels(), minlength=self.quantiles)
        return self._core.quantile_sizes()

    @property
    def thresholds(self) -> Floats:
        """(K - 1,) ascending: thresholds[k] is the least reward that reaches quantile k + 1.

        Rewards of the pool, never interpolated. NaN where no reward is enough: an empty pool, or
        remainder="last" with fewer samples than quantiles.
        """
        if self._grouped:
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
        return f"RolloutPool({', '.join(parts)}; {', '.join(settings)})"

    # --- changing it -------------------------------------------------------------------------

    def add(
        self,
        prompts: TokenRows,
        completions: TokenRows,
        rewards: npt.ArrayLike | Sequence[float | None],
        round: int | None = None,
        groups: npt.ArrayLike | None = None,
    ) -> Ints:
        """Add scored samples.

        Args:
            prompts, completions: token ids, one row per sample, each of its own length.
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
        ids = np.full(len(values), -1)
        with self._writing:
            made_in = self._newest_round if round is None else operator.index(round)
            rounds = np.full(int(scored.sum()), made_in)
            ids[scored] = self._append(values[scored], rounds, group_numbers, prompt_rows, completion_rows)
            self.unscored += int((~scored).sum())
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
        state = other.state_dict()
        rewards = _as_rewards(state["rewards"], self._dtype)
        with self._writing:
            ids = self._append(rewards, state["rounds"], state["groups"], *_rows_of(state))
            self.unscored += state["unscored"]
            self._enforce_bounds()
        return ids

    def expire(self, before: int) -> int:
        """Take out the samples of rounds before `before`; returns how many these were."""
        with self._writing:
            return self._remove(self._samples.rounds.values < before)

    def drop(self, ids: int | npt.ArrayLike) -> None:
        """Take out these samples. KeyError, and none is taken out, if one is not in the pool."""
        leaving = _as_ids(ids)
        with self._writing:
            self._require_known(leaving)
            self._remove(np.isin(self._samples.ids.values, leaving))

    def clear(self) -> None:
        """Take out all samples. Ids, rounds, draws and `unscored` go on from where they are."""
        with self._writing:
            self._remove(np.ones(len(self), bool))

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
            source = self._grouped or self._core
            return self._batch(*source.sample(n, chosen, replace, stratified, key))

    def epoch(self, batch_size: int, generator: Generator | None = None) -> Iterator[RolloutBatch]:
        """Every sample once, in random order, in batches (the last may be smaller).

        The order is a keyed permutation that is never written out. Samples added meanwhile wait for
        the next epoch; samples removed meanwhile are left out. Quantiles are as of each batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        with self._reading:
            key = self._draw_key(generator)
            ids = self._samples.ids.values[: len(self)]
        first_id, size = (int(ids[0]), int(ids[-1] - ids[0]) + 1) if len(ids) else (0, 0)
        return self._epoch(batch_size, key, first_id, size)

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

        Radix bisection: all ranks count their samples up to 255 candidates for the next 8 bits of
        each boundary, and add the counts up: 4 all-reduces for float32, 8 for float64 (twice as
        many where ties are told apart), of at most 2 KB per boundary.
        """
        if self._grouped:
            raise ValueError("sync() has no meaning with group_by: a group lives on one rank")
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return  # the union is this pool
        with self._writing:
            self._core.impose(*_union_boundaries(self._core, self.settings, group))

    def unsync(self) -> None:
        """Go back to the quantiles of this rank's own pool."""
        self._core.imposed = False

    # --- saving it ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The pool as numpy arrays and plain values; a pool restored from it draws the same."""
        with self._writing:
            samples = self._samples
            prompts, completions = samples.prompts.packed(), samples.completions.packed()
            return {
                "format": _FORMAT,
                "settings": dict(self.settings),
                "next_id": self._core.next_id,
                "run_sizes": np.array(self._core.run_sizes, np.int64),
                "synced": self._core.imposed,
                "draws": self._draws,
                "unscored": self.unscored,
                "newest_round": self._newest_round,
                "ids": self.ids,
                "rewards": self.rewards,
                "rounds": samples.rounds.values.copy(),
                "groups": samples.groups.values.copy(),
                "prompt_tokens": prompts[0],
                "prompt_lengths": prompts[1],
                "completion_tokens": completions[0],
                "completion_lengths": completions[1],
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by a saved one. ValueError, and no change, if it does not fit.

        A pool that was synced asks to be synced again before it gives quantiles.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"pool format {state.get('format')!r}; this version reads {_FORMAT}")
        for name, mine in self.settings.items():
            theirs = state["settings"].get(name)
            if theirs != mine:
                raise ValueError(
                    f"the saved pool has {name}={theirs!r}, this one {name}={mine!r}; make the "
                    "pool with the saved settings, or take its samples over with merge()"
                )
        samples = _Samples()
        samples.append(state["ids"], state["rounds"], state["groups"], *_rows_of(state))
        rewards = np.asarray(state["rewards"], self._dtype)
        run_sizes = np.asarray(state["run_sizes"]).tolist()
        synced, draws = state["synced"], state["draws"]
        unscored, newest_round = state["unscored"], state["newest_round"]
        with self._writing, self._reading:
            self._core.restore(samples.ids.values, rewards, run_sizes, state["next_id"])
            self._core.imposed = synced
            self._samples = samples
            self._draws, self.unscored, self._newest_round = draws, unscored, newest_round
            self._version += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pool to a safetensors file: whole or not at all, even if the machine stops."""
        state = self.state_dict()
        arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
        values = {name: value for name, value in state.items() if name not in arrays}
        text = json.dumps(values)
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(arrays, unfinished, {_METADATA: text, "crc32": _checksum(text, arrays)})
            _fsync(unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        _fsync(path.parent)  # makes the new name last

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RolloutPool:
        """The pool that save() wrote, with its settings. ValueError if the file is not whole."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if _METADATA not in metadata:
                    raise ValueError(f"{path} is a safetensors file, but not of a RolloutPool")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a pool file: {error}") from error
        text = metadata[_METADATA]
        if metadata.get("crc32") != _checksum(text, arrays):
            raise ValueError(f"{path} is damaged: its checksum does not fit its content")
        state = json.loads(text)
        pool = cls(**state["settings"])
        pool.load_state_dict(state | arrays)
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

    def _group_numbers(self, prompts: PackedRows, groups: Any, scored: Any) -> Ints:
        group_by = self.settings["group_by"]
        if (groups is not None) != (group_by == "groups"):
            raise ValueError(f"groups belongs to group_by='groups'; this pool has {group_by!r}")
        if group_by == "groups":
            numbers = np.asarray(groups)
            if numbers.shape != scored.shape or (numbers.size and numbers.dtype.kind not in "iu"):
                raise ValueError(f"groups must be {len(scored)} integers, got {groups!r}")
            chosen: Ints = numbers[scored].astype(np.int64)
            return chosen
        tokens, lengths = prompts
        if group_by is None:
            return np.zeros(len(lengths), np.int64)
        # 64 bits of a cryptographic hash: two prompts of ten million collide once in 300,000 runs.
        rows = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
        return np.array([_hash64(row.tobytes()) for row in rows], np.uint64).view(np.int64)

    def _append(
        self,
        rewards: Floats,
        rounds: Ints,
        groups: Ints,
        prompts: PackedRows,
        completions: PackedRows,
    ) -> Ints:
        # The sample before its reward: whatever the core can draw can then be looked up.
        size, first_id = len(self), self._core.next_id
        ids = np.arange(first_id, first_id + len(rewards))
        self._samples.append(ids, rounds, groups, prompts, completions)
        try:
            self._core.add(rewards)
        except BaseException:
            self._samples.truncate(size)
            raise
        self._newest_round = int(rounds.max(initial=self._newest_round))
        self._version += 1
        return ids

    def _enforce_bounds(self) -> None:
        max_rounds, max_size = self.settings["max_rounds"], self.settings["max_size"]
        leaves = np.zeros(len(self), bool)
        if max_rounds is not None:
            leaves |= self._samples.rounds.values <= self._newest_round - max_rounds
        if max_size is not None:
            stay = np.flatnonzero(~leaves)
            leaves[stay[: max(len(stay) - max_size, 0)]] = True
        self._remove(leaves)

    def _remove(self, leaves: npt.NDArray[np.bool_]) -> int:
        count = int(leaves.sum())
        if count:
            with self._reading:
                self._core.remove(self._samples.ids.values[leaves])
                self._samples.keep(~leaves)
                self._version += 1
        return count

    def _require_known(self, ids: Ints) -> None:
        known = self._core.contains(ids)
        if not known.all():
            raise KeyError(f"sample {ids[int(np.argmin(known))]} is not in the pool")

    def _look_up(self, ids: Ints) -> tuple[Floats, Ints]:
        self._require_known(ids)
        return (self._grouped or self._core).look_up(ids)

    def _batch(self, ids: Ints, rewards: Floats, quantiles: Ints) -> RolloutBatch:
        rows = np.searchsorted(self._samples.ids.values, ids)
        return RolloutBatch(
            ids,
            self._samples.prompts.rows(rows),
            self._samples.completions.rows(rows),
            rewards,
            quantiles,
            self._samples.rounds.values[rows],
        )


class _GroupedQuantiles:
    """Quantiles within groups, from numpy sorting; the same questions as the core answers."""

    def __init__(self, pool: RolloutPool) -> None:
        self._pool = pool
        self._version = -1
        self._labels = np.empty(0, np.int32)

    def labels(self) -> npt.NDArray[np.int32]:
        return self._fresh_labels().copy()

    def look_up(self, ids: Ints) -> tuple[Floats, Ints]:
        rows = np.searchsorted(self._pool.ids, ids)
        return self._pool.rewards[rows], self._fresh_labels()[rows].astype(np.int64)

    def sample(
        self, count: int, quantiles: list[int], replace: bool, stratified: bool, key: int
    ) -> tuple[Ints, Floats, Ints]:
        labels, k = self._fresh_labels(), self._pool.quantiles
        chosen = quantiles or list(range(k))
        if not all(0 <= quantile < k for quantile in chosen):
            raise ValueError(f"quantiles are 0 (worst) to {k - 1} (best), got {chosen}")
        if stratified:
            strata = [np.flatnonzero(labels == quantile) for quantile in sorted(set(chosen))]
        else:
            strata = [np.flatnonzero(np.isin(labels, chosen))]
        strata = [rows for rows in strata if len(rows)]
        if count and not strata:
            raise ValueError("nothing to draw from: the pool or these quantiles are empty")
        random = np.random.Generator(np.random.PCG64(key))
        turns = (random.integers(max(len(strata), 1)) + np.arange(count)) % max(len(strata), 1)
        drawn = np.empty(count, np.int64)
        for turn, rows in enumerate(strata):
            at = np.flatnonzero(turns == turn)
            if not replace and len(at) > len(rows):
                raise ValueError(
                    f"cannot draw {len(at)} without replacement from {len(rows)} samples; "
                    "ask for fewer or use replace=True"
                )
            drawn[at] = random.choice(rows, len(at), replace)
        ids = self._pool.ids[drawn]
        return ids, *self.look_up(ids)

    def _fresh_labels(self) -> npt.NDArray[np.int32]:
        pool = self._pool
        with pool._writing:
            if self._version != pool._version:
                self._labels = _labels_within_groups(
                    pool._samples.groups.values, pool.rewards, pool.ids, pool.settings
                )
                self._version = pool._version
            return self._labels


def _labels_within_groups(
    groups: Ints, rewards: Floats, ids: Ints, settings: dict[str, Any]
) -> npt.NDArray[np.int32]:
    """The rule of RolloutPool within each group: count the cuts that lie behind each sample."""
    n, k = len(ids), settings["quantiles"]
    tie = ids.astype(np.uint64)
    if settings["ties"] == "random":  # ids hashed as SplitMix64 does; overflow is the point
        tie += np.uint64(_hash64("ties", settings["seed"]))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            tie = (tie ^ (tie >> np.uint64(shift))) * np.uint64(factor)
    order = np.lexsort((tie, -rewards, groups))
    sorted_groups, sorted_rewards = groups[order], rewards[order]
    new_group = np.ones(n, bool)
    new_group[1:] = sorted_groups[1:] != sorted_groups[:-1]
    starts = np.flatnonzero(new_group)
    group = np.cumsum(new_group) - 1
    size = np.diff(starts, append=n)[group]
    position = np.arange(n)
    if settings["ties"] == "same":  # all take the position of the first of their reward
        new_reward = new_group.copy()
        new_reward[1:] |= sorted_rewards[1:] != sorted_rewards[:-1]
        position = np.maximum.accumulate(np.where(new_reward, position, 0))
    position = position - starts[group]
    labels = np.zeros(n, np.int32)
    for j in range(1, k):
        cut = -(-j * size // k) if settings["remainder"] == "spread" else j * (size // k)
        labels[order] += position < cut
    return labels


def _union_boundaries(
    core: _C.QuantilePool32, settings: dict[str, Any], group: dist.ProcessGroup | None
) -> tuple[Places, Places, Places]:
    """The K - 1 boundaries of the union of all ranks' pools, in the core's order.

    Returns:
        keys and ties of the last places on this rank that belong to the best j quantiles, and the
        keys of the union's thresholds.
    """
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def total(counts: Ints) -> Ints:
        tensor = torch.from_numpy(counts).to(device)
        dist.all_reduce(tensor, group=group)
        return tensor.cpu().numpy()

    def gather(counts: Ints) -> Ints:
        """(ranks, ...)"""
        tensor = torch.from_numpy(counts).to(device)
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, tensor, group=group)
        return torch.stack(gathered).cpu().numpy()

    rule = [settings[name] for name in ("quantiles", "ties", "remainder", "dtype")]
    if len(np.unique(gather(np.array([_hash64(*rule) >> 1], np.int64)))) > 1:
        raise ValueError(f"the ranks' pools differ in quantiles, ties, remainder or dtype; here {rule}")

    k, same = settings["quantiles"], settings["ties"] == "same"
    n = int(total(np.array([len(core)])).item())
    remainder = getattr(_C.Remainder, settings["remainder"])
    cuts = np.array([_C.quantile_cut(n, j, k, remainder) for j in range(1, k)], np.int64)
    word = np.dtype(f"u{np.dtype(settings['dtype']).itemsize}").type
    bits, largest = 8 * word().itemsize, np.iinfo(word).max
    place = {"key": np.zeros(k - 1, word), "tie": np.full(k - 1, largest, word)}
    if k == 1 or cuts[0] == 0:
        none = place["key"][:0]
        return none, none, none

    # The smallest place with cut_j samples at or before it: 8 bits at a time, keys, then ties.
    for field in ("key",) if same else ("key", "tie"):
        place[field][:] = 0
        for shift in range(bits - 8, -8, -8):
            rest = word((1 << shift) - 1)
            digits = np.arange(255, dtype=word) << word(shift)
            candidates = {name: np.repeat(values, 255) for name, values in place.items()}
            candidates[field] |= np.tile(digits, k - 1) | rest
            counts = total(core.count_up_to(candidates["key"], candidates["tie"]))
            digit = (counts.reshape(k - 1, 255) < cuts[:, None]).sum(1)
            place[field] |= digit.astype(word) << word(shift)
    keys, ties = place["key"], place["tie"]
    if same:
        return keys, ties, keys

    # Ranks may each have a sample at this very place: the first ranks' belong to the best j.
    first = ties == 0
    before = keys - first.astype(word), np.where(first, word(largest), ties - word(1))
    nothing_before = first & (keys == 0)
    up_to = core.count_up_to(keys, ties)
    under = np.where(nothing_before, 0, core.count_up_to(*before))
    here = gather(up_to - under)
    rank = dist.get_rank(group)
    missing = cuts - total(under) - here[:rank].sum(0)
    excluded = (here[rank] > 0) & (missing <= 0)
    return np.where(excluded, before[0], keys), np.where(excluded, before[1], ties), keys


# --- samples ---------------------------------------------------------------------------------

PackedRows = tuple[Tokens, Ints]  # all tokens end to end, and the length of each row


class _Column:
    """A 1-D array that grows at its end, in amortised constant time.

    Readers in other threads may hold `values` of a moment ago: what was written is never changed.
    """

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._data = np.empty(0, dtype)
        self._size = 0

    @property
    def values(self) -> npt.NDArray[Any]:
        return self._data[: self._size]

    def extend(self, values: npt.NDArray[Any]) -> None:
        size = self._size + len(values)
        if size > len(self._data):
            data = np.empty(max(size, len(self._data) * 3 // 2), self._data.dtype)
            data[: self._size] = self.values
            self._data = data
        self._data[self._size : size] = values
        self._size = size

    def replace(self, values: npt.NDArray[Any]) -> None:
        self._data, self._size = values, len(values)

    def truncate(self, size: int) -> None:
        self.replace(self.values[:size].copy())


class _TokenRows:
    """Rows of token ids in one buffer."""

    def __init__(self) -> None:
        self.tokens = _Column(np.int32)
        self.starts = _Column(np.int64)
        self.lengths = _Column(np.int64)

    def append(self, rows: PackedRows) -> None:
        tokens, lengths = rows
        start = len(self.tokens.values)
        self.tokens.extend(tokens)
        self.starts.extend(start + np.cumsum(lengths) - lengths)
        self.lengths.extend(lengths)

    def rows(self, rows: Ints) -> list[Tokens]:
        tokens = self.tokens.values
        spans = zip(self.starts.values[rows], self.lengths.values[rows], strict=True)
        return [tokens[start : start + length].copy() for start, length in spans]

    def packed(self) -> PackedRows:
        starts, lengths = self.starts.values, self.lengths.values
        packed_starts = np.cumsum(lengths) - lengths
        where = np.repeat(starts - packed_starts, lengths) + np.arange(lengths.sum())
        return self.tokens.values[where], lengths.copy()

    def keep(self, stays: npt.NDArray[np.bool_]) -> None:
        self.starts.replace(self.starts.values[stays])
        self.lengths.replace(self.lengths.values[stays])
        if 2 * self.lengths.values.sum() < len(self.tokens.values):  # amortised
            tokens, lengths = self.packed()
            self.tokens.replace(tokens)
            self.starts.replace(np.cumsum(lengths) - lengths)

    def truncate(self, size: int) -> None:
        self.keep(np.arange(len(self.starts.values)) < size)


class _Samples:
    """What the core does not hold, one row per sample in order of arrival."""

    def __init__(self) -> None:
        self.ids = _Column(np.int64)
        self.rounds = _Column(np.int64)
        self.groups = _Column(np.int64)
        self.prompts = _TokenRows()
        self.completions = _TokenRows()

    def append(
        self,
        ids: Ints,
        rounds: Ints,
        groups: Ints,
        prompts: PackedRows,
        completions: PackedRows,
    ) -> None:
        sizes = {len(column) for column in (ids, rounds, groups, prompts[1], completions[1])}
        if len(sizes) > 1:
            raise ValueError(f"columns of one pool differ in length: {sorted(sizes)}")
        self.rounds.extend(rounds)
        self.groups.extend(groups)
        self.prompts.append(prompts)
        self.completions.append(completions)
        self.ids.extend(ids)

    def keep(self, stays: npt.NDArray[np.bool_]) -> None:
        for column in (self.ids, self.rounds, self.groups):
            column.replace(column.values[stays])
        self.prompts.keep(stays)
        self.completions.keep(stays)

    def truncate(self, size: int) -> None:
        self.keep(np.arange(len(self.ids.values)) < size)


# --- checks and conversions ------------------------------------------------------------------


def _require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _as_ids(ids: Any) -> Ints:
    array = np.atleast_1d(np.asarray(ids))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"ids must be integers in one dimension, got {ids!r}")
    return array.astype(np.int64)


def _as_rewards(rewards: Any, dtype: np.dtype[Any]) -> Floats:
    """(n,) in the pool's dtype; None becomes NaN."""
    values = np.asarray(rewards, np.float64)
    if values.ndim != 1:
        raise ValueError(f"rewards must be one number per sample, got shape {values.shape}")
    with np.errstate(over="ignore", under="ignore"):
        cast_values: Floats = values.astype(dtype)
    lost = np.isinf(cast_values) & np.isfinite(values)
    if lost.any():
        raise ValueError(f"reward {values[lost][0]!r} is beyond {dtype}; use dtype='float64'")
    return cast_values


def _pack(name: str, rows: TokenRows, scored: npt.NDArray[np.bool_]) -> PackedRows:
    """The rows of the scored samples, end to end."""
    if len(rows) != len(scored):
        raise ValueError(f"{len(scored)} rewards but {len(rows)} {name}")
    kept = [row for row, keep in zip(rows, scored.tolist(), strict=True) if keep]
    try:
        lengths = np.array([len(row) for row in kept], np.int64)
        if lengths.sum() == 0:
            return np.empty(0, np.int32), lengths
        if all(type(row) is list for row in kept):  # all at once, much faster than row by row
            tokens = np.array(list(itertools.chain.from_iterable(kept)))
        else:
            tokens = np.concatenate([np.asarray(row) for row in kept if len(row)])
    except (TypeError, ValueError) as error:  # what numpy says of rows that are no rows of numbers
        raise TypeError(f"{name} must be rows of integer token ids: {error}") from error
    if tokens.dtype.kind not in "iu" or tokens.shape != (lengths.sum(),):
        raise TypeError(f"{name} must be rows of integer token ids, got {tokens.dtype}")
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= 2**31:
        raise ValueError(f"{name} hold token ids from {low} to {high}; 0 to 2^31 - 1 are possible")
    return tokens.astype(np.int32), lengths


def _rows_of(state: dict[str, Any]) -> tuple[PackedRows, PackedRows]:
    """(prompts, completions) of a state_dict."""
    packed = []
    for name in ("prompt", "completion"):
        tokens, lengths = state[f"{name}_tokens"], state[f"{name}_lengths"]
        if lengths.sum() != len(tokens) or (lengths < 0).any():
            raise ValueError(f"the {name} lengths of this state do not add up to its tokens")
        packed.append((tokens, lengths))
    return packed[0], packed[1]


def _hash64(*values: object) -> int:
    """64 bits that are the same on every platform and in every process."""
    data = values[0] if isinstance(values[0], bytes) else repr(values).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _checksum(text: str, arrays: dict[str, npt.NDArray[Any]]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return f"{crc:08x}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
