"""One worker's account in the history: its rounds, its bytes, and the bytes of an all-reduce beside them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from dtrain.experiments.dashboard_history import add_lane, rows
from dtrain.experiments.dashboard_rows import About
from dtrain.experiments.dashboard_text import MAX_NAME, clean_line
from dtrain.trainer.bulletin import BulletinView, RoundLine

FP32_BYTES = 4


@dataclass
class Account:
    """A row of the table `workers`. A worker's own counters begin anew with each start of it: what they held before is
    in `past_...`. What it sent before the history began is in `base_up`, as nothing can be held against it."""

    peer_id: str
    name: str
    row: dict[str, Any]

    @classmethod
    def of(cls, db: sqlite3.Connection, peer_id: str) -> Account | None:
        """None for a worker that was never seen."""
        found = rows(db, "SELECT * FROM workers WHERE peer_id = ?", peer_id)
        return cls(peer_id, clean_line(found[0]["name"], MAX_NAME), found[0]) if found else None

    @property
    def contributions(self) -> int:
        return int(self.row["past_contributions"] + self.row["contributions"])

    def enter(
        self, db: sqlite3.Connection, bulletin: BulletinView, about: About, history_began: float
    ) -> list[RoundLine]:
        """Take in a bulletin; returns the rounds that are new."""
        if bulletin.since < self.row["since"] - 1:
            return []  # from before its last start
        self._count(bulletin, history_began)
        new = [line for line in bulletin.rounds if add_lane(db, self.peer_id, line)]
        counted = (line for line in new if line.round > self.row["base_round"])
        self.row["allreduce_bytes"] += sum(allreduce_bytes(line, about) for line in counted)
        db.execute(
            "UPDATE workers SET since = :since, up = :up, down = :down, contributions = :contributions, "
            "past_contributions = :past_contributions, past_up = :past_up, past_down = :past_down, "
            "base_up = :base_up, base_round = :base_round, allreduce_bytes = :allreduce_bytes "
            "WHERE peer_id = :peer_id",
            self.row,
        )
        return new

    def _count(self, bulletin: BulletinView, history_began: float) -> None:
        row = self.row
        if not row["since"]:
            if bulletin.since < history_began:
                row["base_up"] = bulletin.up
                row["base_round"] = max((line.round for line in bulletin.rounds), default=0)
        elif bulletin.since > row["since"] + 1:
            for name in ("contributions", "up", "down"):
                row[f"past_{name}"] += row[name]
        row.update(since=bulletin.since, up=bulletin.up, down=bulletin.down)
        row["contributions"] = bulletin.contributions


def allreduce_bytes(line: RoundLine, about: About) -> float:
    """What an fp32 ring all-reduce after each of the round's inner steps would have had this worker send.

    In a ring of N each worker sends 2 (N - 1) / N of the tensor. A worker alone needs no traffic either way.
    """
    if not line.included or line.group < 2 or not about.tokens_per_step:
        return 0.0
    steps = line.tokens / about.tokens_per_step
    return 2 * (line.group - 1) / line.group * FP32_BYTES * about.num_params * steps
