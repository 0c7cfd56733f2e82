"""Who takes part in a round: what members say of themselves while they meet, and how the group agrees on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from dtrain.dht.reachability import CLIENT, DIRECT, RELAYED
from dtrain.dht.uplink import MAX_MBPS

PROTOCOL_VERSION = 4
MIN_WEIGHT = 1e-9  # tokens; the codec refuses to reduce weights below it


@dataclass(frozen=True)
class Contribution:
    """What a worker brings to a round: its payload, weighted in tokens, made on top of the theta of that digest."""

    round: int
    base_digest: bytes
    payload: bytes
    weight: float
    was_sent: bool = False  # by a network process that died: the round may hold it already


@dataclass(frozen=True)
class Member:
    """One peer of the group, as every member of the group sees it."""

    peer_id: str
    weight: float
    reduces: bool  # who cannot be called owns no span; who can through a relay only, one if nobody else can
    mbps: float = 0.0  # of its uplink, 0 = not known


def pack_hello(contribution: Contribution, *, reach: str, mbps: float = 0.0, shown: bytes = b"") -> bytes:
    """What a peer tells its group while matchmaking; `shown` is its pass, where the run admits by token."""
    fields = {
        "version": PROTOCOL_VERSION,
        "round": contribution.round,
        "digest": contribution.base_digest,
        "weight": float(contribution.weight),
        "reach": reach,
        "mbps": mbps,
    }
    hello = msgpack.packb({**fields, "pass": shown} if shown else fields)
    assert isinstance(hello, bytes)
    return hello


def agree_on_members(
    peer_ids: Sequence[object],
    gathered: Sequence[bytes],
    round: int,
    max_weight: float = 1e12,
    proves: Callable[[str, object], bool] = lambda peer_id, shown: True,
) -> list[Member]:
    """The largest set of groupmates that stand at `round` with one base digest, in canonical order.

    Everybody in the group got the same metadata from the leader, so everybody comes to the same answer. Ties go to
    the set with more weight, then to the smaller digest. A set in which nobody can be called cannot reduce.
    `proves(peer id, pass)` tells whether a peer has a right to be here that no member can doubt.
    """
    reaches: dict[str, str] = {}
    sets: dict[bytes, list[Member]] = {}
    for peer_id, raw in zip(peer_ids, gathered):
        hello = _parse_hello(raw, max_weight)
        if hello is not None and hello["round"] == round and proves(str(peer_id), hello.get("pass", b"")):
            reaches[str(peer_id)] = hello["reach"]
            member = Member(str(peer_id), hello["weight"], hello["reach"] != CLIENT, hello["mbps"])
            sets.setdefault(hello["digest"], []).append(member)
    sets = {digest: members for digest, members in sets.items() if any(m.reduces for m in members)}
    if not sets:
        return []

    def rank(digest: bytes) -> tuple[int, float, tuple[int, ...]]:
        members = sets[digest]
        return len(members), math.fsum(m.weight for m in members), tuple(-b for b in digest)

    members = sets[max(sets, key=rank)]
    # What a relay passes on it receives and sends: it is spared that where somebody else can reduce.
    if any(reaches[member.peer_id] == DIRECT for member in members):
        members = [replace(member, reduces=reaches[member.peer_id] == DIRECT) for member in members]
    return sorted(members, key=lambda member: member.peer_id)


def _parse_hello(raw: bytes, max_weight: float) -> dict[str, Any] | None:
    try:
        hello: dict[str, Any] = msgpack.unpackb(raw)
        fits = (
            hello["version"] == PROTOCOL_VERSION
            and isinstance(hello["round"], int)
            and isinstance(hello["digest"], bytes)
            and len(hello["digest"]) == 32
            and isinstance(hello["weight"], float)
            and MIN_WEIGHT <= hello["weight"] <= max_weight
            and hello["reach"] in (DIRECT, RELAYED, CLIENT)
            and isinstance(hello["mbps"], float)
            and 0 <= hello["mbps"] <= MAX_MBPS
        )
    except Exception:  # one peer's garbage must not fail the group
        return None
    return hello if fits else None
