"""The pool of scored samples, in quantiles of reward at any moment.

Every rollout that was scored is kept: prompt and completion as token ids, reward, round. Its
quantile (0 = the lowest rewards, K - 1 = the best) is that of the *whole* pool as it stands when
it is asked for, so nothing is relabelled in bulk. The C++ core (csrc/quantile_pool.hpp) holds the
rewards and their order; store.py holds the samples, in RAM or on disk; saved.py knows a saved pool;
this module is what a user sees of them.
"""

from __future__ import annotations

import hashlib
import operator
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from quark_fast import _C
from quark_fast.pool import saved
from quark_fast.pool.store import Rounds, SampleStore, Segment
from quark_fast.pool.tokens import IdRows, Ints, Tokens, pack
from quark_fast.pool.union import union_boundaries

Floats = npt.NDArray[np.floating]

_CORES = {"float32": _C.QuantilePool32, "float64": _C.QuantilePool64}
_MOST_QUANTILES = 2**31 - 1  # they are counted in 32 bits


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
            "random": a fixed hash of each sample. (The authors' rule is "arrival" with remainder "last".)
        remainder: see above.
        dtype: of the rewards; float32 halves their memory and merges close neighbours.
        seed: of the draws and of ties="random".
        store: a folder for prompts and completions, which then cost no RAM; it belongs to this pool
            alone (ranks take one each). None: they are kept in RAM. Rewards and order always are.

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
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        _require_one_of("ties", ties, ("same", "arrival", "random"))
        _require_one_of("remainder", remainder, ("spread", "last"))
        _require_one_of("dtype", dtype, tuple(_CORES))
        quantiles, seed = _whole("quantiles", quantiles, 1, _MOST_QUANTILES), _whole("seed", seed)
        # Python's own types, for they are saved, compared and hashed: numpy's of the same value differ.
        self.settings: dict[str, Any] = {
            "quantiles": quantiles,
            "ties": str(ties),
            "remainder": str(remainder),
            "dtype": str(dtype),
            "seed": seed,
        }
        self.quantiles = quantiles
        self.unscored = 0
        self._core = _new_core(self.settings)
        self._store = SampleStore(None if store is None else Path(store))
        self._rounds = Rounds()
        self._newest_round = 0
        self._draws = 0  # with the seed, the whole state of the pool's randomness
        # Always taken in this order. Loading takes both, adding the first alone: reads go on meanwhile.
        self._writing = threading.Lock()
        self._reading = threading.Lock()

    # --- what the pool holds -----------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._core)

    __iter__ = None  # without it, Python would count ids up from 0 until one is missing

    @property
    def ids(self) -> Ints:
        """(n,) the ids of all samples, oldest first: 0 to n - 1."""
        return np.arange(len(self))

    @property
    def rewards(self) -> Floats:
        """(n,) the rewards of all samples, aligned with `ids`."""
        return self._core.rewards()

    @property
    def rounds(self) -> Ints:
        """(n,) the rounds of all samples, aligned with `ids`."""
        return self._rounds.of(self.ids)

    def labels(self, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """(n,) the quantiles of all samples, aligned with `ids`; torch.from_numpy shares their memory.

        Args:
            out: where to write them, of len(pool) or more uint8 (up to 256 quantiles), int32 or int64:
                memory that is used again saves most of the time of labelling a large pool.
        Returns:
            the part of `out` that was written; int32 without `out`.
        """
        if out is None:
            return self._core.labels()
        if out.ndim != 1 or len(out) < len(self) or out.dtype not in (np.uint8, np.int32, np.int64):
            raise ValueError(
                f"out must be {len(self)} or more uint8, int32 or int64 in one dimension, got {out.dtype} of "
                f"shape {out.shape}"
            )
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise ValueError("out must be contiguous and writable")
        return out[: self._core.labels_into(out)]

    def quantile_sizes(self) -> Ints:
        """(K,) how many samples each quantile holds now, the worst first."""
        return self._core.quantile_sizes()

    @property
    def thresholds(self) -> Floats:
        """(K - 1,) ascending: thresholds[k] is the least reward that reaches quantile k + 1.

        Rewards of the pool, never interpolated. NaN where none of them is enough: an empty pool; with
        ties="same" a pool of one reward, which is in the middle; else remainder="last" with fewer samples
        than quantiles.
        """
        return self._core.thresholds()[::-1].copy()

    def __getitem__(self, ids: int | npt.ArrayLike) -> RolloutBatch:
        """The samples with these ids, in this order. KeyError for an id that is not in the pool."""
        wanted = _as_ints("ids", ids)
        with self._reading:
            unknown = wanted[(wanted < 0) | (wanted >= len(self))]
            if len(unknown):
                raise KeyError(f"sample {unknown[0]} is not in the pool")
            return self._batch(wanted, *self._core.look_up(wanted))

    def _batch(self, ids: Ints, rewards: Floats, quantiles: Ints) -> RolloutBatch:
        return RolloutBatch(ids, *self._store.look_up(ids), rewards, quantiles, self._rounds.of(ids))

    def __repr__(self) -> str:
        parts = [f"{len(self):,} samples", f"{self.quantiles} quantiles"]
        if len(self):
            rewards = self.rewards
            parts.append(f"rewards {rewards.min():.4g} to {rewards.max():.4g}")
            parts.append(f"rounds {self.rounds.min()} to {self.rounds.max()}")
        if self.unscored:
            parts.append(f"{self.unscored:,} unscored")
        settings = [f"{name}={value!r}" for name, value in self.settings.items() if name != "quantiles"]
        if self._store.folder is not None:
            settings.append(f"store={str(self._store.folder)!r}")
        return f"RolloutPool({', '.join(parts)}; {', '.join(settings)})"

    # --- adding to it ------------------------------------------------------------------------

    def add(
        self,
        prompts: IdRows,
        completions: IdRows,
        rewards: npt.ArrayLike | Sequence[float | None],
        round: int | None = None,
    ) -> Ints:
        """Add scored samples.

        Args:
            prompts, completions: token ids, one row per sample, each of its own length (or (n, length)).
            rewards: higher is better; None, NaN or masked (of numpy's masked arrays): not scored, left out
                and counted.
            round: when they were made; None: the newest round so far.
        Returns:
            (n,) ids, -1 where the sample was left out.
        """
        values = _as_rewards(rewards, np.dtype(self.settings["dtype"]))
        scored = ~np.isnan(values)
        prompt_rows = pack("prompts", prompts, scored)
        completion_rows = pack("completions", completions, scored)
        with self._writing:
            made_in = self._newest_round if round is None else saved.round_number(round)
            first_id, n = len(self), len(prompt_rows)
            before = self._store.segments, self._rounds.changes
            try:
                # The sample before its reward: whatever the core can draw can then be looked up.
                self._store.append(Segment(first_id, prompt_rows, completion_rows))
                if n:
                    self._rounds.append(first_id, made_in)
                ids = self._core.add(values)
            finally:
                # Ctrl-C may come when the core has the samples already: then they are whole, and stay.
                if len(self) > first_id:
                    self._newest_round = max(self._newest_round, made_in) if first_id else made_in
                else:
                    self._store.segments, self._rounds.changes = before
            self.unscored += len(values) - n
        return ids

    # --- drawing from it ---------------------------------------------------------------------

    def sample(self, n: int, *, quantiles: int | Sequence[int] | None = None) -> RolloutBatch:
        """Draw n samples with replacement, uniformly from the whole pool or from some of its quantiles.

        The same state of the pool gives the same draw on every platform.

        Args:
            quantiles: one or more of 0 (worst) .. K - 1 (best); None: all.
        Raises:
            ValueError: nothing to draw from.
        """
        n = _whole("n", n, 0, 2**63 - 1)
        chosen: list[int] = []
        if quantiles is not None:
            chosen = _as_ints("quantiles", quantiles).tolist()
            if not chosen:
                raise ValueError("quantiles is empty; None draws from all of them")
            if wrong := [one for one in chosen if not 0 <= one < self.quantiles]:
                raise ValueError(f"quantiles are 0 (worst) to {self.quantiles - 1} (best), got {wrong[0]}")
        with self._reading:
            drawn = self._core.sample(n, chosen, _draw_key(self.settings["seed"], self._draws + 1))
            self._draws += 1  # a draw that is refused is none
            return self._batch(*drawn)

    def epoch(self, batch_size: int) -> Iterator[RolloutBatch]:
        """Every sample once, in random order, in batches (the last may be smaller).

        The order is a keyed permutation that is never written out. Samples added meanwhile wait for
        the next epoch. Quantiles are as of each batch.
        """
        batch_size = _whole("batch_size", batch_size, 1)
        with self._reading:
            self._draws += 1
            key, n = _draw_key(self.settings["seed"], self._draws), len(self)
        starts = range(0, n, batch_size)
        return (self[_C.permutation_slice(n, key, i, min(i + batch_size, n))] for i in starts)

    # --- several processes -------------------------------------------------------------------

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Use the exact quantiles of the union of all ranks' pools, until the pool changes.

        Every rank calls it. Afterwards thresholds, labels and draws of this rank's samples go by
        the union's boundaries; after a change whatever needs boundaries raises RuntimeError until
        sync(). With ties="arrival" the order among equal rewards is that of the ids, then of the
        ranks. In one process the union is this pool.
        """
        with self._writing:
            if dist.is_initialized() and dist.get_world_size(group) > 1:
                self._core.impose(*union_boundaries(self._core, self.settings, group))
            else:
                self._core.imposed = False

    # --- saving it ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The pool as numpy arrays and plain values; a pool restored from it draws the same.

        With store=FOLDER the samples are not in it, but the names of their files, which are then on disk.
        In a checkpoint of torch.save it takes torch.load(..., weights_only=False): its arrays are numpy's.
        """
        with self._writing:
            starts, rounds = self._rounds.changes
            return {
                "format": saved.FORMAT,
                "settings": dict(self.settings),
                "run_sizes": np.array(self._core.run_sizes, np.int64),
                "synced": self._core.imposed,
                "draws": self._draws,
                "unscored": self.unscored,
                "newest_round": self._newest_round,
                "rewards": self.rewards,
                "round_starts": starts.copy(),  # all arrays of a state are its own
                "rounds": rounds.copy(),
            } | saved.samples_state(self._store)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by a saved one. ValueError, and no change, if it does not fit.

        A pool that was synced asks to be synced again before it gives quantiles.
        """
        found = saved.parse(state, self.settings, self._store.folder)
        core = _new_core(self.settings)
        core.restore(found.rewards, found.run_sizes)
        core.imposed = found.synced
        with self._writing, self._reading:
            # Nothing is called here, so that no Ctrl-C comes between: the pool is the old or the new one.
            self._core, self._store, self._rounds = core, found.store, found.rounds
            self._newest_round, self._draws, self.unscored = found.newest_round, found.draws, found.unscored

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pool to a safetensors file: whole or not at all, even if the machine stops.

        With store=FOLDER that folder belongs to the file: move both together.
        """
        saved.write(Path(path), self.state_dict(), self._store.folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str], store: str | os.PathLike[str] | None = None) -> RolloutPool:
        """The pool that save() wrote, with its settings. ValueError if the file is not whole.

        Args:
            store: the folder of samples, if it is no longer where it was as seen from `path`; or a new one
                for the samples of a pool that held them in RAM.
        """
        state = saved.read(Path(path))
        try:
            if store is None and "store" in state:
                store = Path(path).parent / state["store"]
            # A file does not decide where folders are made.
            if "files" in state and store is not None and not Path(store).is_dir():
                raise ValueError(f"its folder of samples {store} is not there; name it by store=")
            pool = cls(**state["settings"], store=store)
            pool.load_state_dict(state)
        except (LookupError, TypeError, OverflowError, ValueError) as error:
            raise ValueError(f"{path} holds no sound pool: {error}") from error
        return pool


def _draw_key(seed: int, number: int) -> int:
    """64 random bits, from which the core makes the whole of that draw."""
    return _hash64("draw", seed, number)


def _new_core(settings: dict[str, Any]) -> _C.QuantilePool32:
    """An empty core of a pool with these settings."""
    ties, remainder = getattr(_C.Ties, settings["ties"]), getattr(_C.Remainder, settings["remainder"])
    seed = _hash64("ties", settings["seed"])
    return _CORES[settings["dtype"]](settings["quantiles"], ties, remainder, seed)


def _require_one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """As Python's int, also from numpy's."""
    try:
        number = int(operator.index(value))  # of True, too
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def _as_ints(name: str, values: Any) -> Ints:
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be integers in one dimension, got {values!r}")
    return array.astype(np.int64)


def _as_rewards(rewards: Any, dtype: np.dtype[Any]) -> Floats:
    """(n,) in the pool's dtype, a copy; None becomes NaN.

    Rewards are read several times, in the core without the GIL: meanwhile another thread may write to the
    caller's array.
    """
    if isinstance(rewards, list | tuple) and any(isinstance(one, torch.Tensor) for one in rewards):
        rewards = [one.item() if isinstance(one, torch.Tensor) else one for one in rewards]
    if isinstance(rewards, torch.Tensor):  # numpy has no bfloat16, and takes nothing that requires grad
        rewards = rewards.double().numpy(force=True)
    if isinstance(rewards, np.ma.MaskedArray):
        rewards = np.ma.filled(rewards.astype(np.float64), np.nan)
    if isinstance(rewards, np.ndarray) and rewards.dtype == dtype and rewards.ndim == 1:
        return rewards.copy()
    values = np.asarray(rewards, np.float64)
    if values.ndim != 1:
        raise ValueError(f"rewards must be one number per sample, got shape {values.shape}")
    with np.errstate(over="ignore", under="ignore"):
        cast_values: Floats = values.astype(dtype)
    lost = np.isinf(cast_values) & np.isfinite(values)
    if lost.any():
        raise ValueError(f"reward {values[lost][0]!r} is beyond {dtype}; use dtype='float64'")
    return cast_values


def _hash64(*values: object) -> int:
    """64 bits that are the same on every platform and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")
