"""One round of one group, reduced in memory: the same cuts, checks and sums as over the network, without a
network.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.residual import Residual
from dtrain.compression.screen import REASONS, Section, screen
from dtrain.compression.verdicts import Sentence, Verdicts
from dtrain.experiments.memory_audit import CHEATS, Audits, Sum, mean_of
from dtrain.experiments.memory_links import INSTANT, Floats, Links

GUILTY_ROUNDS = 1000  # for which a reducer that is proven to cheat stays out
LATE_S = 3600.0  # no section takes longer
LEAVES_OUT = "leaves-out"
_Sections = dict[tuple[int, int], bytes]
"""By (index of the sender, index of the reducer)."""


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
    sums: Mapping[str, str] = field(default_factory=dict)
    """{reducer: kind of `memory_audit.CHEATS`}: it makes wrong sums, in every round; or LEAVES_OUT: it says that
    half of the sections never came.
    """
    late: frozenset[str] = frozenset()
    """Senders whose sections come too late for every reducer, in every round."""


@dataclass
class Reduced:
    """How a round ended. Peer ids are the keys; a missing key means nothing to report."""

    aggregates: list[bytes] = field(default_factory=list)
    contributors: set[str] = field(default_factory=set)
    undelivered: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    bytes_up: Counter[str] = field(default_factory=Counter)
    bytes_down: Counter[str] = field(default_factory=Counter)
    num_lost_sections: int = 0
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (sender, one of wire.REFUSALS): sections that reducers left out."""
    verdicts: dict[int, dict[int, str]] = field(default_factory=dict)
    """The same by index: {reducer: {sender: reason}}."""
    sentences: list[Sentence] = field(default_factory=list)
    """Who is put out because of this round."""
    reduced_s: Floats = field(default_factory=lambda: np.zeros(0))
    """[members]: when each had all sections of its span that it waited for, seconds from the group's meeting."""
    ends_s: dict[str, float] = field(default_factory=dict)
    """When each had all aggregates."""


def agree_on_digest(entries: Sequence[Contribution]) -> bytes:
    """The theta that most entrants stand on; ties go to more weight, then to the smaller digest."""

    def rank(digest: bytes) -> tuple[int, float, tuple[int, ...]]:
        weights = [entry.weight for entry in entries if entry.base_digest == digest]
        return len(weights), sum(weights), tuple(-byte for byte in digest)

    return max({entry.base_digest for entry in entries}, key=rank)


class GroupReducer:
    """Reduces rounds; keeps each reducer's residual from round to round.

    A reducer goes on without the sections that take longer than `patience_s` to reach it. With `audits` the members
    audit each other's sums, and who is found out gets no span any more.
    """

    def __init__(
        self,
        codec: Codec,
        run: bytes,
        exact_up_to: int,
        faults: Faults,
        links: Links = INSTANT,
        patience_s: float = math.inf,
        screens: bool = False,
        audits: bool = False,
    ) -> None:
        self._screens = screens
        self.audits = Audits(codec, screens) if audits else None
        self._judgement = Verdicts(codec)
        self._codec = codec
        self._run = run
        self._exact_up_to = max(1, exact_up_to)  # recompression gains nothing for a worker that is alone
        self._faults = faults
        self._links, self._patience_s = links, patience_s
        self._residuals: dict[str, Residual] = {}
        self._spans: dict[str, tuple[int, int]] = {}

    def put_out(self, round: int, accused: Sequence[str]) -> list[Sentence]:
        """Before a round, because of what its members say."""
        return self._judgement.accused(round, accused)

    def reduce(self, round: int, members: Sequence[Contribution]) -> Reduced:
        """Reduce the payloads of `members`, given in canonical order: each owns a span of equal share."""
        result = Reduced()
        if not members:
            return result
        names = [member.peer_id for member in members]
        spans = self._codec.spans(self.audits.shares(names) if self.audits else [1.0] * len(names))
        sections = self._scatter(round, members, spans, result)
        self._gather(round, members, spans, sections, result)
        if self._screens:
            result.sentences = self._judgement.note(round, names, result.aggregates)
        if self.audits:
            guilty = self.audits.look(round, names, [member.payload for member in members])
            result.sentences += [Sentence(name, round + GUILTY_ROUNDS, "wrong-sum") for name in guilty]
        return result

    def _scatter(
        self, round: int, members: Sequence[Contribution], spans: Sequence[tuple[int, int]], result: Reduced
    ) -> _Sections:
        """Everybody's sections on their way to the reducers; those that arrived."""
        names = [member.peer_id for member in members]
        sections: _Sections = {}
        sent = np.zeros((len(members), len(members)))
        for j, span in enumerate(spans):
            for i, member in enumerate(members):
                if not span[1]:
                    continue
                section = self._section(round, member, names[j], span, result)
                if section is None:
                    _refuse(result, names, i, j, "malformed")
                    continue
                sections[i, j] = section
                sent[i, j] = len(section) if i != j else 0
        arrived_s = self._links.arrivals_s(names, sent, np.zeros(len(members)))
        for (i, j), section in list(sections.items()):
            if i == j:
                continue
            result.bytes_up[names[i]] += len(section)
            if (round, names[i], names[j]) in self._faults.sections:
                problem = f"{names[j]} did not get a section of {names[i]}"
            elif names[i] in self._faults.late or arrived_s[i, j] > self._patience_s:
                problem = (
                    f"a section of {names[i]} reached {names[j]} too late, after {arrived_s[i, j]:.1f} s"
                )
                _refuse(result, names, i, j, "late")
                arrived_s[i, j] = max(arrived_s[i, j], min(self._patience_s, LATE_S))
            else:
                result.bytes_down[names[j]] += len(section)
                continue
            del sections[i, j]
            result.num_lost_sections += 1
            arrived_s[i, j] = min(arrived_s[i, j], self._patience_s)
            _report(result, names[i], spans[j], problem)
        result.reduced_s = arrived_s.max(axis=0)
        return sections

    def _gather(
        self,
        round: int,
        members: Sequence[Contribution],
        spans: Sequence[tuple[int, int]],
        sections: _Sections,
        result: Reduced,
    ) -> None:
        """Each reducer's aggregate on its way to everybody."""
        names = [member.peer_id for member in members]
        sent = np.zeros((len(members), len(members)))
        for j, span in enumerate(spans):
            if not span[1]:
                continue
            arrived = [(i, m.weight, sections[i, j]) for i, m in enumerate(members) if (i, j) in sections]
            judged = arrived
            if self._screens and len(members) > self._exact_up_to:
                judged = self._screened(names, j, span, arrived, result)
            aggregate, before = self._aggregate(
                round, names[j], span, judged, len(members), result.verdicts.get(j, {})
            )
            is_lost = (round, names[j]) in self._faults.spans
            if self.audits and aggregate and before is not None and not is_lost:
                self.audits.keep(Sum(j, span, arrived, aggregate, before))
            if not aggregate or (round, names[j]) in self._faults.spans:
                for name in names:
                    _report(result, name, span, f"the span of {names[j]} is lost")
                continue
            result.aggregates.append(aggregate)
            result.contributors.update(names[i] for i, _, _ in judged)
            for i, name in enumerate(names):
                if i != j:
                    sent[j, i] = len(aggregate)
                    result.bytes_up[names[j]] += len(aggregate)
                    result.bytes_down[name] += len(aggregate)
        ends_s = self._links.arrivals_s(names, sent, result.reduced_s).max(axis=0)
        result.ends_s = {name: float(end) for name, end in zip(names, np.maximum(ends_s, result.reduced_s))}

    def _screened(
        self, names: Sequence[str], j: int, span: tuple[int, int], arrived: list[Section], result: Reduced
    ) -> list[Section]:
        screened = screen(self._codec, arrived, *span)
        for index, reason in screened.refused.items():
            _refuse(result, names, index, j, reason)
            _report(result, names[index], span, REASONS[reason])
        return screened.sections

    def _aggregate(
        self,
        round: int,
        reducer: str,
        span: tuple[int, int],
        sections: Sequence[tuple[int, float, bytes]],
        num_members: int,
        refused: Mapping[int, str],
    ) -> tuple[bytes, torch.Tensor | None]:
        """The aggregate, and the residual before it in units of weight times value if it was compressed again."""
        recompressed, residual = (
            num_members > self._exact_up_to,
            self._residuals.setdefault(reducer, Residual(self._codec)),
        )
        self._spans[reducer] = span if recompressed else (0, 0)
        if self._faults.sums.get(reducer) == LEAVES_OUT:
            sections = sections[len(sections) // 2 :]
        if not sections:
            return b"", None
        first, count = span
        weight = math.fsum(weight for _, weight, _ in sections)
        before = residual.draw(first, count, 1.0) if recompressed else None
        left_over = None if before is None else before / weight
        if left_over is not None and self._faults.sums.get(reducer) in CHEATS:
            left_over += CHEATS[self._faults.sums[reducer]](mean_of(self._codec, sections))
        aggregate = self._codec.reduce(
            sections,
            residual=left_over,
            refused=refused if recompressed and self._screens else {},
            run=self._run,
            round=round,
            first_chunk=first,
            num_chunks=count,
        )
        self._codec.check_aggregate(
            aggregate,
            run=self._run,
            round=round,
            first_chunk=first,
            num_chunks=count,
            num_members=num_members,
        )
        if left_over is not None and (round, reducer) not in self._faults.spans:
            residual.settle(first, count, weight, left_over)
        return aggregate, before

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
        return section

    def release_residual(self, reducer: str, *, all: bool) -> list[tuple[int, int, bytes]]:
        """See `Exchange.release_residual`."""
        residual = self._residuals.get(reducer)
        pieces = residual.release(*((0, 0) if all else self._spans[reducer])) if residual is not None else []
        return [(first, count, values.numpy().tobytes()) for first, count, values in pieces]


def _refuse(result: Reduced, names: Sequence[str], sender: int, reducer: int, reason: str) -> None:
    result.refused[names[sender], reason] += 1
    result.verdicts.setdefault(reducer, {})[sender] = reason


def _report(result: Reduced, peer_id: str, span: tuple[int, int], problem: str) -> None:
    ranges = result.undelivered.setdefault(peer_id, [])
    if span not in ranges:
        ranges.append(span)
    result.problems.setdefault(peer_id, []).append(problem)
