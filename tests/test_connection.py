"""Laws of a peer's place in the DHT while others come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import PeerID

from dtrain.dht import connection
from dtrain.dht.connection import Connection
from dtrain.dht.identity import Identity

WHO, OTHER = (PeerID(Identity(Path(), Ed25519PrivateKey.generate()).peer_id_bytes) for _ in range(2))


def at(peer: PeerID) -> str:
    return f"/ip4/10.0.0.1/tcp/31000/p2p/{peer}"


def test_who_is_here_again_is_taken_back_into_the_dht(monkeypatch: pytest.MonkeyPatch) -> None:
    """hivemind's node forgets a peer that did not answer once; who stays is not asked again and again."""
    looks = [[at(WHO)], [at(WHO), at(OTHER)], [at(OTHER)], [at(OTHER)], [at(WHO), at(OTHER)]]
    pinged: list[PeerID] = []

    async def call_ping(peer: PeerID) -> None:
        pinged.append(peer)

    async def connect(p2p: object, peer: PeerID, addresses: list[str]) -> bool:
        return True

    async def scenario() -> None:
        done = asyncio.Event()

        def seen() -> list[str]:
            if len(looks) == 1:
                done.set()
            return looks.pop(0) if len(looks) > 1 else looks[0]

        async def list_peers() -> list[Any]:
            return []

        protocol = SimpleNamespace(
            call_ping=call_ping, routing_table=SimpleNamespace(uid_to_peer_id={1: WHO})
        )
        p2p: Any = SimpleNamespace(peer_id="us", list_peers=list_peers)
        node: Any = SimpleNamespace(protocol=protocol)
        watch: Any = None
        keeping = asyncio.create_task(Connection(p2p, node, "direct", [], watch).keep(seen))
        await done.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        keeping.cancel()

    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.setattr(connection, "KEEP_PERIOD_S", 0.0)
    asyncio.run(scenario())
    assert pinged == [WHO]
