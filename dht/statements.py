"""What a member tells its group of the others (`compression/standing.py`), as it travels in its hello.

8 bytes for each peer, in the order of the peers' marks:

    4  mark of the peer: hash of its id and the digest of the theta that all stand on
    1  rounds in which its contribution was seen counted, plus 128 if it is accused
    3  mark of the network that it is connected from, hashed likewise; zeros if that is not known

Marks change with every round, so nobody can make a key whose mark is another's; and addresses are not passed on.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping

from hivemind.p2p import P2P

from dtrain.compression.standing import PROBATION, Said, Statement
from dtrain.dht.addresses import CIRCUIT, best_first

ENTRY_BYTES, MARK_BYTES, NETWORK_BYTES = 8, 4, 3
MAX_PEERS = 512  # that one statement is about
MAX_OUT = 4096
ACCUSES = 128
_UNKNOWN = bytes(NETWORK_BYTES)


def pack(said: Mapping[str, Said], base_digest: bytes) -> bytes:
    """What is said of peers, by peer id; of MAX_PEERS at most."""
    entries = sorted(
        mark(peer, base_digest)
        + bytes([min(PROBATION, words.rounds) + ACCUSES * words.accuses])
        + (_hash(b"network", words.network, base_digest)[:NETWORK_BYTES] if words.network else _UNKNOWN)
        for peer, words in said.items()
    )
    return b"".join(entries[:MAX_PEERS])


def unpack(packed: object, num_out: object, peers: Iterable[str], base_digest: bytes) -> Statement:
    """The other end, of these peers. What does not fit says nothing: the whole if it has not the form of a statement,
    else of the one peer that it is about."""
    fits = isinstance(packed, bytes) and len(packed) <= ENTRY_BYTES * MAX_PEERS
    if not isinstance(packed, bytes) or not fits or len(packed) % ENTRY_BYTES:
        return Statement()
    if type(num_out) is not int or not 0 <= num_out <= MAX_OUT:
        return Statement()
    by_mark: dict[bytes, Said | None] = {}
    for at in range(0, len(packed), ENTRY_BYTES):
        entry = packed[at : at + ENTRY_BYTES]
        rounds, network = entry[MARK_BYTES] % ACCUSES, entry[MARK_BYTES + 1 :]
        words = Said(rounds, b"" if network == _UNKNOWN else network, entry[MARK_BYTES] >= ACCUSES)
        peer_mark = entry[:MARK_BYTES]
        by_mark[peer_mark] = words if rounds <= PROBATION and peer_mark not in by_mark else None
    of = {peer: by_mark.get(mark(peer, base_digest)) for peer in peers}
    return Statement({peer: words for peer, words in of.items() if words is not None}, num_out)


def mark(peer_id: str, base_digest: bytes) -> bytes:
    """Of a peer, in a round that begins with that theta."""
    return _hash(b"peer", peer_id.encode(), base_digest)[:MARK_BYTES]


def _hash(kind: bytes, name: bytes, base_digest: bytes) -> bytes:
    return hashlib.sha256(kind + base_digest + name).digest()


# ---------------------------------------------------------------------- networks


async def networks(p2p: P2P) -> dict[str, bytes]:
    """By peer id, from which network it is connected with us, as our daemon knows it. Not of those behind a relay."""
    found: dict[str, list[str]] = {}
    for info in await p2p.list_peers():
        found.setdefault(str(info.peer_id), []).extend(map(str, info.addrs))
    named = {peer: network_of(addresses) for peer, addresses in found.items()}
    return {peer: network for peer, network in named.items() if network}


def network_of(addresses: Iterable[str]) -> bytes:
    """The first 24 bits of an IPv4 address, 48 of an IPv6 one: of libp2p addresses of the most public; else b""."""
    for address in best_first([address for address in addresses if CIRCUIT not in address]):
        parts = address.split("/")
        try:
            ip = ipaddress.ip_address(parts[2])
        except (IndexError, ValueError):  # a name, or none at all
            continue
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return ip.packed[:3] if ip.version == 4 else ip.packed[:6]
    return b""
