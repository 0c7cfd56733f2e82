"""A run as it is watched: heartbeats and bulletins go in, the history and a snapshot come out.

Nothing here is made up or smoothed: what no peer has said is 0 or absent, and the page says so.
"""

from __future__ import annotations

import itertools
import sqlite3
import statistics
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dtrain.experiments import dashboard_curves as curves
from dtrain.experiments import dashboard_reads as reads
from dtrain.experiments.dashboard_account import Account
from dtrain.experiments.dashboard_health import judge
from dtrain.experiments.dashboard_history import Event, History, add_event, prune, rows
from dtrain.experiments.dashboard_rows import About, Snapshot, WorkerRow
from dtrain.experiments.dashboard_text import MAX_NAME, clean_block, clean_line, number
from dtrain.trainer.bulletin import BulletinView, RoundLine, Sample

MAX_WORKERS = 2000  # heartbeats beyond that are passed over
SHOWN_GONE_S = 60.0  # how long a worker that is gone stays in the table
SPEED_PERIOD_S = 5
DIGEST_SHOWN = 12  # characters
KEPT_COMPLETIONS = 12
SETTLE_S = 6.0  # how long a round's training loss waits for the last worker's bulletin
LEFT = ("leaving", "gone", "finished")
ENDED = "stopped"  # said by the network process of a worker that ended without a word


class View(Protocol):
    """Another peer's heartbeat; see `dtrain.trainer.exchange.PeerView`."""

    @property
    def peer_id(self) -> str: ...

    @property
    def status(self) -> Mapping[str, object]: ...

    @property
    def age_s(self) -> float: ...


@dataclass
class Peer:
    """What is known of one worker; `row` is what is shown."""

    row: WorkerRow
    seen: float  # Unix seconds of its last heartbeat
    gone: bool = False
    goodbye: bool = False
    tokens_per_s: float = 0.0  # over its last round, waits included; 0 until its bulletin tells of one


@dataclass
class RunState:
    """One run's state and history. Called from one thread."""

    about: About
    history: History
    peers: dict[str, Peer] = field(default_factory=dict)
    tokens: int = 0
    round: int = 0
    completions: deque[tuple[int, float, int]] = field(default_factory=lambda: deque(maxlen=KEPT_COMPLETIONS))
    _work: dict[int, int] = field(default_factory=dict)  # round -> tokens in theta's history
    _open_rounds: dict[int, tuple[float, dict[str, RoundLine]]] = field(default_factory=dict)
    began: float = field(default_factory=time.time)  # Unix seconds; of the history, if there is one
    _num_read: int = 0
    _opened: float = field(default_factory=time.time)  # of this process

    def __post_init__(self) -> None:
        with self.history.transaction() as db:
            kept = rows(db, "SELECT * FROM workers WHERE live = 1")
            self.round, self.tokens = reads.stand(db)
        self._was_live = {worker["peer_id"]: worker["name"] for worker in kept}
        known = self.history.meta("began")
        self.began = float(known) if known else self.began
        self.history.set_meta("began", str(self.began))

    # ------------------------------------------------------------------ what comes in

    def hear(self, views: Sequence[View], mine: Collection[str], now: float) -> None:
        """Take in everybody's heartbeat."""
        with self.history.transaction() as db:
            for view in views[:MAX_WORKERS]:
                self._hear_one(db, view, view.peer_id in mine, now)
            self._share()
            self._miss({view.peer_id for view in views}, db, now)
            self._speed(db, now)
            self._settle(db, now)

    def _hear_one(self, db: sqlite3.Connection, view: View, mine: bool, now: float) -> None:
        before = self.peers.get(view.peer_id)
        row = self._row(view, mine, before)
        if row.state in LEFT:
            if before is not None and not before.goodbye:
                before.goodbye = True
                if row.state == "gone":
                    self._event(db, "gone", row, f"{row.name} dropped out: its process ended", now)
                else:
                    self._event(db, "left", row, f"{row.name} left the run", now)
            if before is None or before.gone:
                return  # an old heartbeat of one that was gone before we came
        elif before is None or before.gone:
            self._arrive(db, row, now)
        elif (row.state == "paused") != (before.row.state == "paused"):
            kind = "paused" if row.state == "paused" else "resumed"
            self._event(db, kind, row, f"{row.name} {'is paused' if kind == 'paused' else 'goes on'}", now)
        speed = before.tokens_per_s if before is not None else 0.0
        peer = Peer(row, now - view.age_s, goodbye=row.state in LEFT, tokens_per_s=speed)
        self.peers[view.peer_id] = peer
        self._advance(row, int(number(view.status.get("work"))), now)
        db.execute(
            "INSERT INTO workers (peer_id, name, device, first_seen, last_seen, live, tokens) "
            "VALUES (?, ?, ?, ?, ?, 1, ?) ON CONFLICT DO UPDATE SET name = excluded.name, "
            "device = excluded.device, last_seen = excluded.last_seen, live = 1, "
            "tokens = MAX(tokens, excluded.tokens)",
            (row.id, row.name, row.device, now, peer.seen, row.tokens),
        )

    def _row(self, view: View, mine: bool, before: Peer | None) -> WorkerRow:
        said = view.status
        name = clean_line(said.get("name"), MAX_NAME) or view.peer_id[-8:]
        round = int(number(said.get("round")))
        fields: dict[str, Any] = {
            "name": name,
            "device": clean_line(said.get("device"), MAX_NAME),
            "state": "gone" if said.get("state") == ENDED else clean_line(said.get("state"), 20),
            "reach": clean_line(said.get("reach"), 20),
            "round": round,
            "lag": max(0, self.round - round),
            "loss": number(said.get("loss")),
            "tokens": int(number(said.get("tokens"))),
            "tokens_per_s": number(said.get("tokens_per_s")),
            "round_share": min(1.0, number(said.get("compute_share"))),
            "digest": clean_line(said.get("digest"))[:DIGEST_SHOWN],
            "age_s": max(0.0, view.age_s),
            "mine": mine,
        }
        if before is not None and before.tokens_per_s:
            fields["tokens_per_s"] = before.tokens_per_s  # what it says itself begins anew with each round
        if fields["state"] in ("paused", *LEFT):
            fields["tokens_per_s"] = 0.0
        if before is not None:
            return replace(before.row, **fields)
        return WorkerRow(
            id=clean_line(view.peer_id, 80), share=0.0, up_bytes=0, down_bytes=0, contributions=0, **fields
        )

    def _arrive(self, db: sqlite3.Connection, row: WorkerRow, now: float) -> None:
        if self._was_live.pop(row.id, None) is None:
            self._event(db, "joined", row, f"{row.name} joined the run", now)

    def _advance(self, row: WorkerRow, work: int, now: float) -> None:
        """The run is as far as its foremost worker."""
        self._work.setdefault(row.round, work)
        if len(self._work) > 500:
            del self._work[min(self._work)]
        self.tokens = max(self.tokens, work)
        if row.round > self.round:
            self.round = row.round
            self.completions.append((row.round, now, work))

    def _share(self) -> None:
        total = sum(peer.row.tokens_per_s for peer in self.peers.values() if not peer.gone)
        for peer in self.peers.values():
            share = peer.row.tokens_per_s / total if total and not peer.gone else 0.0
            peer.row = replace(peer.row, share=share, lag=max(0, self.round - peer.row.round))

    def _miss(self, there: set[str], db: sqlite3.Connection, now: float) -> None:
        """Who has gone, with or without a goodbye; also while this dashboard was away."""
        for peer_id, peer in list(self.peers.items()):
            if peer_id in there:
                continue
            if not peer.gone:
                peer.gone = True
                has_left = peer.goodbye and peer.row.state != "gone"
                peer.row = replace(
                    peer.row, state="left" if has_left else "gone", tokens_per_s=0.0, share=0.0
                )
                db.execute("UPDATE workers SET live = 0 WHERE peer_id = ?", (peer_id,))
                if not peer.goodbye:
                    text = f"{peer.row.name} dropped out: no heartbeat for {self.about.heartbeat_ttl_s:.0f} s"
                    self._event(db, "gone", peer.row, text, now)
            peer.row = replace(peer.row, age_s=now - peer.seen)
            if now - peer.seen > SHOWN_GONE_S:
                del self.peers[peer_id]
        if self._was_live and now - self._opened > self.about.heartbeat_ttl_s:
            for peer_id, name in self._was_live.items():
                row = WorkerRow(
                    peer_id, name, "", "gone", "", 0, 0, 0.0, 0, 0.0, 0.0, 0, 0, 0, 0.0, "", 0.0, False
                )
                self._event(db, "gone", row, f"{name} went while this dashboard was away", now)
                db.execute("UPDATE workers SET live = 0 WHERE peer_id = ?", (peer_id,))
            self._was_live = {}

    # ------------------------------------------------------------------ bulletins

    def read(self, bulletins: Mapping[str, BulletinView], samples: Mapping[str, Sample], now: float) -> None:
        """Take in everybody's bulletin and the newest sample."""
        self._num_read += 1
        with self.history.transaction() as db:
            for peer_id, bulletin in list(bulletins.items())[:MAX_WORKERS]:
                self._read_one(db, peer_id, bulletin, now)
            for peer_id, sample in samples.items():
                values = (sample.round, now, peer_id, clean_block(sample.prompt), clean_block(sample.text))
                db.execute("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?)", values)
            self._settle(db, now)
            prune(db)

    def _read_one(self, db: sqlite3.Connection, peer_id: str, bulletin: BulletinView, now: float) -> None:
        account = Account.of(db, peer_id)
        if account is None:
            return  # its heartbeat was never seen: gone before we came
        new = account.enter(db, bulletin, self.about, self.began)
        for line in new:
            self._open_rounds.setdefault(line.round, (now, {}))[1][peer_id] = line
        if peer_id in self.peers:
            peer, total = self.peers[peer_id], account.contributions
            if bulletin.rounds:
                peer.tokens_per_s = bulletin.rounds[-1].tokens_per_s
            refused = {clean_line(reason): count for reason, count in bulletin.refused.items()}
            peer.row = replace(
                peer.row,
                up_bytes=bulletin.up,
                down_bytes=bulletin.down,
                contributions=total,
                refused=refused,
            )
        for event in bulletin.events:
            kind = event.kind if event.kind in ("problem", "resync") else "problem"
            key = f"{kind}:{peer_id}:{event.at}"
            text = f"{account.name}: {clean_line(event.text)}"
            add_event(db, Event(key, min(event.at, now), kind, peer_id, account.name, text))
        for evaluation in bulletin.evals:
            self._point(db, "eval_loss", evaluation.round, evaluation.loss, now)

    # ------------------------------------------------------------------ curves

    def _settle(self, db: sqlite3.Connection, now: float) -> None:
        """A round's points are written once all its contributors have told of it, or have had the time to."""
        for round in sorted(self._open_rounds):
            since, lines = self._open_rounds[round]
            if len(lines) < max(line.group for line in lines.values()) and now - since < SETTLE_S:
                continue
            del self._open_rounds[round]
            told = [line for line in lines.values() if line.loss == line.loss and line.tokens]
            tokens = sum(line.tokens for line in told)
            if tokens:
                mean = sum(line.loss * line.tokens for line in told) / tokens
                self._point(db, "train_loss", round, mean, now)
            self._point(db, "contributors", round, float(max(line.group for line in lines.values())), now)
            exchange_s = max(line.wait_s + line.exchange_s for line in lines.values())
            self._point(db, "exchange_s", round, exchange_s, now)

    def _point(self, db: sqlite3.Connection, curve: str, round: int, value: float, now: float) -> None:
        tokens = self._work.get(round, self.tokens)
        curves.append(db, curve, [curves.Point(round, now, round, float(tokens), value)])

    def _speed(self, db: sqlite3.Connection, now: float) -> None:
        key = int(now) // SPEED_PERIOD_S
        speed = self.tokens_per_s()
        if self.peers and (speed or any(not peer.gone for peer in self.peers.values())):
            point = curves.Point(key, now, self.round, float(self.tokens), speed)
            curves.append(db, "tokens_per_s", [point])

    def tokens_per_s(self) -> float:
        """Of the whole swarm: what went into theta over the last rounds; before two of them what the workers say."""
        recent = [completion for completion in self.completions][-6:]
        if len(recent) >= 2 and recent[-1][1] > recent[0][1] and self.is_alive:
            return (recent[-1][2] - recent[0][2]) / (recent[-1][1] - recent[0][1])
        return sum(peer.row.tokens_per_s for peer in self.peers.values() if not peer.gone)

    @property
    def is_alive(self) -> bool:
        return any(not peer.gone and peer.row.state not in LEFT for peer in self.peers.values())

    def round_s(self) -> float:
        """Median seconds per round of the last ones; 0 before two are known."""
        pairs = list(self.completions)
        spans = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(pairs) if b[0] > a[0]]
        return statistics.median(spans) if spans else 0.0

    def _event(self, db: sqlite3.Connection, kind: str, row: WorkerRow, text: str, now: float) -> None:
        add_event(db, Event(f"{kind}:{row.id}:{now:.3f}", now, kind, row.id, row.name, text))

    # ------------------------------------------------------------------ the snapshot

    def snapshot(self, now: float, connection: str = "") -> Snapshot:
        """What the page shows now."""
        with self.history.reader() as db:
            lanes = reads.lanes(db)
            return Snapshot(
                at=now,
                about=self.about,
                health=judge(self.about, self.workers(), list(self.completions), self.round_s(), lanes, now),
                connection=connection,
                eval_loss=curves.last(db, "eval_loss"),
                train_loss=curves.last(db, "train_loss"),
                tokens=self.tokens,
                tokens_per_s=self.tokens_per_s(),
                eta_s=self._eta_s(),
                sample=reads.sample(db),
                workers=self.workers(),
                rounds=lanes,
                traffic=reads.traffic(db),
                board=reads.board(db, {row.id for row in self.workers() if row.mine}),
                events=reads.events(db),
            )

    def fingerprint(self) -> tuple[object, ...]:
        """Changes with whatever is worth a new snapshot at once: not the ages, which pass by themselves."""
        shown = (replace(peer.row, age_s=0.0) for peer in self.peers.values())
        return self.round, self._num_read, *shown

    def workers(self) -> list[WorkerRow]:
        return sorted((peer.row for peer in self.peers.values()), key=lambda row: (row.name, row.id))

    def _eta_s(self) -> float | None:
        if not self.about.target_rounds or not self.round_s() or not self.is_alive:
            return None
        return max(0, self.about.target_rounds - self.round) * self.round_s()
