"""Calls on the peers that others tell us of (`dht/greetings.py` says when they do), and on those that fell silent.

While a network is split each half forgets the other, in its heartbeats and in its DHT. Whole again, they would stay two
runs if nobody called those who were there before.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

from hivemind.p2p import P2P, PeerID
from hivemind.utils import get_dht_time

from dtrain.dht.addresses import by_peer
from dtrain.dht.peer_record import PeerRecord
from dtrain.dht.reachability import connect
from dtrain.dht.streams import in_background

MAX_CALLS, CALL_AGAIN_S = 16, 10.0  # at most so many calls in that time: an address may be a lie
MAX_LOST = 64


class Introductions:
    """What an introduced peer says of itself is what counts; who told us of it has only told us where to call."""

    def __init__(
        self,
        p2p: P2P,
        own_id: str,
        hears: Callable[[str], bool],
        greet: Callable[[str], Awaitable[None]],
    ):
        """`hears(peer id)`: whether we know that peer already; `greet(peer id)` tells it our news and hears its own."""
        self._p2p, self._own_id, self._hears, self._greet = p2p, own_id, hears, greet
        self._called: dict[str, float] = {}  # peer id: when
        # Address by peer id, of those that have not said goodbye; the latest seen last.
        self._met: dict[str, str] = {}

    def meet(self, address: str) -> None:
        """Another peer knows somebody there: call it in the background, if it is new to us."""
        now = get_dht_time()
        self._called = {peer: when for peer, when in self._called.items() if now - when < CALL_AGAIN_S}
        for peer, places in by_peer([address]).items():
            is_new = peer != self._own_id and not self._hears(peer) and peer not in self._called
            if is_new and len(self._called) < MAX_CALLS:
                self._called[peer] = now
                in_background(self._call(peer, places))

    def look_for_the_lost(self, here: Sequence[PeerRecord]) -> None:
        """Call one that was here and is not any more. One that answers tells us of the others."""
        for record in here:
            self._met.pop(record.peer_id, None)
            address = record.status.get("address")
            if record.can_be_dialled and not record.has_left and isinstance(address, str):
                self._met[record.peer_id] = address
        present = {record.peer_id for record in here}
        lost = [peer for peer in self._met if peer not in present]
        for peer in lost[:-MAX_LOST]:
            del self._met[peer]
        if lost:
            self.meet(self._met[random.choice(lost[-MAX_LOST:])])

    async def _call(self, peer: str, places: Sequence[str]) -> None:
        await connect(self._p2p, PeerID.from_base58(peer), places)
        await self._greet(peer)
