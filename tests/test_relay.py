"""A relay is relied on only after a megabyte has come through it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import base58
import pytest
from hivemind.p2p import P2P
from hypothesis import given
from hypothesis import strategies as st
from swarm_tools import DEADLINE_S

from dtrain.dht import relay, varint
from dtrain.dht.addresses import by_peer, to_multiaddr
from dtrain.dht.identity import load_or_create
from dtrain.dht.reachability import connect
from dtrain.dht.relay import ENOUGH_BYTES, carries, find_relays, passes_on_bytes, start_relaying
from dtrain.dht.transport import start_daemon


def test_a_daemon_is_started_until_its_relay_carries_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the wrong one of libp2p's two relay services has won; who is no relay is not taken for one."""

    async def scenario(folder: Path) -> None:
        identity, daemons = load_or_create(folder / "relay.key"), []

        async def start() -> P2P:
            daemons.append(await start_daemon(identity, host="0.0.0.0", port=0, passes_on=True))
            return daemons[-1]

        scout = await start_daemon(load_or_create(folder / "scout.key"), host="127.0.0.1", port=0)
        other = await start_daemon(load_or_create(folder / "other.key"), host="127.0.0.1", port=0)
        try:
            p2p = await start_relaying(identity, scout, await start(), start, DEADLINE_S)
            assert p2p is daemons[-1] and [d.is_alive for d in daemons] == [False] * (len(daemons) - 1) + [
                True
            ]
            assert await passes_on_bytes(scout, str(p2p.peer_id)) >= ENOUGH_BYTES
            assert await carries(scout, str(p2p.peer_id))
            monkeypatch.setattr(relay, "ENOUGH_BYTES", 2**60)
            assert not await carries(scout, str(p2p.peer_id))
            impatient = start_relaying(identity, scout, p2p, start, patience_s=0.0)
            assert (
                await asyncio.wait_for(impatient, DEADLINE_S) is p2p and p2p.is_alive
            )  # serves nobody, but works

            places = by_peer([str(address) for address in await other.get_visible_maddrs()])
            assert await connect(scout, other.peer_id, places[str(other.peer_id)])
            assert 0 < await passes_on_bytes(scout, str(other.peer_id)) < 2**20  # the other service
            assert await find_relays(scout, places) == {}  # it has no public address anyway
        finally:
            for daemon in (*daemons, scout, other):
                await daemon.shutdown()

    with tempfile.TemporaryDirectory() as path:  # short, because the path of a socket must be
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{path}/")
        asyncio.run(scenario(Path(path)))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    """What a stranger's relay answers is read without harm."""
    try:
        found = varint.field(raw, 4)
    except ValueError:
        return
    assert found is None or isinstance(found, (int, bytes))


@given(st.binary(max_size=127), st.integers(1, 15))
def test_a_packed_field_is_found(value: bytes, number: int) -> None:
    other = number % 15 + 1
    assert varint.field(varint.pack_bytes(number, value), number) == value
    assert varint.field(varint.pack_bytes(number, value), other) is None


def test_fields_are_found() -> None:
    """Numbers of several bytes, and the last of a field's repetitions; cut-off messages are refused."""
    message = b"\x08\x02\x28\x64\x22\x05\x10\x80\x80\x80\x10"
    limit = varint.field(message, 4)
    assert isinstance(limit, bytes) and varint.field(limit, 2) == 2**25
    assert varint.field(message, 5) == 100 and varint.field(message + b"\x28\x01", 5) == 1
    with pytest.raises(ValueError, match="cut off"):
        varint.field(message[:-2], 5)


def test_a_relay_in_an_address_is_written_as_the_daemon_reads_it() -> None:
    """As its bare peer id: https://github.com/multiformats/multiaddr/blob/master/protocols.csv."""
    peer = "12D3KooWGvY61cSKFvNbCMTwGAqrBqBTGPnai6EQNqaQjr9JPTvV"
    raw = to_multiaddr(f"/ip4/20.0.0.1/tcp/31000/p2p/{peer}/p2p-circuit").to_bytes()
    assert raw == bytes.fromhex("0414000001067918a50326") + base58.b58decode(peer) + bytes.fromhex("a202")
    assert to_multiaddr("/ip4/20.0.0.1/tcp/31000").to_bytes() == raw[:8]
