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
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

from dtrain.dht.addresses import CIRCUIT, best_first, by_peer, full, ip_of, is_loopback, is_public
from dtrain.dht.distance import clock_skew
from dtrain.dht.identity import Identity, load_or_create
from dtrain.dht.reachability import (
    CLIENT,
    DIRECT,
    RELAYED,
    ask_witnesses,
    connect,
    disconnect,
    judge,
    seen_at,
)
from dtrain.dht.records import SignedRecords
from dtrain.dht.relay import FIRST_PATIENCE_S, PATIENCE_S, relayed_addresses, start_relayed, start_relaying
from dtrain.dht.roaming import LOOK_PERIOD_S, MachineWatch
from dtrain.dht.streams import in_background
from dtrain.dht.swarm_clock import SwarmClock, off_by
from dtrain.dht.transport import TransportError, nobody_answers, start_daemon

KEEP_PERIOD_S = 0.5
TRY_AGAIN_S = 5.0
MAX_KNOWN_PEERS = 64
MAX_ASKED = 3  # for the time
NEAR_PEERS = 20  # a look-up asks all of them at once: silent ones then cost it one time-out together
RELAY_PATIENCE = 6  # looks; a reservation is briefly away while it is renewed


@dataclass
class Connection:
    """Our place in the DHT. Peers are {peer id: its libp2p addresses, without the id}."""

    p2p: P2P
    node: DHTNode
    reach: str  # "direct", "relayed" or "client": whether and how others can call us
    addresses: list[str]  # where newcomers can join: here if others can call us, then where we joined
    watch: MachineWatch
    known: dict[str, list[str]] = field(default_factory=dict)  # peers that can be dialled, newest last
    # Loop time before which a peer is not dialled again.
    _try_again: dict[str, float] = field(default_factory=dict)

    async def keep(self, seen: Callable[[], Sequence[str]]) -> None:
        """Stay in touch with the peers whose addresses `seen()` gives. Runs until cancelled."""
        said: dict[str, list[str]] = {}
        here: set[str] = set()
        while True:
            await asyncio.sleep(KEEP_PERIOD_S)
            now = by_peer(seen())
            for peer in now.keys() & said.keys() - here:
                in_background(self._take_back(peer, now[peer]))
            here = set(now)
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
        relayed = any(CIRCUIT in address for address in addresses)
        if not relayed and not {ip_of(address) for address in addresses}.issuperset(seen):
            await disconnect(self.p2p, PeerID.from_base58(peer))
            await connect(self.p2p, PeerID.from_base58(peer), addresses)

    async def lost(self) -> str:
        """Wait until all must be made anew; why, in a line for the user."""
        relay = asyncio.create_task(self._lost_relay())
        try:
            while not (moved := self.watch.look()):
                done, _ = await asyncio.wait({relay}, timeout=LOOK_PERIOD_S)
                if done:
                    return "the relay through which others reached this machine is gone"
            return moved
        finally:
            relay.cancel()

    async def _lost_relay(self) -> None:
        """Wait until the address through which we told others to call us is gone."""
        gone = 0
        while gone < RELAY_PATIENCE:
            await asyncio.sleep(KEEP_PERIOD_S)
            is_there = self.reach != RELAYED or self.addresses[0] in await relayed_addresses(self.p2p)
            gone = 0 if is_there else gone + 1

    def may_be_cut_off(self) -> bool:
        """Whether others may be there though we see nobody: who can be dialled would hear from them."""
        return self.reach != DIRECT or self.watch.is_offline()

    async def _take_back(self, peer: str, addresses: Sequence[str]) -> None:
        """A peer is here again, which hivemind's node may have forgotten, and all that stand in the DHT behind it."""
        if await connect(self.p2p, PeerID.from_base58(peer), addresses):
            await self.node.protocol.call_ping(PeerID.from_base58(peer))

    async def _find_back(self) -> None:
        """We have lost all of the DHT: hivemind's node forgets a peer that once was slow to answer, and nobody finds
        us who does not know us."""
        for peer in await connect_all(self.p2p, self.known):
            await self.node.protocol.call_ping(PeerID.from_base58(peer))


async def attach(
    identity: Identity,
    private_folder: Path,
    *,
    host: str,
    port: int,
    peers: Sequence[str],
    before: str = "",
    passes_on: bool = True,
    relays: bool = True,
    announce: str = "",
    strict: bool = True,
    clock: SwarmClock | None = None,
) -> Connection:
    """Join the DHT through `peers`, or begin it when there are none.

    This machine `passes_on` for others if it can, and is reached through others' `relays` if nobody can dial it.
    `before` is our reach of last time when we come back to a run; then we stand alone if nobody answers, until somebody
    does. `clock` is put right by theirs. Raises TransportError otherwise, with a line for the user; unless `strict`,
    not when there are connections but no DHT over them, as where the clocks are too far apart.
    """
    known = by_peer(peers)
    known.pop(identity.peer_id, None)
    if peers and not known and not before:
        raise TransportError(nobody_answers(peers))
    p2p, reach, own = await start(
        identity, private_folder, host, port, known, before, passes_on, relays, announce
    )
    try:
        reached = await connect_all(p2p, known)
        if known and not reached and not before:
            raise TransportError(nobody_answers(peers))
        through = full({peer: known[peer] for peer in reached})
        skew_s = await clock_skew(p2p, reached[:MAX_ASKED])
        if clock is not None:
            clock.put_right(skew_s)
        try:
            node = await _join(p2p, identity, through, reach, strict=strict and not before)
        except TransportError:
            _blame_the_clock((skew_s or 0.0) - (clock.ahead_s if clock else 0.0))
            raise
    except BaseException:
        p2p._terminate()
        raise
    joinable = own if reach == DIRECT else own + through
    ips = {ip_of(place) for places in known.values() for place in places} - {""}
    return Connection(p2p, node, reach, best_first(joinable), MachineWatch(host, ips), known)


async def start(
    identity: Identity,
    private_folder: Path,
    host: str,
    port: int,
    known: Mapping[str, Sequence[str]],
    before: str,
    passes_on: bool,
    relays: bool,
    announce: str = "",
) -> tuple[P2P, str, list[str]]:
    """A daemon connected with nobody yet; our reach, which it suits; the addresses at which others can dial it."""
    if ipaddress.IPv4Address(host).is_loopback:
        places = [place for peer in known.values() for place in peer]
        if places and not any(is_loopback(ip_of(place)) for place in places):
            return await start_daemon(identity, host=host, port=0, dialable=False), CLIENT, []
        p2p = await start_daemon(identity, host=host, port=port, announce=announce)
        return p2p, DIRECT, await _listens_at(p2p)
    # A daemon of a moment's identity, which asks others to dial ours, and calls it through relays.
    scout = await start_daemon(load_or_create(private_folder / "scout.key"), host="127.0.0.1", port=0)
    try:
        return await _try_reaches(identity, scout, host, port, known, before, passes_on, relays)
    finally:
        await scout.shutdown()


async def _try_reaches(
    identity: Identity,
    scout: P2P,
    host: str,
    port: int,
    known: Mapping[str, Sequence[str]],
    before: str,
    passes_on: bool,
    relays: bool,
) -> tuple[P2P, str, list[str]]:
    """The best of direct, relayed and client that there is. See `start`."""
    p2p = await start_daemon(identity, host=host, port=port, passes_on=passes_on)
    own = await _listens_at(p2p)
    listening = int(own[0].split("/tcp/")[1].split("/")[0])
    found = await ask_witnesses(scout, identity, listening, known, p2p)
    # With nobody to ask we take it that we can be dialled; who comes back takes it that nothing has changed.
    is_direct = judge(found) == DIRECT if found or (known and not before) else before in ("", DIRECT)
    if is_direct:
        if passes_on and any(is_public(ip_of(address)) for address in own):
            p2p = await start_relaying(
                identity,
                scout,
                p2p,
                lambda: start_daemon(identity, host=host, port=listening, passes_on=True),
                patience_s=PATIENCE_S if known else FIRST_PATIENCE_S,
            )
        # Public addresses at which others reach us though they are not this machine's: its router forwards the port.
        seen = {finding.seen for finding in found if finding.reached and is_public(finding.seen)}
        ips = sorted(seen - {ip_of(address) for address in own})
        return p2p, DIRECT, [f"/ip4/{ip}/tcp/{listening}/p2p/{identity.peer_id}" for ip in ips] + own
    await p2p.shutdown()
    relayed = await start_relayed(identity, scout, host, port, known) if relays else None
    if relayed is not None:
        return relayed[0], RELAYED, relayed[1]
    return await start_daemon(identity, host=host, port=0, dialable=False), CLIENT, []


async def _listens_at(p2p: P2P) -> list[str]:
    return [str(address) for address in await p2p.get_visible_maddrs()]


async def connect_all(p2p: P2P, peers: Mapping[str, Sequence[str]]) -> list[str]:
    """Ids of the peers with which there is a connection now."""
    made = await asyncio.gather(*(connect(p2p, PeerID.from_base58(p), places) for p, places in peers.items()))
    return [peer for peer, is_there in zip(peers, made) if is_there]


def _blame_the_clock(skew_s: float) -> None:
    """TransportError if that is why these peers, with which we are connected, do not have us in the DHT."""
    if abs(skew_s) > MAX_DHT_TIME_DISCREPANCY_SECONDS:
        raise TransportError(
            f"this machine's clock is {off_by(skew_s)} the others': set it by the network "
            "(timedatectl set-ntp true on Linux), then try again"
        )


async def _join(p2p: P2P, identity: Identity, peers: Sequence[str], reach: str, *, strict: bool) -> DHTNode:
    try:
        return await DHTNode.create(
            p2p=p2p,
            initial_peers=list(peers) or None,
            record_validator=SignedRecords(identity),
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            bucket_size=NEAR_PEERS,
            num_workers=NEAR_PEERS,
            client_mode=reach != DIRECT,
            ensure_bootstrap_success=strict,
            strict=strict,
        )
    except Exception as error:  # hivemind raises several types when nobody answers
        logging.info("joining the DHT failed", exc_info=True)
        raise TransportError(f"the given peers do not answer: {str(error)[:300]}") from None
