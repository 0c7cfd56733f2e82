"""Who is there: each worker's heartbeat, and this peer's view of all the others'.

A signed record in the DHT tells that a worker exists and where; it is stored now and then and read by whoever looks for
others. What a worker is doing it tells those who know it directly (`dht/greetings.py`). A peer that can be dialled is
there if it says so itself: what the DHT holds of it may be a minute old.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Any

import base58
from hivemind.dht.node import DHTNode
from hivemind.utils import get_dht_time

from dtrain.compression.belief import Belief, stand_of
from dtrain.dht.admissions import Admissions
from dtrain.dht.door import Entry
from dtrain.dht.greetings import NOBODY, Greeting, Greetings, News
from dtrain.dht.introductions import Introductions
from dtrain.dht.outcasts import Outcasts
from dtrain.dht.peer_record import ABSENT, PeerRecord
from dtrain.dht.reachability import CLIENT, RELAYED
from dtrain.dht.records import MAX_LIFETIME_S, PASS_FIELD, pack_status, take_pass, unpack_status
from dtrain.dht.streams import in_background

MAX_PEERS = 4096
# In heartbeat lifetimes: how long the DHT holds a record, and how often it is stored anew.
RECORD_LIFETIME, RECORD_PERIOD = 6.0, 2.0
# A look asks two nodes, of which each answers with everybody's record. From CALM_FROM peers on looks are rarer by
# the square of their number: N peers ask for N records each, mostly of the same nodes, and news goes from peer to peer.
AT_ONCE, CALM_FROM, LONGEST_PAUSE_S = 2, 8, 120.0
SAME_S = 0.001  # a record's time is rounded when its expiry is computed


class Heartbeats:
    """Tells this worker's heartbeat and keeps the view of the others fresh."""

    def __init__(
        self,
        node: DHTNode,
        prefix: str,
        *,
        ttl_s: float,
        poll_s: float,
        entry: Entry | None = None,
    ):
        """Without an `entry` everybody is seen."""
        self._node, self._key = node, f"{prefix}.workers"
        self.admissions: Admissions | None = None
        self.own_pass = b""
        if entry is not None:
            self.own_pass = entry.own_pass
            self.admissions = Admissions(node, prefix, entry.door, lambda: list(self._known))
            entry.door.learn([(str(node.peer_id), entry.own_pass)])  # our own use of the token counts
        self.ttl_s, self._poll_s = ttl_s, poll_s
        self._record_s = min(MAX_LIFETIME_S, RECORD_LIFETIME * ttl_s)
        self._own_id, self._name = node.peer_id.to_bytes(), str(node.peer_id)
        self._introductions = Introductions(node.protocol.p2p, self._name, self._hears, self._greet)
        self._greetings = Greetings(
            node.protocol.p2p,
            prefix,
            hear=self._hear,
            have=self._have,
            own_pass=self.own_pass,
            refusal=self._refusal,
            count=self.count,
            crowd=self._crowd,
            meet=self._introductions.meet,
        )
        self._belief = Belief()
        self.outcasts = Outcasts(lambda: int(self.status["round"]))
        self._at_the_door: dict[str, str] = {}  # who is not let in, and why; "" = not decided yet
        self._known: dict[str, PeerRecord] = {}
        self._misfits: dict[object, float] = {}  # whose record is no heartbeat: when its newest runs out
        self._changed = asyncio.Event()
        self._stored: tuple[float, bool] = (
            0.0,
            False,
        )  # when a record was stored, and whether as an absent one
        self.status: dict[str, Any] = {"round": 0, "digest": "", "state": "joining", "work": 0.0}

    async def open(self) -> None:
        """Begin to hear others; what is revoked is known before anybody is let in."""
        if self.admissions is not None:
            await self.admissions.refresh()
        await self._greetings.open()

    @property
    def announced(self) -> bool:
        """Whether the others know of us; of an observer they never do."""
        return self._greetings.own is not None

    # ------------------------------------------------------------------ telling

    async def announce(self, status: Mapping[str, Any]) -> None:
        """Say where this worker stands; for the others it stays so for the run's `heartbeat_ttl_s`."""
        self.status = dict(status)
        leads = self._greetings.own.leads if self._greetings.own is not None else NOBODY
        self._greetings.own = News(get_dht_time(), self.status, leads)
        await asyncio.gather(self._store(), self._greetings.greet(list(self._known)))

    async def lead(self, group: str, until: float) -> None:
        """Say that we would lead that group until that DHT time; no group = none any more."""
        own = self._greetings.own
        status = own.status if own is not None else self.status
        self._greetings.own = News(get_dht_time(), status, (group, until) if group else NOBODY)
        await self._greetings.greet([record.peer_id for record in self.others()])

    async def _store(self) -> None:
        """Renew our record in the DHT when it is time, and when we begin or cease to take part in rounds."""
        assert self._greetings.own is not None
        now, (stored, as_absent) = self._greetings.own.said, self._stored
        is_absent = self.status["state"] in ABSENT
        if now - stored < RECORD_PERIOD * self.ttl_s and as_absent == is_absent:
            return
        self._stored = now, is_absent
        await self._node.store(
            self._key,
            pack_status({**self.status, **self._shown_pass()}),
            expiration_time=now + self._record_s,
            subkey=self._own_id,
            # A copy here that nobody else writes to would be the nearest of all, and hide the others from us.
            exclude_self=self._node.protocol.client_mode,
        )

    def _shown_pass(self) -> dict[str, str]:
        return {PASS_FIELD: base64.b64encode(self.own_pass).decode()} if self.own_pass else {}

    # ------------------------------------------------------------------ who is let in

    def refuses(self, peer_id: str) -> str:
        """Why a peer that asks for something is refused, or ""; counted."""
        why = self.outcasts.why(peer_id)
        return why or ("" if self.admissions is None else self.admissions.door.refuses(peer_id))

    def count(self, reason: str) -> None:
        """Something of another peer was refused for that reason."""
        if self.admissions is not None:
            self.admissions.door.count(reason)

    def refusals(self) -> dict[str, Any]:
        """How often we have refused others and their DHT records, by reason, and why most do not let us in ("" = they
        do)."""
        if self.admissions is None:
            return {}
        counts = self.admissions.door.refusals + self._node.protocol.record_validator.refusals
        return {"refusals": dict(counts), "refused": self.admissions.refusal}

    def proves(self, peer_id: str, shown: object) -> bool:
        """Whether a peer's pass is one, as every member of the run sees it."""
        return self.admissions is None or not self.admissions.door.proves(peer_id, shown)

    def _refusal(self, peer_id: str) -> str:
        """What a peer that greets us is told: who has not said anything of itself only listens."""
        if why := self.outcasts.why(peer_id):
            return why
        if self.admissions is not None and peer_id in self._known:
            return self.admissions.door.opinion(peer_id)
        return self._at_the_door.get(peer_id, "")

    def _is_in(self, peer_id: str) -> bool:
        if self.outcasts.why(peer_id):
            return False
        return self.admissions is None or not self.admissions.door.opinion(peer_id)

    async def _let_in(self, peer_id: str, shown: bytes) -> bool:
        if self.admissions is None or self._is_in(peer_id):
            return not self.outcasts.why(peer_id)
        self._at_the_door.setdefault(peer_id, "")
        reason = await self.admissions.consider(peer_id, shown)
        if reason:
            self._at_the_door[peer_id] = reason
            while len(self._at_the_door) > MAX_PEERS:
                del self._at_the_door[next(iter(self._at_the_door))]
        else:
            self._at_the_door.pop(peer_id, None)
        return not reason

    # ------------------------------------------------------------------ hearing

    async def poll(self) -> None:
        """Look into the DHT for workers that are new here, over and over. Runs until cancelled."""
        while True:
            news = await self._look(latest=False)
            # Whom nobody knows nobody greets.
            await self._greetings.greet(news if self.announced else list(self._known))
            self._introductions.look_for_the_lost(self.others())
            if self.admissions is not None:
                await self.admissions.keep()
            await asyncio.sleep(self._pause_s())

    def _pause_s(self) -> float:
        rarer = max(1.0, (len(self._known) / CALM_FROM) ** 2)
        return max(self._poll_s, min(LONGEST_PAUSE_S, self._poll_s * rarer))

    async def refresh(self) -> None:
        """Look as closely as possible: ask every near node of the DHT, then everybody who was there lately."""
        await self._look(latest=True)
        await self._greetings.greet(list(self._known))

    async def _look(self, *, latest: bool) -> list[str]:
        """Read the DHT; the peers of which that is news. With `latest` every near node is asked, and answers with
        everybody's record: N times the bytes of taking the first answer, which is often our own copy."""
        found = await self._node.get(self._key, latest=latest, num_workers=None if latest else AT_ONCE)
        records = found.value if found is not None and isinstance(found.value, dict) else {}
        news = []
        for owner, record in records.items():
            status = unpack_status(getattr(record, "value", None))
            if status is None or not isinstance(owner, bytes):
                self._count_misfit(owner, record)
                continue
            if owner == self._own_id:
                continue
            peer_id, said = base58.b58encode(owner).decode(), record.expiration_time - self._record_s
            known = self._known.get(peer_id)
            if known is not None and said <= known.said + SAME_S:
                continue
            if not await self._let_in(peer_id, take_pass(status)):
                continue
            lasts_s = self._record_s if status.get("reach") == CLIENT else self.ttl_s
            self._keep(PeerRecord(peer_id, status, said, said, said + lasts_s))
            news.append(peer_id)
        return news

    def _count_misfit(self, owner: object, record: Any) -> None:
        """A record under the run's key is no heartbeat; counted once, however often it is read."""
        expires = getattr(record, "expiration_time", 0.0)
        if self._misfits.get(owner) != expires:
            self._misfits[owner] = expires
            while len(self._misfits) > MAX_PEERS:
                del self._misfits[next(iter(self._misfits))]
            self.count("record-schema")

    def _hear(self, peer_id: str, greeting: Greeting, is_answer: bool) -> None:
        # Who only calls us does not say whether it lets us in.
        if is_answer and self.admissions is not None and self.announced:
            self.admissions.heard(peer_id, greeting.refused)
        if self._is_in(peer_id):
            self._take_in(peer_id, greeting)
        elif greeting.status is not None and self._at_the_door.get(peer_id) != "":
            in_background(self._hear_newcomer(peer_id, greeting))

    async def _hear_newcomer(self, peer_id: str, greeting: Greeting) -> None:
        if await self._let_in(peer_id, greeting.shown):
            self._take_in(peer_id, greeting)

    def _take_in(self, peer_id: str, greeting: Greeting) -> None:
        known, now = self._known.get(peer_id), get_dht_time()
        status = greeting.status if greeting.status is not None else known.status if known else None
        if status is not None and greeting.said > self._have(peer_id):
            self._keep(
                PeerRecord(peer_id, status, greeting.said, now, now + self.ttl_s, True, greeting.leads)
            )

    def _keep(self, record: PeerRecord) -> None:
        if record.peer_id in self._known or len(self._known) < MAX_PEERS:
            self._known[record.peer_id] = record
            self._changed.set()

    def _have(self, peer_id: str) -> float:
        known = self._known.get(peer_id)
        return known.said if known is not None and known.is_direct else 0.0

    async def _greet(self, peer_id: str) -> None:
        await self._greetings.greet([peer_id])

    def _hears(self, peer_id: str) -> bool:
        known = self._known.get(peer_id)
        return known is not None and known.is_direct and known.expires > get_dht_time()

    def _crowd(self) -> dict[str, str]:
        """Addresses of those that we have heard ourselves and others can dial, us included, by peer id."""
        heard = {r.peer_id: r.status for r in self.others() if r.is_direct and r.can_be_dialled}
        crowd = {peer: status.get("address") for peer, status in heard.items()}
        crowd[self._name] = self.status.get("address") if self.announced else ""
        return {peer: address for peer, address in crowd.items() if isinstance(address, str) and address}

    async def changed(self, patience_s: float) -> None:
        """Wait for news since the last call, at most so long. Who cannot be dialled, by no relay either, has to ask."""
        if self._node.protocol.client_mode and self.status.get("reach") != RELAYED:
            await self._greetings.greet([record.peer_id for record in self.others() if record.can_be_dialled])
        # Not wait_for: up to Python 3.11 it may swallow a cancellation that comes together with the news, and the
        # search for a group, of which this is a part, would then not end before its deadline.
        waiting = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({waiting}, timeout=patience_s)
        finally:
            waiting.cancel()
        self._changed.clear()

    # ------------------------------------------------------------------ the view

    def others(self) -> list[PeerRecord]:
        """Every other worker whose heartbeat has not run out."""
        now = get_dht_time()
        # Those that are gone are remembered for as long as the DHT may hold something of them.
        self._known = {k: v for k, v in self._known.items() if max(v.said, v.heard) + self._record_s > now}
        fresh = (r for r in self._known.values() if r.expires > now and self._is_in(r.peer_id))
        return sorted(fresh, key=lambda record: record.peer_id)

    def active(self) -> list[PeerRecord]:
        return [record for record in self.others() if record.is_active]

    def donors(self) -> list[PeerRecord]:
        """Peers that can hand out past rounds and state. Archives lag behind, and several agree on what they have: they
        are asked where no worker has more."""
        able = [record for record in self.others() if record.can_give]
        most = max((r.work for r in able if not r.is_archive), default=0.0)
        return [r for r in able if not r.is_archive or r.work >= most]

    def sees_an_archive(self) -> bool:
        """Whether a peer is there that keeps the run's state and takes part in no round."""
        return any(record.is_archive for record in self.others())

    def addresses(self) -> list[str]:
        """Where the peers that can be dialled say that they are."""
        said = (record.status.get("address") for record in self.others() if record.can_be_dialled)
        return [address for address in said if isinstance(address, str)]

    def ahead(self) -> list[PeerRecord]:
        """Peers whose history is the run's rather than ours, as far as we believe them."""
        own, donors = stand_of(self.status), self.donors()
        stands, num_active = {r.peer_id: stand_of(r.status) for r in donors}, sum(r.is_active for r in donors)
        believed = self._belief.ahead(stands, own, num_active, time.monotonic())
        return [record for record in donors if record.peer_id in believed]
