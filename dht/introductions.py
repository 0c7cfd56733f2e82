"""Calls on the peers that others tell us of: `dht/greetings.py` says when they do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from hivemind.p2p import P2P, PeerID
from hivemind.utils import get_dht_time

from dtrain.dht.addresses import by_peer
from dtrain.dht.reachability import connect
from dtrain.dht.streams import in_background

MAX_CALLS, CALL_AGAIN_S = 16, 10.0  # at most so many calls in that time: an address may be a lie


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

    def meet(self, address: str) -> None:
        """Another peer knows somebody there: call it in the background, if it is new to us."""
        now = get_dht_time()
        self._called = {peer: when for peer, when in self._called.items() if now - when < CALL_AGAIN_S}
        for peer, places in by_peer([address]).items():
            is_new = peer != self._own_id and not self._hears(peer) and peer not in self._called
            if is_new and len(self._called) < MAX_CALLS:
                self._called[peer] = now
                in_background(self._call(peer, places))

    async def _call(self, peer: str, places: Sequence[str]) -> None:
        await connect(self._p2p, PeerID.from_base58(peer), places)
        await self._greet(peer)
