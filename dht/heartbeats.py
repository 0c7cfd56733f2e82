"""Who is there: each worker's signed heartbeat in the DHT, and this peer's view of all the others'."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import base58
from hivemind.dht.node import DHTNode
from hivemind.utils import get_dht_time

from dtrain.dht.reachability import CLIENT
from dtrain.dht.records import pack_status, unpack_status

HURRY = 2  # how many times more often the swarm is looked at while a group is sought

# States in which a worker takes part in no round; see `dtrain.trainer.exchange.ABSENT`.
ABSENT = ("joining", "paused", "finished", "leaving", "stopped")


@dataclass(frozen=True)
class PeerRecord:
    """Another worker's last heartbeat."""

    peer_id: str
    status: Mapping[str, Any]
    expires: float  # DHT time

    @property
    def is_active(self) -> bool:
        """Whether this peer takes part in rounds, so that the others wait for it."""
        return self.status["state"] not in ABSENT

    @property
    def can_be_dialled(self) -> bool:
        """Whether this peer can be asked for anything; one that nobody can dial only asks others."""
        return self.status.get("reach") != CLIENT

    @property
    def work(self) -> float:
        """Tokens in the history of this peer's theta; of two histories the one with more work is the run's."""
        work = self.status.get("work", 0)
        return float(work) if isinstance(work, (int, float)) else 0.0


class Heartbeats:
    """Writes this worker's heartbeat and keeps the view of the others fresh."""

    def __init__(self, node: DHTNode, prefix: str, *, ttl_s: float, poll_s: float):
        self._node, self._key = node, f"{prefix}.workers"
        self.ttl_s, self._poll_s = ttl_s, poll_s
        self._own_id = node.peer_id.to_bytes()
        self._wake, self._in_a_hurry = asyncio.Event(), False
        self._others: dict[str, PeerRecord] = {}
        self.announced = False  # an observer never is
        self.status: dict[str, Any] = {"round": 0, "digest": "", "state": "joining", "work": 0.0}

    async def announce(self, status: Mapping[str, Any]) -> None:
        """Store this worker's heartbeat; it stays fresh for the run's `heartbeat_ttl_s`."""
        self.status, self.announced = dict(status), True
        await self._node.store(
            self._key,
            pack_status(status),
            expiration_time=get_dht_time() + self.ttl_s,
            subkey=self._own_id,
            # A copy here that nobody else writes to would be the nearest of all, and hide the others from us.
            exclude_self=self._node.protocol.client_mode,
        )

    async def poll(self) -> None:
        """Read everybody's heartbeat, over and over. Runs until cancelled."""
        while True:
            await self.refresh(latest=False)
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), self._poll_s / (HURRY if self._in_a_hurry else 1))
            except asyncio.TimeoutError:
                pass

    @contextmanager
    def hurrying(self) -> Iterator[None]:
        """Poll more often while a group is sought: whoever comes or goes then is waited for, or not."""
        self._in_a_hurry = True
        self._wake.set()
        try:
            yield
        finally:
            self._in_a_hurry = False

    async def refresh(self, *, latest: bool = True) -> None:
        """Look once. With `latest` every near node is asked, and answers with everybody's heartbeat: N times the
        bytes of taking the first answer, which is often our own copy."""
        found = await self._node.get(self._key, latest=latest)
        records = found.value if found is not None and isinstance(found.value, dict) else {}
        for owner, record in records.items():
            status = unpack_status(getattr(record, "value", None))
            if status is None or not isinstance(owner, bytes) or owner == self._own_id:
                continue
            peer_id = base58.b58encode(owner).decode()
            known = self._others.get(peer_id)
            if known is None or record.expiration_time >= known.expires:
                self._others[peer_id] = PeerRecord(peer_id, status, record.expiration_time)

    def others(self) -> list[PeerRecord]:
        """Every other worker whose heartbeat has not run out."""
        now = get_dht_time()
        self._others = {k: v for k, v in self._others.items() if v.expires > now}
        return sorted(self._others.values(), key=lambda record: record.peer_id)

    def active(self) -> list[PeerRecord]:
        return [record for record in self.others() if record.is_active]

    def donors(self) -> list[PeerRecord]:
        """Peers that can hand out past rounds and state."""
        return [r for r in self.others() if r.status["state"] != "joining" and r.can_be_dialled]

    def addresses(self) -> list[str]:
        """Where the peers that can be dialled say that they are."""
        said = (record.status.get("address") for record in self.others() if record.can_be_dialled)
        return [address for address in said if isinstance(address, str)]

    def ahead(self) -> list[PeerRecord]:
        """Peers whose theta has more work in it than ours."""
        own = float(self.status.get("work", 0.0))
        return [record for record in self.donors() if record.work > own]
