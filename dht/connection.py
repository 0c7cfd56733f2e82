"""How this machine comes to stand in the DHT: its daemon, its node, and whether others can dial it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID

from dtrain.dht.identity import Identity, load_or_create
from dtrain.dht.reachability import (
    CLIENT,
    DIRECT,
    Finding,
    ask_witnesses,
    best_first,
    by_peer,
    connect,
    disconnect,
    ip_of,
    is_loopback,
    is_public,
    judge,
    seen_at,
)
from dtrain.dht.records import SignedRecords
from dtrain.dht.streams import in_background
from dtrain.dht.transport import TransportError, nobody_answers, start_daemon

KEEP_PERIOD_S = 0.5
TRY_AGAIN_S = 5.0
MAX_KNOWN_PEERS = 64


@dataclass
class Connection:
    """Our place in the DHT. Peers are {peer id: its libp2p addresses, without the id}."""

    p2p: P2P
    node: DHTNode
    reach: str  # "direct" or "client": whether others can dial us
    addresses: list[str]  # where newcomers can join: here, or where we joined if nobody can dial us
    known: dict[str, list[str]] = field(default_factory=dict)  # peers that can be dialled, newest last
    # Loop time before which a peer is not dialled again.
    _try_again: dict[str, float] = field(default_factory=dict)

    async def keep(self, seen: Callable[[], Sequence[str]]) -> None:
        """Stay in touch with the peers whose addresses `seen()` gives. Runs until cancelled."""
        said: dict[str, list[str]] = {}
        while True:
            await asyncio.sleep(KEEP_PERIOD_S)
            now = by_peer(seen())
            for peer in [peer for peer in now if said.get(peer, now[peer]) != now[peer]]:
                await self._follow(peer, now[peer])
            await self._meet_all(now)
            said.update(now)
            self.known = dict([*(self.known | now).items()][-MAX_KNOWN_PEERS:])
            if not self.node.protocol.routing_table.uid_to_peer_id:
                await self._find_back()

    async def _meet_all(self, now: Mapping[str, Sequence[str]]) -> None:
        """Connect to everybody who is there. Two newcomers that joined through the same peer know nothing of each
        other's whereabouts but what their heartbeats say."""
        connected = {str(info.peer_id) for info in await self.p2p.list_peers()}
        own, clock = str(self.p2p.peer_id), asyncio.get_running_loop().time()
        for peer, addresses in now.items():
            if peer != own and peer not in connected and clock >= self._try_again.get(peer, 0.0):
                self._try_again[peer] = clock + TRY_AGAIN_S
                in_background(connect(self.p2p, PeerID.from_base58(peer), addresses))

    async def _follow(self, peer: str, addresses: Sequence[str]) -> None:
        """A peer has moved: our connections to where it was look alive for most of a minute, and lead nowhere."""
        seen = await seen_at(self.p2p, PeerID.from_base58(peer))
        logging.info("%s has moved from %s to %s", peer, ", ".join(seen) or "none", ", ".join(addresses))
        if not {ip_of(address) for address in addresses}.issuperset(seen):
            await disconnect(self.p2p, PeerID.from_base58(peer))
            await connect(self.p2p, PeerID.from_base58(peer), addresses)

    async def _find_back(self) -> None:
        """We have lost all of the DHT: hivemind's node forgets a peer that once was slow to answer, and nobody finds
        us who does not know us."""
        for peer in await connect_all(self.p2p, self.known):
            await self.node.protocol.call_ping(PeerID.from_base58(peer))


async def attach(
    identity: Identity, private_folder: Path, *, host: str, port: int, peers: Sequence[str], before: str = ""
) -> Connection:
    """Join the DHT through `peers`, or begin it when there are none.

    `before` is our reach of last time when we come back to a run; then we stand alone if nobody answers, until somebody
    does. Raises TransportError otherwise, with a line for the user.
    """
    known = by_peer(peers)
    known.pop(identity.peer_id, None)
    if peers and not known and not before:
        raise TransportError(nobody_answers(peers))
    p2p, reach, own = await _start(identity, private_folder, host, port, known, before)
    try:
        reached = await connect_all(p2p, known)
        if known and not reached and not before:
            raise TransportError(nobody_answers(peers))
        through = _full({peer: known[peer] for peer in reached})
        node = await _join(p2p, identity, through, reach, strict=not before)
    except BaseException:
        p2p._terminate()
        raise
    return Connection(p2p, node, reach, best_first(own or through), known)


async def _start(
    identity: Identity,
    private_folder: Path,
    host: str,
    port: int,
    known: Mapping[str, Sequence[str]],
    before: str,
) -> tuple[P2P, str, list[str]]:
    """A daemon connected with nobody yet; our reach, which it suits; the addresses at which others can dial it."""
    reach, forwarded = "", []
    if ipaddress.IPv4Address(host).is_loopback:
        places = [place for peer in known.values() for place in peer]
        reach = CLIENT if places and not any(is_loopback(ip_of(place)) for place in places) else DIRECT
    elif not known:
        reach = before or DIRECT  # there is nobody to ask
    if reach == CLIENT:
        return await start_daemon(identity, host=host, port=0, dialable=False), reach, []
    p2p = await start_daemon(identity, host=host, port=port)
    own = [str(address) for address in await p2p.get_visible_maddrs()]
    if not reach:
        listening = own[0].split("/tcp/")[1].split("/")[0]
        found = await _ask_around(identity, private_folder, int(listening), known)
        reach = judge(found) if found or not before else before
        # Public addresses at which others reach us though they are not this machine's: its router forwards the port.
        seen = {finding.seen for finding in found if finding.reached and is_public(finding.seen)}
        ips = sorted(seen - {ip_of(address) for address in own})
        forwarded = [f"/ip4/{ip}/tcp/{listening}/p2p/{identity.peer_id}" for ip in ips]
    if reach == DIRECT:
        return p2p, reach, forwarded + own
    await p2p.shutdown()
    return await start_daemon(identity, host=host, port=0, dialable=False), reach, []


async def _ask_around(
    identity: Identity, private_folder: Path, listening: int, known: Mapping[str, Sequence[str]]
) -> list[Finding]:
    """Whether `known` peers can dial us. The scout is a daemon of a moment's identity."""
    scout = await start_daemon(load_or_create(private_folder / "scout.key"), host="", port=0, dialable=False)
    try:
        return await ask_witnesses(scout, identity, listening, known)
    finally:
        await scout.shutdown()


async def connect_all(p2p: P2P, peers: Mapping[str, Sequence[str]]) -> list[str]:
    """Ids of the peers with which there is a connection now."""
    made = await asyncio.gather(*(connect(p2p, PeerID.from_base58(p), places) for p, places in peers.items()))
    return [peer for peer, is_there in zip(peers, made) if is_there]


async def _join(p2p: P2P, identity: Identity, peers: Sequence[str], reach: str, *, strict: bool) -> DHTNode:
    try:
        return await DHTNode.create(
            p2p=p2p,
            initial_peers=list(peers) or None,
            record_validator=SignedRecords(identity),
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            client_mode=reach == CLIENT,
            ensure_bootstrap_success=strict,
            strict=strict,
        )
    except Exception as error:  # hivemind raises several types when nobody answers
        logging.info("joining the DHT failed", exc_info=True)
        raise TransportError(f"the given peers do not answer: {str(error)[:300]}") from None


def _full(peers: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{place}/p2p/{peer}" for peer, places in peers.items() for place in places]
