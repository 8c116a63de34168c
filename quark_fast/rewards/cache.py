"""Rewards that are known already, in one SQLite file that survives whatever ends the process."""

from __future__ import annotations

import functools
import math
import sqlite3
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from quark_fast.errors import OutOfResources, UsageError

KEYS = 500  # in one query; SQLite takes at least 999
PATIENCE = 60  # seconds to wait for another process


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
        database = sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False)
        weakref.finalize(self, database.close)
        _write_ahead(database)
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

    def forget_unscored(self) -> None:
        """Have the samples that scorers left out asked again."""
        try:
            with self._one_at_a_time, self._database:
                self._database.execute("DELETE FROM rewards WHERE value IS NULL")
        except sqlite3.Error as error:
            raise self._broken(error) from error

    def _broken(self, error: object) -> UsageError | OutOfResources:
        what = f"the reward cache {self.path} cannot be used ({error})"
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
        if code in _DISK:
            return OutOfResources(
                f"{what}; what it holds is kept: fix that, then go on with --resume, or evaluate again"
            )
        if code in _BUSY:
            return UsageError(f"{what}: another process is at work on it; wait for that, then go on")
        return UsageError(f"{what}; delete it, and what it held is asked for again")


_DISK = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _write_ahead(database: sqlite3.Connection) -> None:
    """Have transactions appended to a log, not flushed: only a power cut loses the last of them.

    Processes that make a new file together may find it busy, and SQLite's own time-out does not hold here.
    """
    last = time.monotonic() + PATIENCE
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _BUSY or time.monotonic() > last:
                raise
            time.sleep(0.05)
