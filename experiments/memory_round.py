"""One round of one group, reduced in memory: the same cuts, checks and sums as over the network, without a
network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError


@dataclass(frozen=True)
class Contribution:
    """What one member brings to a round."""

    peer_id: str
    base_digest: bytes
    """Digest of the theta that the payload was made on."""
    payload: bytes
    weight: float
    """Tokens trained this round."""


@dataclass(frozen=True)
class Faults:
    """Planned losses, by round number and peer id."""

    sections: frozenset[tuple[int, str, str]] = frozenset()
    """(round, sender, reducer): the sender's section never reaches this reducer."""
    spans: frozenset[tuple[int, str]] = frozenset()
    """(round, reducer): the reducer's aggregate reaches nobody."""


@dataclass
class Reduced:
    """How a round ended. Peer ids are the keys; a missing key means nothing to report."""

    aggregates: list[bytes] = field(default_factory=list)
    contributors: set[str] = field(default_factory=set)
    undelivered: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    bytes_up: Counter[str] = field(default_factory=Counter)
    bytes_down: Counter[str] = field(default_factory=Counter)


def agree_on_digest(entries: Sequence[Contribution]) -> bytes:
    """The theta that most entrants stand on; ties go to more weight, then to the smaller digest."""

    def rank(digest: bytes) -> tuple[int, float, tuple[int, ...]]:
        weights = [entry.weight for entry in entries if entry.base_digest == digest]
        return len(weights), sum(weights), tuple(-byte for byte in digest)

    return max({entry.base_digest for entry in entries}, key=rank)


class GroupReducer:
    """Reduces rounds; keeps each reducer's residual from round to round."""

    def __init__(self, codec: Codec, run: bytes, exact_up_to: int, faults: Faults) -> None:
        self._codec = codec
        self._run = run
        self._exact_up_to = max(1, exact_up_to)  # recompression gains nothing for a worker that is alone
        self._faults = faults
        self._residuals: dict[str, Tensor] = {}

    def reduce(self, round: int, members: Sequence[Contribution]) -> Reduced:
        """Reduce the payloads of `members`, given in canonical order: each owns a span of equal share."""
        result = Reduced()
        if not members:
            return result
        for member, span in zip(members, self._codec.spans([1.0] * len(members)), strict=True):
            if span[1] > 0:
                self._reduce_span(round, members, member.peer_id, span, result)
        return result

    def _reduce_span(
        self,
        round: int,
        members: Sequence[Contribution],
        reducer: str,
        span: tuple[int, int],
        result: Reduced,
    ) -> None:
        first, count = span
        sections = []
        for index, member in enumerate(members):
            section = self._section(round, member, reducer, span, result)
            if section is not None:
                sections.append((index, member.weight, section))
        aggregate = b""
        if sections:
            aggregate = self._codec.reduce(
                sections,
                residual=self._residual(reducer, first, count) if len(members) > self._exact_up_to else None,
                run=self._run,
                round=round,
                first_chunk=first,
                num_chunks=count,
            )
        if not aggregate or (round, reducer) in self._faults.spans:
            for member in members:
                _report(result, member.peer_id, span, f"the span of {reducer} is lost")
            return
        self._codec.check_aggregate(
            aggregate,
            run=self._run,
            round=round,
            first_chunk=first,
            num_chunks=count,
            num_members=len(members),
        )
        result.aggregates.append(aggregate)
        result.contributors.update(members[index].peer_id for index, _, _ in sections)
        for member in members:
            if member.peer_id != reducer:
                result.bytes_up[reducer] += len(aggregate)
                result.bytes_down[member.peer_id] += len(aggregate)

    def _section(
        self, round: int, member: Contribution, reducer: str, span: tuple[int, int], result: Reduced
    ) -> bytes | None:
        first, count = span
        try:
            section = self._codec.cut(member.payload, first, count)
            self._codec.check(section, run=self._run, round=round, first_chunk=first, num_chunks=count)
        except PayloadError as error:
            _report(result, member.peer_id, span, f"{reducer} refused a section of {member.peer_id}: {error}")
            return None
        if member.peer_id != reducer:
            result.bytes_up[member.peer_id] += len(section)
            if (round, member.peer_id, reducer) in self._faults.sections:
                _report(result, member.peer_id, span, f"{reducer} did not get a section of {member.peer_id}")
                return None
            result.bytes_down[reducer] += len(section)
        return section

    def _residual(self, reducer: str, first: int, count: int) -> Tensor:
        """The part of the reducer's residual that lies in the span. Spans move as members come and go; what
        was left over in one place waits there until the reducer owns that place again."""
        if reducer not in self._residuals:
            self._residuals[reducer] = self._codec.residual(0, self._codec.num_chunks)
        return self._residuals[reducer][self._codec.layout.elements(first, count)]


def _report(result: Reduced, peer_id: str, span: tuple[int, int], problem: str) -> None:
    ranges = result.undelivered.setdefault(peer_id, [])
    if span not in ranges:
        ranges.append(span)
    result.problems.setdefault(peer_id, []).append(problem)
