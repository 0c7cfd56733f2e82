"""Finished rounds: what this member knows of them, kept a while for stragglers.

A worker that missed a round fetches that round's aggregates (a few payloads) and applies them, instead of downloading
theta anew.
"""

from __future__ import annotations

import hashlib
import logging
import operator
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgpack

from dtrain.compression.codec import Codec
from dtrain.dht.seals import Seal, Setting
from dtrain.dht.streams import Call, StreamError, ask

KEPT_ROUNDS = 64
KEPT_BYTES = 256 * 1024 * 1024
MAX_PROOF_BYTES = 1024 * 1024
MAX_GROUP = 1024  # members whose contributions a past round may hold


@dataclass(frozen=True)
class RoundRecord:
    """How a round ended for this member. Spans and `undelivered` are [first chunk, number of chunks]."""

    round: int
    base_digest: bytes  # digest of the theta that the aggregates apply to
    members: list[str]
    contributors: list[str] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    aggregates: list[bytes] = field(default_factory=list)  # one per span
    undelivered: list[list[int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    proof: bytes = (
        b""  # that its reducers made these aggregates for just this round, see `prove`; "" = there is none
    )
    stale: bool = False  # the group's majority stands on another theta than we do
    wait_s: float = 0.0
    exchange_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def content(self) -> dict[str, Any]:
        """What is the same for all members."""
        fields = ("contributors", "spans", "aggregates", "proof")
        return {name: getattr(self, name) for name in fields}

    def without(self, member: str, codec: Codec) -> list[list[int]]:
        """The ranges of chunks in which that member's payload is in no aggregate."""
        index = self.members.index(member)
        inside = [
            (first, first + count)
            for (first, count), aggregate in zip(self.spans, self.aggregates)
            if index in dict(codec.contributors(aggregate))
        ]
        edges = [0, *(edge for span in inside for edge in span), codec.num_chunks]
        return [[a, b - a] for a, b in zip(edges[::2], edges[1::2]) if a < b]


class RoundHistory:
    """The newest finished rounds, bounded in number and bytes."""

    def __init__(self) -> None:
        self._records: OrderedDict[int, RoundRecord] = OrderedDict()

    def keep(self, record: RoundRecord) -> None:
        self._records[record.round] = record
        size = sum(len(a) for kept in self._records.values() for a in kept.aggregates)
        while len(self._records) > 1 and (len(self._records) > KEPT_ROUNDS or size > KEPT_BYTES):
            _, dropped = self._records.popitem(last=False)
            size -= sum(len(a) for a in dropped.aggregates)

    def get(self, round: int) -> RoundRecord | None:
        """A round that is kept here."""
        return self._records.get(round)

    def reply(self, round: object) -> tuple[dict[str, Any], bytes]:
        """What a straggler gets that asks for `round`. Raises StreamError when it is not kept."""
        record = self._records.get(round) if isinstance(round, int) else None
        if record is None:
            raise StreamError("that round is not kept here")
        return packed(record)


def packed(record: RoundRecord) -> tuple[dict[str, Any], bytes]:
    """A past round as it travels: header and aggregates, which `parse_round` takes."""
    spans = [[*span, len(aggregate)] for span, aggregate in zip(record.spans, record.aggregates)]
    header = {"base": record.base_digest, "members": record.members, "contributors": record.contributors}
    blob = b"".join([*record.aggregates, record.proof])
    return {**header, "spans": spans, "proof": len(record.proof)}, blob


def parse_round(round: int, reply: dict[str, Any], blob: bytes) -> RoundRecord:
    """The other end of `packed`: spans in order and disjoint, the aggregates themselves yet unchecked.

    Raises StreamError on a bad form.
    """
    try:
        members, contributors = [str(m) for m in reply["members"]], [str(c) for c in reply["contributors"]]
        base_digest = reply["base"]
        if not isinstance(base_digest, bytes) or len(base_digest) != 32:
            raise ValueError
        spans: list[list[int]] = []
        aggregates, offset, covered = [], 0, 0
        for span in reply["spans"]:
            first, count, size = map(operator.index, span)
            if first < covered or count < 1 or not 0 < size <= len(blob) - offset:
                raise ValueError
            spans.append([first, count])
            aggregates.append(blob[offset : offset + size])
            offset, covered = offset + size, first + count
        proof = blob[offset:]
        if len(proof) != reply.get("proof", 0) or len(proof) > MAX_PROOF_BYTES:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise StreamError("a malformed past round") from None
    return RoundRecord(round, base_digest, members, contributors, spans, aggregates, proof=proof)


def is_same(one: RoundRecord, other: RoundRecord) -> bool:
    """Whether two say the same of what became of theta in a round."""
    fields = ("round", "base_digest", "members", "spans", "aggregates")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def prove(setting: Setting, seals: Sequence[Seal]) -> bytes:
    """What shows others that the reducers of a round made its aggregates: their seals, in the order of the spans."""
    proof = msgpack.packb([setting.pack(), [seal.pack() for seal in seals]])
    assert isinstance(proof, bytes)
    return proof


def signers(record: RoundRecord, run_tag: bytes) -> list[str]:
    """By span, the peer whose signature bears out the aggregate, in a group of just these members on just this theta;
    [] when one is missing or wrong."""
    try:
        packed_setting, seals = msgpack.unpackb(record.proof)
        setting, found = Setting.unpack(packed_setting), []
        place = setting.run, setting.round, setting.base_digest, [peer for peer, _ in setting.members]
        fits = place == (run_tag, record.round, record.base_digest, record.members)
        for packed_seal, span, aggregate in zip(seals, record.spans, record.aggregates, strict=True):
            seal = Seal.unpack(packed_seal)
            content = hashlib.sha256(aggregate).digest()
            fits = fits and (seal.setting, list(seal.span), seal.aggregate) == (setting.digest, span, content)
            fits = fits and seal.reducer in record.members
            found.append(seal.reducer)
    except Exception:  # msgpack and what follows raise half a dozen types
        return []
    return found if fits else []


async def fetch_round(call: Call, codec: Codec, run_tag: bytes, round: int, timeout_s: float) -> RoundRecord:
    """A past round from another peer, checked. Raises StreamError, PayloadError, or hivemind's errors."""
    limit = codec.max_aggregate_bytes(0, codec.num_chunks, MAX_GROUP) + MAX_PROOF_BYTES
    reply, blob = await ask(call, {"round": round}, max_bytes=limit, timeout_s=timeout_s)
    past = parse_round(round, reply, blob)
    for (first, count), aggregate in zip(past.spans, past.aggregates):
        codec.check_aggregate(
            aggregate,
            run=run_tag,
            round=round,
            first_chunk=first,
            num_chunks=count,
            num_members=len(past.members),
        )
    return past


async def as_others_have_it(
    ours: RoundRecord,
    own: str,
    codec: Codec,
    fetch: Callable[[str, int], Awaitable[RoundRecord]],
    bears_out: Callable[[RoundRecord], bool],
) -> RoundRecord:
    """The record of a member that was frozen: how the round went on without it only the others know.

    `fetch(peer id, round)` is `fetch_round` from that peer, `bears_out(record)` whether the group's reducers signed
    what it says. When nobody can tell, the record is a stale one.
    """
    for peer_id in ours.members:
        if peer_id == own:
            continue
        try:
            theirs = await fetch(peer_id, ours.round)
        except Exception as error:  # gone, or it has no such round
            logging.info("%s cannot tell how round %d went: %r", peer_id, ours.round, error)
            continue
        if (theirs.members, theirs.base_digest) == (ours.members, ours.base_digest) and bears_out(theirs):
            return replace(ours, **theirs.content(), undelivered=theirs.without(own, codec))
    return replace(ours, stale=True)
