"""Curves of any length, drawn from a few hundred points: each stretch gives its lowest and its highest value.

Every point is stored once; in levels above it, buckets of 32, 1024 and 32,768 points keep the extremes, so that a view
of a million points reads about as many rows as a view of a thousand. A curve's points are appended in the order of
time, and with it of rounds and tokens, so that each of the three can be the x axis.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FACTOR = 32
LEVELS = 3
POINT_AT = {  # by axis
    "time": "SELECT t FROM points WHERE curve = ? AND seq = ?",
    "round": "SELECT round FROM points WHERE curve = ? AND seq = ?",
    "tokens": "SELECT tokens FROM points WHERE curve = ? AND seq = ?",
}

SCHEMA = """
CREATE TABLE IF NOT EXISTS points (
    curve TEXT, seq INTEGER, key INTEGER, t REAL, round INTEGER, tokens REAL, value REAL,
    PRIMARY KEY (curve, seq)) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS points_by_key ON points (curve, key);
CREATE TABLE IF NOT EXISTS buckets (
    curve TEXT, level INTEGER, bucket INTEGER,
    low REAL, low_t REAL, low_round INTEGER, low_tokens REAL,
    high REAL, high_t REAL, high_round INTEGER, high_tokens REAL,
    PRIMARY KEY (curve, level, bucket)) WITHOUT ROWID;
"""

Row = tuple[float, int, float, float]  # t, round, tokens, value


@dataclass(frozen=True)
class Point:
    """One value of a curve. `key` is unique in the curve (a round, a second): the same one again is passed over."""

    key: int
    t: float  # Unix seconds
    round: int
    tokens: float
    value: float


def append(connection: sqlite3.Connection, curve: str, points: Iterable[Point]) -> int:
    """Add the points that are new; returns how many."""
    added = 0
    (seq,) = connection.execute(
        "SELECT COALESCE(MAX(seq) + 1, 0) FROM points WHERE curve = ?", (curve,)
    ).fetchone()
    for point in points:
        if not math.isfinite(point.value):
            continue
        row = (curve, seq, point.key, point.t, point.round, point.tokens, point.value)
        if not connection.execute("INSERT OR IGNORE INTO points VALUES (?, ?, ?, ?, ?, ?, ?)", row).rowcount:
            continue
        for level in range(1, LEVELS + 1):
            _widen(connection, curve, level, seq // FACTOR**level, point)
        seq += 1
        added += 1
    return added


def _widen(connection: sqlite3.Connection, curve: str, level: int, bucket: int, point: Point) -> None:
    place = (point.value, point.t, point.round, point.tokens)
    connection.execute(
        "INSERT INTO buckets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
        "low_t = IIF(excluded.low < low, excluded.low_t, low_t), "
        "low_round = IIF(excluded.low < low, excluded.low_round, low_round), "
        "low_tokens = IIF(excluded.low < low, excluded.low_tokens, low_tokens), "
        "low = MIN(low, excluded.low), "
        "high_t = IIF(excluded.high > high, excluded.high_t, high_t), "
        "high_round = IIF(excluded.high > high, excluded.high_round, high_round), "
        "high_tokens = IIF(excluded.high > high, excluded.high_tokens, high_tokens), "
        "high = MAX(high, excluded.high)",
        (curve, level, bucket, *place, *place),
    )


def read(
    connection: sqlite3.Connection,
    curve: str,
    *,
    axis: str = "time",
    start: float = -math.inf,
    end: float = math.inf,
    max_points: int = 800,
) -> list[Row]:
    """At most `max_points` points of the stretch from `start` to `end` on that axis, in order, with every extreme of
    its buckets; the points themselves where they are few enough."""
    first, last = _seq_at(connection, curve, axis, start), _seq_at(connection, curve, axis, end, after=True)
    num, level = last - first, 0
    while level < LEVELS and num / FACTOR**level > 8 * max_points:
        level += 1
    if level == 0:
        rows: list[Row] = connection.execute(
            "SELECT t, round, tokens, value FROM points WHERE curve = ? AND seq >= ? AND seq < ? ORDER BY seq",
            (curve, first, last),
        ).fetchall()
    else:
        rows = _extremes(connection, curve, level, first // FACTOR**level, -(-last // FACTOR**level))
    return thin(rows, max_points)


def _extremes(connection: sqlite3.Connection, curve: str, level: int, first: int, last: int) -> list[Row]:
    found = connection.execute(
        "SELECT low_t, low_round, low_tokens, low, high_t, high_round, high_tokens, high FROM buckets "
        "WHERE curve = ? AND level = ? AND bucket >= ? AND bucket < ? ORDER BY bucket",
        (curve, level, first, last),
    )
    rows: list[Row] = []
    for bucket in found:
        low, high = bucket[:4], bucket[4:]
        rows += [low] if low == high else sorted((low, high))
    return rows


def thin(rows: Sequence[Row], max_points: int) -> list[Row]:
    """At most `max_points` of the rows: of each of equal stretches the lowest and the highest, in order."""
    if len(rows) <= max_points:
        return list(rows)
    stretches, kept = max(1, max_points // 2), []
    for index in range(stretches):
        part = rows[index * len(rows) // stretches : (index + 1) * len(rows) // stretches]
        low, high = min(part, key=lambda row: row[3]), max(part, key=lambda row: row[3])
        kept += [low] if low is high else sorted((low, high), key=lambda row: row[:3])
    return kept


def _seq_at(connection: sqlite3.Connection, curve: str, axis: str, x: float, *, after: bool = False) -> int:
    """The first point at or beyond `x` (with `after`: beyond `x`), by bisection: the axis grows with the sequence."""
    count = "SELECT COALESCE(MAX(seq) + 1, 0) FROM points WHERE curve = ?"
    low, high = 0, int(connection.execute(count, (curve,)).fetchone()[0])
    if x == -math.inf:
        return 0
    if x == math.inf:
        return high
    query = POINT_AT[axis]
    while low < high:
        middle = (low + high) // 2
        (value,) = connection.execute(query, (curve, middle)).fetchone()
        if value < x or (after and value == x):
            low = middle + 1
        else:
            high = middle
    return low


def last(connection: sqlite3.Connection, curve: str) -> tuple[int, float] | None:
    """(round, value) of a curve's newest point."""
    query = "SELECT round, value FROM points WHERE curve = ? ORDER BY seq DESC LIMIT 1"
    found = connection.execute(query, (curve,)).fetchone()
    return None if found is None else (int(found[0]), float(found[1]))
