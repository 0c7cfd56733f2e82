"""Who takes part in a round: what members say of themselves while they meet, and how the group agrees on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import msgpack

from dtrain.compression import standing
from dtrain.compression.standing import Candidate, Said
from dtrain.dht import statements
from dtrain.dht.reachability import CLIENT, DIRECT, RELAYED
from dtrain.dht.uplink import MAX_MBPS

PROTOCOL_VERSION = 5
MAX_HELLO_BYTES = 8 * 1024  # a pass and a statement are in it
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
    share: float = 1.0  # of its weight that counts, see compression/standing.py

    @property
    def counts(self) -> float:
        """Tokens that it is weighted by in every sum of the round."""
        return max(MIN_WEIGHT, self.weight * self.share)


@dataclass(frozen=True)
class Agreed:
    """What a group makes of its hellos."""

    members: list[Member]  # in canonical order
    accused: list[str]  # peer ids that would be members, had the others not accused them

    def apart(self, own: str, came: Sequence[str]) -> list[str]:
        """Of the peers that came those that stand on another theta than we do; none for who is accused."""
        ids = {member.peer_id for member in self.members}
        if own in ids:
            return sorted(set(came).difference(ids, self.accused))
        return sorted(ids) if own not in self.accused else []


@dataclass(frozen=True)
class Judging:
    """How a run's members judge each other by what they say of each other."""

    least: float = math.inf  # members that it takes; fewer are not judged
    max_share: float = 1.0  # of all that counts, for those that come from one place
    origin: Callable[[str, object], bytes] = lambda peer_id, shown: b""
    """(peer id, pass): where a peer's right to be here comes from, b"" if that tells nothing of where it comes from."""


def pack_hello(
    contribution: Contribution,
    *,
    reach: str,
    mbps: float = 0.0,
    shown: bytes = b"",
    said: Mapping[str, Said] = MappingProxyType({}),
    num_out: int = 0,
) -> bytes:
    """What a peer tells its group while matchmaking: `shown` is its pass, where the run admits by token, `said` what it
    says of other peers, `num_out` how many of them are put out."""
    fields = {
        "version": PROTOCOL_VERSION,
        "round": contribution.round,
        "digest": contribution.base_digest,
        "weight": float(contribution.weight),
        "reach": reach,
        "mbps": mbps,
    }
    if shown:
        fields["pass"] = shown
    if said or num_out:
        fields.update(said=statements.pack(said, contribution.base_digest), out=num_out)
    hello = msgpack.packb(fields)
    assert isinstance(hello, bytes)
    return hello


def agree_on_members(
    peer_ids: Sequence[object],
    gathered: Sequence[bytes],
    round: int,
    max_weight: float = 1e12,
    proves: Callable[[str, object], bool] = lambda peer_id, shown: True,
    judging: Judging = Judging(),  # frozen
) -> Agreed:
    """The largest set of groupmates that stand at `round` with one base digest, without those that they accuse.

    Everybody in the group got the same metadata from the leader, so everybody comes to the same answer. Ties go to
    the set with more weight, then to the smaller digest. A set in which nobody can be called cannot reduce.
    `proves(peer id, pass)` tells whether a peer has a right to be here that no member can doubt.
    """
    hellos: dict[str, dict[str, Any]] = {}
    sets: dict[bytes, list[Member]] = {}
    for peer_id, raw in zip(peer_ids, gathered):
        hello = _parse_hello(raw, max_weight)
        if hello is not None and hello["round"] == round and proves(str(peer_id), hello.get("pass", b"")):
            hellos[str(peer_id)] = hello
            member = Member(str(peer_id), hello["weight"], hello["reach"] != CLIENT, hello["mbps"])
            sets.setdefault(hello["digest"], []).append(member)
    sets = {digest: members for digest, members in sets.items() if any(m.reduces for m in members)}
    if not sets:
        return Agreed([], [])

    def rank(digest: bytes) -> tuple[int, float, tuple[int, ...]]:
        members = sets[digest]
        return len(members), math.fsum(m.weight for m in members), tuple(-b for b in digest)

    digest = max(sets, key=rank)
    members, accused = _judge(sets[digest], hellos, digest, judging)
    # What a relay passes on it receives and sends: it is spared that where somebody else can reduce.
    if any(hellos[member.peer_id]["reach"] == DIRECT for member in members):
        members = [replace(m, reduces=hellos[m.peer_id]["reach"] == DIRECT) for m in members]
    return Agreed(members, accused)


def _judge(
    members: list[Member], hellos: Mapping[str, dict[str, Any]], digest: bytes, judging: Judging
) -> tuple[list[Member], list[str]]:
    """Those that go on with their shares, in canonical order, and those that the others put out."""
    members = sorted(members, key=lambda member: member.peer_id)
    if len(members) < judging.least:
        return members, []
    ids = [member.peer_id for member in members]
    candidates = [
        Candidate(
            member.peer_id,
            member.weight,
            statements.unpack(hello.get("said", b""), hello.get("out", 0), ids, digest),
            judging.origin(member.peer_id, hello.get("pass", b"")),
        )
        for member in members
        for hello in [hellos[member.peer_id]]
    ]
    accused = standing.accused(candidates)
    if not any(member.reduces and member.peer_id not in accused for member in members):
        accused = []
    candidates = [candidate for candidate in candidates if candidate.peer_id not in accused]
    members = [member for member in members if member.peer_id not in accused]
    if len(members) < judging.least:
        return members, accused
    shares = standing.shares(candidates, judging.max_share)
    return [replace(member, share=shares[member.peer_id]) for member in members], accused


def _parse_hello(raw: bytes, max_weight: float) -> dict[str, Any] | None:
    if len(raw) > MAX_HELLO_BYTES:
        return None
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
