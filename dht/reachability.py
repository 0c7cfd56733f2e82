"""Can others dial this machine? Found out by having other peers try.

A peer that we have connected to cannot tell by answering us: it answers over our own connection, also through a router
that lets nothing in. (So hivemind's own check, the ping with `validate`, says yes behind every NAT.) Therefore a scout,
a second daemon with an identity of its own, asks on our behalf: the peers it asks, the witnesses, drop what connections
they have with us and dial us anew. They dial only the IP address that the scout's own connection comes from, so nobody
can have them dial a stranger, and only for who holds the key of the peer id that is to be dialled.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.dht.addresses import by_peer, ip_of, is_loopback, is_public, outside_first, to_multiaddr
from dtrain.dht.identity import Identity, verify

DIRECT = "direct"  # others can dial this machine
RELAYED = "relayed"  # others can through a relay
CLIENT = "client"  # nobody can: it calls others, and they never call it

MAX_WITNESSES = 3
DIAL_S = 4.0  # longest wait for a connection; a router that swallows our packets gives no answer at all
ASK_S = 3 * DIAL_S  # the witness drops a connection, dials, and may have others to serve before
MAX_DIALS_AT_ONCE = 16
MAX_OTHERS = 4  # further witnesses that one may name
_DOMAIN = b"dtrain-dial-back-1"


@dataclass(frozen=True)
class Finding:
    """What a witness found."""

    reached: bool
    seen: str  # the IP address it sees us at
    others: tuple[str, ...]  # addresses of peers that it suggests to ask too


class Witness(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """Answers scouts. `suggest()` gives libp2p addresses of other peers that can be dialled."""

    def __init__(self, p2p: P2P, suggest: Callable[[], Sequence[str]]):
        self._p2p, self._suggest = p2p, suggest
        self._dials = asyncio.Semaphore(MAX_DIALS_AT_ONCE)

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p)

    async def rpc_dial_back(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """A scout asks whether the peer that sent it can be dialled. What we cannot do is left unanswered."""
        peer_id, port = _parse_request(
            request.value, self._p2p.peer_id.to_bytes(), context.remote_id.to_bytes()
        )
        async with self._dials:
            seen = (await seen_at(self._p2p, context.remote_id))[0]
            # What its daemon of before has left behind looks alive, and would be taken for a new connection.
            await disconnect(self._p2p, PeerID(peer_id))
            reached = await connect(self._p2p, PeerID(peer_id), [f"/ip4/{seen}/tcp/{port}"])
        others = list(self._suggest())[:MAX_OTHERS]
        return BytesValue(value=msgpack.packb({"reached": reached, "seen": seen, "others": others}))


async def seen_at(p2p: P2P, peer_id: PeerID) -> list[str]:
    """The IPv4 addresses at the other ends of our connections with a peer."""
    found = [info.addrs for info in await p2p.list_peers() if info.peer_id == peer_id]
    return [ip for addresses in found for ip in (ip_of(str(address)) for address in addresses) if ip]


async def disconnect(p2p: P2P, peer_id: PeerID) -> None:
    """Close all connections with a peer, if there are any."""
    try:
        await p2p._client.disconnect(peer_id)
    except Exception as error:  # there was none
        logging.debug("%s: %r", peer_id, error)


async def connect(p2p: P2P, peer_id: PeerID, addresses: Sequence[str]) -> bool:
    """Whether there is a connection with a peer, new or old."""
    try:
        maddrs = [to_multiaddr(address) for address in addresses]
        await asyncio.wait_for(p2p._client.connect(peer_id, maddrs), DIAL_S)
    except Exception as error:  # hivemind raises several types when nobody answers
        logging.info("%s cannot be dialled at %s: %r", peer_id, ", ".join(addresses), error)
        return False
    return True


# ---------------------------------------------------------------------- the scout's side


async def ask_witnesses(
    scout: P2P,
    identity: Identity,
    port: int,
    peers: Mapping[str, Sequence[str]],
    own: P2P | None = None,
) -> list[Finding]:
    """Have peers ({peer id: its addresses}) dial `identity`'s daemon at TCP `port`, which is `own`.

    It dials them first: who has dialled it in vain while it was down waits ever longer before it tries again, and
    forgets that when it is called.

    Peers that see us from this machine or its own network know little of the rest of the world: whom they suggest is
    asked too.
    """
    first = dict(list(outside_first(peers).items())[:MAX_WITNESSES])
    found = await _ask_all(scout, identity, port, first, own)
    if not any(is_public(finding.seen) for finding in found):
        suggested = by_peer([address for finding in found for address in finding.others])
        more = {peer: suggested[peer] for peer in suggested if peer not in first and peer != identity.peer_id}
        found += await _ask_all(scout, identity, port, dict(list(more.items())[:MAX_WITNESSES]), own)
    return found


async def _ask_all(
    scout: P2P, identity: Identity, port: int, peers: Mapping[str, Sequence[str]], own: P2P | None
) -> list[Finding]:
    answers = await asyncio.gather(
        *(_ask(scout, identity, port, peer, addresses, own) for peer, addresses in peers.items())
    )
    return [answer for answer in answers if answer is not None]


async def _ask(
    scout: P2P, identity: Identity, port: int, peer: str, addresses: Sequence[str], own: P2P | None
) -> Finding | None:
    witness = PeerID.from_base58(peer)
    if own is not None:
        await connect(own, witness, addresses)
    if not await connect(scout, witness, addresses):
        return None
    request = pack_request(identity, port, witness.to_bytes(), scout.peer_id.to_bytes())
    try:
        stub = Witness.get_stub(scout, witness)
        reply = await stub.rpc_dial_back(BytesValue(value=request), timeout=ASK_S)
        fields = msgpack.unpackb(reply.value)
        others = tuple(str(address) for address in fields["others"][:MAX_OTHERS])
        return Finding(fields["reached"] is True, str(ipaddress.IPv4Address(fields["seen"])), others)
    except Exception as error:  # it is gone, or answers nonsense: no witness
        logging.info("%s did not say whether it can dial us: %r", peer, error)
        return None


def judge(found: Sequence[Finding]) -> str:
    """DIRECT or CLIENT. Who sees us from farther away knows better; with nobody's word, CLIENT is what always works."""
    outside = [t for t in found if is_public(t.seen)]
    near = [t for t in found if not is_loopback(t.seen)]
    return DIRECT if any(t.reached for t in outside or near or found) else CLIENT


# ---------------------------------------------------------------------- the request


def pack_request(identity: Identity, port: int, witness: bytes, scout: bytes) -> bytes:
    """Signed by the peer that is to be dialled; good for one witness and one scout only."""
    signature = identity.key.sign(_message(port, witness, scout))
    packed = msgpack.packb({"peer": identity.peer_id_bytes, "port": port, "signature": signature})
    assert isinstance(packed, bytes)
    return packed


def _parse_request(raw: bytes, witness: bytes, scout: bytes) -> tuple[bytes, int]:
    """The peer id and port to dial. Raises ValueError when the request is not that peer's."""
    try:
        fields: dict[str, Any] = msgpack.unpackb(raw)
        peer_id, port, signature = fields["peer"], fields["port"], fields["signature"]
        fits = (
            isinstance(peer_id, bytes)
            and isinstance(signature, bytes)
            and isinstance(port, int)
            and 0 < port < 2**16
            and peer_id not in (witness, scout)
            and verify(peer_id, _message(port, witness, scout), signature)
        )
    except Exception:  # msgpack raises half a dozen types on hostile bytes
        fits = False
    if not fits:
        raise ValueError("not a request of that peer")
    return peer_id, port


def _message(port: int, witness: bytes, scout: bytes) -> bytes:
    packed = msgpack.packb([_DOMAIN, port, witness, scout])
    assert isinstance(packed, bytes)
    return packed
