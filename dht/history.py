"""Finished rounds: what this member knows of them, kept a while for stragglers.

A worker that missed a round fetches that round's aggregates (a few payloads) and applies them, instead of downloading
theta anew.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from dtrain.compression.codec import Codec
from dtrain.dht.streams import StreamError

KEPT_ROUNDS = 64
KEPT_BYTES = 256 * 1024 * 1024


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
    stale: bool = False  # the group's majority stands on another theta than we do
    wait_s: float = 0.0
    exchange_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def content(self) -> dict[str, Any]:
        """What is the same for all members."""
        return {"contributors": self.contributors, "spans": self.spans, "aggregates": self.aggregates}

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

    def reply(self, round: object) -> tuple[dict[str, Any], bytes]:
        """What a straggler gets that asks for `round`. Raises StreamError when it is not kept."""
        record = self._records.get(round) if isinstance(round, int) else None
        if record is None:
            raise StreamError("that round is not kept here")
        spans = [[*span, len(aggregate)] for span, aggregate in zip(record.spans, record.aggregates)]
        reply = {"base": record.base_digest, "members": record.members, "contributors": record.contributors}
        reply["spans"] = spans
        return reply, b"".join(record.aggregates)


def parse_round(round: int, reply: dict[str, Any], blob: bytes) -> RoundRecord:
    """The other end of `RoundHistory.reply`: spans in order and disjoint, the aggregates themselves yet unchecked.

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
        if offset != len(blob):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise StreamError("a malformed past round") from None
    return RoundRecord(round, base_digest, members, contributors, spans, aggregates)
