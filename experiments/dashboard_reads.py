"""What the run page shows out of the history."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

from dtrain.experiments.dashboard_history import rows
from dtrain.experiments.dashboard_rows import (
    Contributor,
    EventRow,
    Lane,
    RoundLanes,
    SampleRow,
    Traffic,
)

SHOWN_ROUNDS, SHOWN_EVENTS, SHOWN_BOARD = 3, 30, 20


def stand(db: sqlite3.Connection) -> tuple[int, int]:
    """(rounds, tokens) that the run had when the history ended."""
    newest = "SELECT round, tokens FROM points WHERE curve = ? ORDER BY seq DESC LIMIT 1"
    found = [db.execute(newest, (curve,)).fetchone() for curve in ("train_loss", "tokens_per_s", "eval_loss")]
    known = [row for row in found if row is not None]
    return max((row[0] for row in known), default=0), int(max((row[1] for row in known), default=0))


def sample(db: sqlite3.Connection) -> SampleRow | None:
    """The text of the newest theta that wrote any."""
    found = rows(
        db,
        "SELECT samples.*, workers.name FROM samples LEFT JOIN workers USING (peer_id) "
        "ORDER BY round DESC LIMIT 1",
    )
    if not found:
        return None
    newest = found[0]
    return SampleRow(newest["round"], newest["at"], newest["name"] or "", newest["prompt"], newest["text"])


def lanes(db: sqlite3.Connection) -> list[RoundLanes]:
    """The timelines of the last rounds, newest first."""
    found = rows(
        db,
        "SELECT lanes.*, workers.name FROM lanes LEFT JOIN workers USING (peer_id) WHERE round IN "
        "(SELECT DISTINCT round FROM lanes ORDER BY round DESC LIMIT ?) ORDER BY round DESC, name, peer_id",
        SHOWN_ROUNDS,
    )
    shown: dict[int, list[Lane]] = {}
    for row in found:
        times = (row["compute_s"], row["wait_s"], row["exchange_s"], row["apply_s"])
        lane = Lane(row["peer_id"], row["name"] or "", *times, bool(row["included"]))
        shown.setdefault(row["round"], []).append(lane)
    return [RoundLanes(round, list(of_round)) for round, of_round in shown.items()]


def traffic(db: sqlite3.Connection) -> Traffic:
    """All workers' bytes, over all their starts."""
    up, down, counted, allreduce = db.execute(
        "SELECT COALESCE(SUM(past_up + up), 0), COALESCE(SUM(past_down + down), 0), "
        "COALESCE(SUM(past_up + up - base_up), 0), COALESCE(SUM(allreduce_bytes), 0) FROM workers"
    ).fetchone()
    return Traffic(up, down, counted, allreduce, allreduce / counted if counted and allreduce else None)


def board(db: sqlite3.Connection, mine: Collection[str]) -> list[Contributor]:
    """Who gave most."""
    found = rows(
        db,
        "SELECT *, past_contributions + contributions AS rounds FROM workers ORDER BY tokens DESC LIMIT ?",
        SHOWN_BOARD,
    )
    return [
        Contributor(
            id=row["peer_id"],
            name=row["name"],
            tokens=int(row["tokens"]),
            contributions=row["rounds"],
            first_seen=row["first_seen"],
            live=bool(row["live"]),
            mine=row["peer_id"] in mine,
        )
        for row in found
    ]


def events(db: sqlite3.Connection, before: int = 2**62, limit: int = SHOWN_EVENTS) -> list[EventRow]:
    """The last events below an id, newest first."""
    found = rows(db, "SELECT * FROM events WHERE id < ? ORDER BY id DESC LIMIT ?", before, limit)
    return [EventRow(row["id"], row["at"], row["kind"], row["name"], row["text"]) for row in found]
