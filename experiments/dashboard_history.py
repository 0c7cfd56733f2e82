"""What the dashboard remembers of a run, in one SQLite file. Writing something again changes nothing, so that a restart
leaves neither gaps nor duplicates."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.experiments import dashboard_curves as curves
from dtrain.trainer.bulletin import RoundLine
from dtrain.trainer.errors import UsageError

KEPT_EVENTS = 20_000
KEPT_LANES = 200_000

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS workers (
    peer_id TEXT PRIMARY KEY, name TEXT, device TEXT, first_seen REAL, last_seen REAL, live INTEGER,
    since REAL DEFAULT 0, tokens REAL DEFAULT 0, contributions INTEGER DEFAULT 0,
    up INTEGER DEFAULT 0, down INTEGER DEFAULT 0,           -- by the worker's own counters, since its last start
    past_contributions INTEGER DEFAULT 0, past_up INTEGER DEFAULT 0, past_down INTEGER DEFAULT 0,  -- before that
    base_up INTEGER DEFAULT 0, base_round INTEGER DEFAULT 0,  -- where our own account of it begins
    allreduce_bytes REAL DEFAULT 0);
CREATE TABLE IF NOT EXISTS lanes (
    round INTEGER, peer_id TEXT, compute_s REAL, wait_s REAL, exchange_s REAL, apply_s REAL,
    contributors INTEGER, included INTEGER, loss REAL, tokens INTEGER, PRIMARY KEY (round, peer_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, key TEXT UNIQUE, at REAL, kind TEXT, peer_id TEXT, name TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS samples (
    round INTEGER PRIMARY KEY, at REAL, peer_id TEXT, prompt TEXT, text TEXT);
"""


@dataclass(frozen=True)
class Event:
    """Something that happened; `key` tells it from all others."""

    key: str
    at: float  # Unix seconds
    kind: str  # joined, left, gone, paused, resumed, problem, resync, digest, dashboard
    peer_id: str
    name: str
    text: str


class History:
    """Write through `transaction`, from one thread; read through `reader`, from any."""

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = connect(path)
            self._writer.executescript(SCHEMA + curves.SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"cannot keep the history in {path}: {error}; type --folder with a folder you own"
            ) from None
        self._lock = threading.Lock()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is written, or nothing."""
        with self._lock, self._writer:
            yield self._writer

    @contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of the calling thread's own; it never waits for the writer."""
        connection = connect(self.path)
        try:
            yield connection
        finally:
            connection.close()

    def meta(self, key: str) -> str:
        with self._lock:
            found = self._writer.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return "" if found is None else str(found[0])

    def set_meta(self, key: str, value: str) -> None:
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def close(self) -> None:
        with self._lock:
            self._writer.close()


def connect(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode: readers and the writer do not wait for each other."""
    connection = sqlite3.connect(path, check_same_thread=False, timeout=10.0)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def open_history(folder: Path, manifest_hash: str) -> History:
    """The history of that run. One of another run of the same name is put aside under its hash."""
    path = folder / "history.sqlite"
    history = History(path)
    known = history.meta("manifest_hash")
    if known and manifest_hash and known != manifest_hash:
        history.close()
        for end in ("", "-wal", "-shm"):
            if (folder / f"history.sqlite{end}").exists():
                os.replace(folder / f"history.sqlite{end}", folder / f"history-{known[:8]}.sqlite{end}")
        history = History(path)
    if manifest_hash:
        history.set_meta("manifest_hash", manifest_hash)
    return history


def add_event(connection: sqlite3.Connection, event: Event) -> bool:
    """Whether it was new."""
    return bool(
        connection.execute(
            "INSERT OR IGNORE INTO events (key, at, kind, peer_id, name, text) VALUES (?, ?, ?, ?, ?, ?)",
            (event.key, event.at, event.kind, event.peer_id, event.name, event.text),
        ).rowcount
    )


def add_lane(connection: sqlite3.Connection, peer_id: str, line: RoundLine) -> bool:
    """Whether it was new."""
    loss = line.loss if line.loss == line.loss else None  # NaN is no value of SQL's
    values = (line.compute_s, line.wait_s, line.exchange_s, line.apply_s, line.group, int(line.included))
    return bool(
        connection.execute(
            "INSERT OR IGNORE INTO lanes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (line.round, peer_id, *values, loss, line.tokens),
        ).rowcount
    )


def prune(connection: sqlite3.Connection) -> None:
    """Keep the file from growing without end; curves and contributors are kept for good."""
    connection.execute("DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (KEPT_EVENTS,))
    connection.execute(
        "DELETE FROM lanes WHERE (SELECT COUNT(*) FROM lanes) > ? "
        "AND round < (SELECT MAX(round) FROM lanes) - 2000",
        (KEPT_LANES,),
    )


def rows(connection: sqlite3.Connection, query: str, *values: Any) -> list[dict[str, Any]]:
    """The query's rows as dictionaries."""
    cursor = connection.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row)) for row in cursor.fetchall()]
