"""A swarm in one process: workers in threads, each with a `MemoryExchange`, train together without a network.

swarm = MemorySwarm(manifest, codec)
exchange = MemoryExchange(swarm, "peer-a")     # one per worker thread
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.compression.belief import enough
from dtrain.experiments.memory_peer import MemoryOutcome
from dtrain.experiments.memory_round import Contribution, Faults
from dtrain.experiments.memory_swarm import MemorySwarm
from dtrain.trainer.exchange import ABSENT, DONE, Outcome, PeerView, Provider, State, Watch

__all__ = ["Faults", "MemoryExchange", "MemoryOutcome", "MemorySwarm"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPeerView:
    """See `PeerView`."""

    peer_id: str
    status: Mapping[str, object]
    age_s: float
    is_believed: bool


@dataclass(frozen=True)
class MemoryState:
    """See `State`."""

    round: int
    work: float
    digest: bytes
    blob: memoryview


class MemoryExchange:
    """One worker's `Exchange` with a `MemorySwarm`."""

    def __init__(self, swarm: MemorySwarm, peer_id: str) -> None:
        self._swarm = swarm
        self._peer_id = peer_id
        swarm.enter(peer_id)

    @property
    def peer_id(self) -> str:
        """See `Exchange`."""
        return self._peer_id

    def announce(self, status: Mapping[str, object]) -> None:
        """See `Exchange`."""
        with self._swarm.changed:
            peer = self._swarm.peer(self._peer_id)
            before = peer.announced, peer.state in ABSENT, peer.position
            peer.status, peer.announced = dict(status), True
            if peer.state in ABSENT:  # it may come back at an earlier round than it left
                peer.next_round = 0
            if before != (True, peer.state in ABSENT, peer.position):  # nothing else matters to who waits
                self._swarm.changed.notify_all()

    def post(self, topic: str, note: bytes) -> None:
        """See `Exchange`."""
        with self._swarm.changed:
            self._swarm.peer(self._peer_id).notes[topic] = note

    def swarm(self) -> Sequence[PeerView]:
        """See `Exchange`."""
        with self._swarm.changed:
            others = self._swarm.others(self._peer_id)
            believed = self._swarm.believed(self._peer_id)
            return [
                MemoryPeerView(name, peer.status, self._swarm.age_s(peer), name in believed)
                for name, peer in others.items()
            ]

    def run_round(self, *, round: int, base_digest: bytes, payload: bytes, weight: float) -> Outcome:
        """See `Exchange`."""
        return self._swarm.run_round(round, Contribution(self._peer_id, base_digest, payload, weight))

    def release_residual(self, *, all: bool) -> tuple[int, Sequence[tuple[int, int, bytes]]]:
        """See `Exchange`. Hand-overs are not counted: nothing here outlives its process."""
        return 0, self._swarm.release_residual(self._peer_id, all=all)

    def residual_saved(self, number: int) -> None:
        """See `Exchange`."""

    def accuse(self, peer_id: str, reason: str) -> None:
        """See `Exchange`."""
        with self._swarm.changed:
            peer = self._swarm.peer(self._peer_id)
            peer.observations.accuse(peer_id, peer.position)

    def fetch_contribution(self, peer_id: str, round: int) -> bytes | None:
        """See `Exchange`. Signatures are not needed where nobody can show another payload than it sent."""
        with self._swarm.changed:
            others, own = self._swarm.others(self._peer_id), self._swarm.peer(self._peer_id)
            sent = others[peer_id].sent.get(round) if peer_id in others else None
        if sent is None or round not in own.sent:
            return None
        self._transfer(peer_id, len(sent))
        return sent

    def fetch_round(self, round: int, unlike: Sequence[bytes] = ()) -> Outcome | None:
        """See `Exchange`. Of several histories, the one that most workers share."""
        with self._swarm.changed:
            others = self._swarm.others(self._peer_id)
            kept = {name: peer.history[round] for name, peer in others.items() if round in peer.history}
            kept = {name: end for name, end in kept.items() if end.aggregates != tuple(unlike)}
            if not kept:
                return None
            shared = Counter(outcome.aggregates for outcome in kept.values())
            donor = max(kept, key=lambda name: shared[kept[name].aggregates])
        self._transfer(donor, sum(len(aggregate) for aggregate in kept[donor].aggregates))
        return replace(kept[donor], verdict=DONE, undelivered=(), problem="", wait_s=0.0, exchange_s=0.0)

    def fetch_state(self, watch: Watch) -> State | None:
        """See `Exchange`."""
        for donor, provider in self._donors():
            blob = bytearray()
            try:
                given = provider(blob.extend)
            except Exception:  # a donor that fails is passed over, as one on the network would be
                logger.warning("%s could not give its state", donor, exc_info=True)
                continue
            self._transfer(donor, len(blob))
            watch.progress(len(blob), len(blob))
            return MemoryState(given.round, given.work, given.digest, memoryview(blob))
        return None

    def serve_state(self, provider: Provider) -> None:
        """See `Exchange`."""
        with self._swarm.changed:
            self._swarm.peer(self._peer_id).provider = provider

    def refusals(self) -> Mapping[str, int]:
        """See `Exchange`."""
        return {}

    def traffic(self) -> tuple[int, int]:
        """See `Exchange`. Payloads, aggregates and states; a real network adds its headers."""
        with self._swarm.changed:
            peer = self._swarm.peer(self._peer_id)
            return peer.bytes_up, peer.bytes_down

    def wire_bytes(self) -> int:
        """See `Exchange`. There is no wire."""
        return sum(self.traffic())

    def close(self) -> None:
        """See `Exchange`."""
        self._swarm.leave(self._peer_id)

    def _donors(self) -> list[tuple[str, Provider]]:
        """Who can give state: what enough share first, of that most work, then what most share, then by digest."""
        with self._swarm.changed:
            others = self._swarm.others(self._peer_id)
            donors = {name: peer for name, peer in others.items() if peer.state != "joining"}
            digests = {name: str(peer.status.get("digest", "")) for name, peer in donors.items()}
            agreeing = Counter(digests.values())
            least = enough(len(donors))

            def rank(name: str) -> tuple[bool, float, int, str, str]:
                num = agreeing[digests[name]]
                return num < least, -donors[name].work, -num, digests[name], name

            ranked = sorted(donors, key=rank)
            return [(name, provider) for name in ranked if (provider := donors[name].provider) is not None]

    def _transfer(self, donor: str, num_bytes: int) -> None:
        """Count what a donor sends here, and let the time pass that it takes."""
        with self._swarm.changed:
            self._swarm.count_transfer(donor, self._peer_id, num_bytes)
        seconds = self._swarm.links.transfer_s(donor, self._peer_id, num_bytes)
        if seconds > 0:
            self._swarm.clock.sleep(seconds)
