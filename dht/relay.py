"""Being reached through a relay: a worker that nobody can dial keeps a connection with a peer that passes on calls.

libp2p's daemon starts two relay services that race for one name. One passes on as much as we tell it to; the other,
with the library's defaults, resets a connection after 128 KiB. Which one has won is seen by asking for a reservation,
whose answer tells the limit (https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md), and by sending a
megabyte through; a daemon in which the wrong one has won is started again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.dht.addresses import CIRCUIT, ip_of, is_public, outside_first
from dtrain.dht.identity import Identity
from dtrain.dht.reachability import connect
from dtrain.dht.transport import TransportError, start_daemon
from dtrain.dht.varint import field, pack_bytes, read_delimited

ENOUGH_BYTES = 2**30  # that a relay must pass on per connection and direction
MAX_RELAYS = 4  # peers that are asked whether they are relays
RESERVED_WITHIN_S = 5.0
ASK_S = 3.0
ECHO_BYTES = 1_000_000
ECHO_S = 20.0
# How long a daemon is started again and again: the wrong service wins in half of the starts, on a busy machine in five
# of six. Who joins others is wanted as a worker more than as one relay more.
FIRST_PATIENCE_S, PATIENCE_S = 60.0, 10.0
_HOP, _STOP = "/libp2p/circuit/relay/0.2.0/hop", "/libp2p/circuit/relay/0.2.0/stop"
# HopMessage and StopMessage, field 1 = what it is; field 2 of a CONNECT = the peer, whose field 1 is its id.
_RESERVE, _CONNECT, _ACCEPTED = b"\x08\x00", b"\x08\x01", b"\x08\x01\x20\x64"
_HOP_STATUS, _HOP_LIMIT, _LIMIT_DATA, _OK = 5, 4, 2, 100


class Echo(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """Sends back what it gets, to show that it gets through."""

    async def rpc_echo(self, request: BytesValue, context: P2PContext) -> BytesValue:
        return request


# ---------------------------------------------------------------------- the relay's side


async def start_relaying(
    identity: Identity, scout: P2P, first: P2P, start: Callable[[], Awaitable[P2P]], patience_s: float
) -> P2P:
    """A daemon that passes on for others: `first`, or one of `start()`'s. One that does not, when none does within
    `patience_s` seconds.

    The scout must listen.
    """
    # The daemon calls the scout: a scout that has failed to dial an address would not try again for seconds.
    to_scout = [str(address).rpartition("/p2p/")[0] for address in await scout.get_visible_maddrs()]
    p2p, starts, clock = first, 1, asyncio.get_running_loop().time
    until = clock() + patience_s
    while not (await connect(p2p, scout.peer_id, to_scout) and await carries(scout, identity.peer_id)):
        if clock() > until:
            logging.info("relaying for nobody: no relay service of use in %d starts", starts)
            return p2p
        await p2p.shutdown()
        p2p, starts = await start(), starts + 1
    logging.info("relaying for others; starts of the daemon: %d", starts)
    return p2p


async def carries(scout: P2P, relay: str) -> bool:
    """Whether a megabyte comes through a relay and back, from the scout to itself. They must be connected."""
    if await passes_on_bytes(scout, relay) < ENOUGH_BYTES:
        return False
    try:
        return await asyncio.wait_for(_echo_through(scout, PeerID.from_base58(relay)), ECHO_S)
    except Exception as error:  # the daemon and asyncio raise many types when a connection is reset
        logging.info("%s does not pass on a megabyte: %r", relay, error)
        return False


async def _echo_through(scout: P2P, relay: PeerID) -> bool:
    """The scout holds a reservation; it answers its own call. In place of libp2p's own end of a relayed connection, so
    that it serves on networks too that libp2p does not take for public."""

    async def answer(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await read_delimited(reader)  # who calls
            writer.write(bytes([len(_ACCEPTED)]) + _ACCEPTED)
            writer.write(await reader.readexactly(ECHO_BYTES))
            await reader.read()  # the caller hangs up first

    await scout.add_binary_stream_handler(_STOP, answer)
    call = _CONNECT + pack_bytes(2, pack_bytes(1, scout.peer_id.to_bytes()))
    _, reader, writer = await scout._client.stream_open(relay, (_HOP,))
    try:
        writer.write(bytes([len(call)]) + call)
        if field(await read_delimited(reader), _HOP_STATUS) != _OK:
            return False
        sent = os.urandom(ECHO_BYTES)
        writer.write(sent)
        received: bytes = await reader.readexactly(ECHO_BYTES)
        return received == sent
    finally:
        writer.close()
        await scout._client.remove_stream_handler(_STOP)


async def passes_on_bytes(p2p: P2P, relay: str) -> int:
    """How many bytes a peer that we are connected with would pass on per relayed connection; 0 if it is no relay."""
    try:
        _, reader, writer = await asyncio.wait_for(
            p2p._client.stream_open(PeerID.from_base58(relay), (_HOP,)), ASK_S
        )
        try:
            writer.write(bytes([len(_RESERVE)]) + _RESERVE)
            reply = await asyncio.wait_for(read_delimited(reader), ASK_S)
        finally:
            writer.close()
        limit = field(reply, _HOP_LIMIT)
        data = field(limit, _LIMIT_DATA) if isinstance(limit, bytes) else 0
        return data if isinstance(data, int) else 0
    except Exception as error:  # it is no relay, or speaks nonsense
        logging.info("%s is no relay: %r", relay, error)
        return 0


# ---------------------------------------------------------------------- the side of who is reached through it


async def find_relays(scout: P2P, peers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Those of `peers` that would pass on enough for us, with their public addresses: libp2p uses no others."""
    public = {
        peer: [place for place in places if CIRCUIT not in place and is_public(ip_of(place) or "127.0.0.1")]
        for peer, places in outside_first(peers).items()
    }
    asked = [peer for peer, places in public.items() if places][:MAX_RELAYS]
    answers = await asyncio.gather(*(_is_relay(scout, peer, public[peer]) for peer in asked))
    return {peer: public[peer] for peer, is_relay in zip(asked, answers) if is_relay}


async def _is_relay(scout: P2P, peer: str, places: Sequence[str]) -> bool:
    there = await connect(scout, PeerID.from_base58(peer), places)
    return there and await passes_on_bytes(scout, peer) >= ENOUGH_BYTES


async def start_relayed(
    identity: Identity, scout: P2P, host: str, port: int, peers: Mapping[str, Sequence[str]]
) -> tuple[P2P, list[str]] | None:
    """A daemon that others reach through a relay among `peers`, and its addresses; None when that does not work.

    It gets one address of one relay: of several, libp2p waits minutes for any that it cannot use.
    """
    relays = await find_relays(scout, peers)
    for relay in random.sample(sorted(relays), len(relays)):
        p2p = await start_daemon(identity, host=host, port=port, relays=[f"{relays[relay][0]}/p2p/{relay}"])
        try:
            return p2p, await _reach_through(scout, p2p)
        except Exception as error:  # whatever it is, client mode works
            logging.info("%s does not serve as a relay: %r", relay, error)
        await p2p.shutdown()
    return None


async def _reach_through(scout: P2P, p2p: P2P) -> list[str]:
    """The addresses at which the daemon is reached through its relay: a megabyte has come through, both ways."""
    await Echo().add_p2p_handlers(p2p)
    addresses = await asyncio.wait_for(_reserved(p2p), RESERVED_WITHIN_S)
    if not await connect(scout, p2p.peer_id, [address.rpartition("/p2p/")[0] for address in addresses]):
        raise TransportError("its relayed address cannot be dialled")
    sent = BytesValue(value=os.urandom(ECHO_BYTES))
    reply = await Echo.get_stub(scout, p2p.peer_id).rpc_echo(sent, timeout=ECHO_S)
    if reply.value != sent.value:
        raise TransportError("it changes what it passes on")
    return addresses


async def relayed_addresses(p2p: P2P) -> list[str]:
    """Where a daemon can be reached through relays."""
    addresses = [str(address) for address in await p2p.get_visible_maddrs(latest=True)]
    return sorted(address for address in addresses if f"{CIRCUIT}/" in address)


async def _reserved(p2p: P2P) -> list[str]:
    while not (addresses := await relayed_addresses(p2p)):
        await asyncio.sleep(0.1)
    return addresses
