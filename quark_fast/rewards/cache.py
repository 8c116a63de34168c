"""Rewards that are known already, in one SQLite file that survives whatever ends the process."""

from __future__ import annotations

import functools
import math
import sqlite3
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from quark_fast.errors import UsageError

KEYS = 500  # in one query; SQLite takes at least 999


class RewardCache:
    """sha256 of (scorer, text) -> reward, float64; NaN: the scorer left the sample out.

    Every ``add`` is a transaction: a killed process leaves all those that had returned, and no half one. The
    file is made with the first use. Several threads and processes may use it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._one_at_a_time = threading.RLock()

    @functools.cached_property
    def _database(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        weakref.finalize(self, database.close)
        # The log is appended to by each transaction and not flushed: only a power cut loses the last of them.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA trusted_schema = OFF")  # no function of its own views and triggers is called
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS rewards (key BLOB PRIMARY KEY, value) WITHOUT ROWID")
        return database

    def find(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """Those of the keys that are known, with their rewards."""
        found: dict[bytes, float] = {}
        try:
            for start in range(0, len(keys), KEYS):
                part = keys[start : start + KEYS]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, value FROM rewards WHERE key IN ({marks})"
                with self._one_at_a_time:
                    found |= {k: math.nan if v is None else v for k, v in self._database.execute(query, part)}
        except (sqlite3.Error, OverflowError) as error:
            raise self._broken(error) from error
        for value in found.values():  # a column of SQLite holds anything
            if not isinstance(value, float) or math.isinf(value):
                raise self._broken(f"it holds {value!r:.80} for a reward")
        return found

    def add(self, rewards: Mapping[bytes, float]) -> None:
        """Keep these; a key that is known keeps the value it has."""
        rows = [(key, None if math.isnan(value) else value) for key, value in rewards.items()]
        try:
            with self._one_at_a_time, self._database:
                self._database.executemany("INSERT OR IGNORE INTO rewards VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _broken(self, error: object) -> UsageError:
        return UsageError(
            f"the reward cache {self.path} cannot be used ({error}); delete it, or pass --reward-cache off"
        )
