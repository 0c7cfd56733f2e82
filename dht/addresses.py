"""libp2p addresses (`/ip4/20.0.0.1/tcp/31000/p2p/PEER`), as far as we look into them: IPv4 only."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import base58
from hivemind.utils.multiaddr import Multiaddr

CIRCUIT = "/p2p-circuit"  # in an address that leads through a relay
_P2P, _P2P_CIRCUIT = b"\xa5\x03", b"\xa2\x02"  # multiaddr's codes, as varints


def by_peer(addresses: Sequence[str]) -> dict[str, list[str]]:
    """{peer id: its addresses}. An address that is none, or names no peer, is left out."""
    found: dict[str, list[str]] = {}
    for address in addresses:
        place, _, peer = address.rpartition("/p2p/")
        try:
            Multiaddr(address)
            base58.b58decode(peer)
        except Exception:  # the library raises many types
            continue
        if place:
            found.setdefault(peer, []).append(place)
    return found


def to_multiaddr(place: str) -> Multiaddr:
    """An address without the peer's id, as the daemon reads it: hivemind writes a relay's id in a form of its own."""
    before, is_relayed, _ = place.partition(CIRCUIT)
    if not is_relayed:
        return Multiaddr(place)
    where, _, relay = before.rpartition("/p2p/")
    peer_id = base58.b58decode(relay)
    return Multiaddr(Multiaddr(where).to_bytes() + _P2P + bytes([len(peer_id)]) + peer_id + _P2P_CIRCUIT)


def ip_of(address: str) -> str:
    """The IPv4 address in a libp2p address, or ""."""
    parts = address.split("/")
    try:
        return str(ipaddress.IPv4Address(parts[2])) if parts[1] == "ip4" else ""
    except (IndexError, ValueError):
        return ""


def is_public(ip: str) -> bool:
    """Whether that address is one of the whole internet's."""
    return ipaddress.IPv4Address(ip).is_global


def is_loopback(ip: str) -> bool:
    """Whether that is this very machine; "" is not."""
    return bool(ip) and ipaddress.IPv4Address(ip).is_loopback


def best_first(addresses: Sequence[str]) -> list[str]:
    """libp2p addresses, public ones first, loopback last."""

    def rank(address: str) -> int:
        ip = ip_of(address)
        return 2 if not ip else 0 if is_public(ip) else 3 if is_loopback(ip) else 1

    return sorted(addresses, key=rank)


def outside_first(peers: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The same peers, those with a public address first."""

    def has_none(item: tuple[str, Sequence[str]]) -> bool:
        return not any(is_public(ip_of(a) or "127.0.0.1") for a in item[1])

    return dict(sorted(peers.items(), key=has_none))


def full(peers: Mapping[str, Sequence[str]]) -> list[str]:
    """The opposite of `by_peer`."""
    return [f"{place}/p2p/{peer}" for peer, places in peers.items() for place in places]
