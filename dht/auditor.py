"""One member's look at the others' sums: after a round, never on its way.

Whom it audits is drawn from its own signature of the round: no reducer can know it before. A sum that is not its
sections' is evidence (`dht/evidence.py`), and so are two sums of one span, which show when members stand on different
thetas: they compare the seals of the round before. Evidence goes to all members that are seen, and each checks it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgpack

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.dht import evidence as proofs
from dtrain.dht.evidence import AnsweredAudit, Evidence, TwoSums
from dtrain.dht.faults import FaultPlan
from dtrain.dht.history import RoundRecord
from dtrain.dht.identity import Identity
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.seals import NOTHING, Seal, Setting, Span
from dtrain.dht.streams import Call, Header, StreamError, ask, in_background

MAX_SEALS = 4096
COMPARED_ROUNDS, COMPARED_PEERS = 3, 4  # back; at once
MAX_SEALS_BYTES = 1024 * 1024
UNANSWERED = 3  # rounds in a row in which a reducer may leave an audit unanswered
_TICKET = b"dtrain audit ticket 1\n"


@dataclass(frozen=True)
class Sums:
    """What a member has of a round that counts, by the reducers' indices."""

    setting: Setting
    payload: bytes  # its own
    seals: dict[int, Seal]
    aggregates: dict[int, bytes]
    spans: Sequence[Span]

    @classmethod
    def of(cls, runner: RoundRunner, record: RoundRecord) -> Sums:
        """Of a round that was run here, as its record has it."""
        indices = {span: j for j, span in enumerate(runner.spans) if span[1]}
        aggregates = {
            indices[first, count]: aggregate
            for (first, count), aggregate in zip(record.spans, record.aggregates)
            if (first, count) in indices
        }
        seals = {
            j: seal
            for j, seal in runner.seals.items()
            if j in aggregates and seal.aggregate == hashlib.sha256(aggregates[j]).digest()
        }
        return cls(runner.setting, runner.payload, seals, aggregates, runner.spans)


@dataclass(frozen=True)
class Reports:
    """Who hears of what an auditor finds."""

    guilty: Callable[[Evidence, str], None]  # whom there is proof against, and what it did in words
    silent: Callable[[str], None]  # a peer that leaves one audit after the other unanswered
    count: Callable[[str], None]  # what happened, by its reason


class Auditor:
    """`call(peer id, method)` reaches another peer; `others()` names the members that are seen."""

    def __init__(
        self,
        identity: Identity,
        codec: Codec,
        *,
        run: bytes,
        screens: bool,
        timeout_s: float,
        call: Callable[[str, str], Call],
        others: Callable[[], Sequence[str]],
        reports: Reports,
        faults: FaultPlan,
    ):
        self._identity, self._codec, self._run, self._screens = identity, codec, run, screens
        self._timeout_s, self._call, self._others = timeout_s, call, others
        self._reports, self._faults = reports, faults
        self._seals: OrderedDict[bytes, Seal] = OrderedDict()  # of sums that count, by digest
        self._rounds: OrderedDict[int, Sums] = OrderedDict()  # the newest ones
        self._proven: set[tuple[str, bytes]] = set()  # (peer id, digest of the round's setting)
        self._unanswered: Counter[str] = Counter()  # in a row
        self.num_audits = self.audit_bytes = 0  # that we have had answered

    # ------------------------------------------------------------------ audits

    def look(self, sums: Sums) -> None:
        """A round counts: note its seals, and audit whom the draw says, in the background."""
        before = dict(self._seals)
        self._seals.update((seal.digest, seal) for seal in sums.seals.values())
        self._rounds[sums.setting.round] = sums
        while len(self._seals) > MAX_SEALS:
            self._seals.popitem(last=False)
        while len(self._rounds) > COMPARED_ROUNDS:
            self._rounds.popitem(last=False)
        in_background(self._audit(sums, before))

    async def _audit(self, sums: Sums, before: dict[bytes, Seal]) -> None:
        ticket = self._identity.key.sign(_TICKET + sums.setting.digest)
        number = audit.number_of(ticket)
        for j in await asyncio.to_thread(self._draw, sums, ticket):
            seal = sums.seals[j]
            previous = before.get(seal.previous)
            if previous is None and seal.previous != NOTHING:
                continue  # its last round was without us: we cannot know what it had committed itself to
            try:
                await self._ask(sums, j, previous, number)
            except Exception as error:  # hivemind and its daemon raise many types when a peer is gone
                logging.info("%s does not answer for its sum: %r", seal.reducer, error)
                self._reports.count("audit-unanswered")
                self._unanswered[seal.reducer] += 1
                if self._unanswered[seal.reducer] >= UNANSWERED:
                    self._reports.silent(seal.reducer)

    def _draw(self, sums: Sums, ticket: bytes) -> list[int]:
        own = [peer_id for peer_id, _ in sums.setting.members].index(self._identity.peer_id)
        sealed = {j: aggregate for j, aggregate in sums.aggregates.items() if j in sums.seals}
        if self._faults.take("audit", sums.setting.round) == "all":
            return sorted(sealed.keys() - {own})
        drawn = audit.draw(self._codec, sums.payload, sealed, own, len(sums.setting.members), ticket)
        # Who owes an answer is asked again in every round until it gives one.
        owing = {j for j in sealed if j != own and self._unanswered[sums.seals[j].reducer]}
        return sorted(owing.union(drawn))

    async def _ask(self, sums: Sums, j: int, previous: Seal | None, number: int) -> None:
        """Raises what hivemind does, StreamError, or ValueError when the answer is not signed."""
        seal = sums.seals[j]
        reply, blob = await ask(
            self._call(seal.reducer, "rpc_audit"),
            {"seal": seal.digest, "number": number},
            max_bytes=proofs.max_answer_bytes(self._codec, sums.spans[j], len(sums.setting.members)),
            timeout_s=self._timeout_s,
        )
        self.num_audits, self.audit_bytes = self.num_audits + 1, self.audit_bytes + len(blob)
        signature = reply.get("signature")
        if not isinstance(signature, bytes):
            raise StreamError("an answer without a signature")
        found = AnsweredAudit(sums.setting, sums.aggregates[j], seal, previous, number, blob, signature)
        if await self.proves(found):
            in_background(self._tell(found))
        self._unanswered.pop(seal.reducer, None)

    # ------------------------------------------------------------------ two sums of one span

    def compare(self, round: int, peers: Sequence[str]) -> None:
        """These came out of a round on another theta than ours: find out, in the background, by whose doing."""
        if round in self._rounds:
            for peer in peers[:COMPARED_PEERS]:
                in_background(self._compare(self._rounds[round], peer))

    async def _compare(self, ours: Sums, peer: str) -> None:
        try:
            header = {"round": ours.setting.round}
            call = self._call(peer, "rpc_seals")
            _, blob = await ask(call, header, max_bytes=MAX_SEALS_BYTES, timeout_s=self._timeout_s)
            theirs = [Seal.unpack(packed) for packed in msgpack.unpackb(blob)]
        except Exception as error:  # it is gone, was not there, or says nonsense
            logging.info("%s does not show the seals of its last round: %r", peer, error)
            return
        by_reducer = {seal.reducer: seal for seal in ours.seals.values()}
        for seal in theirs:
            own = by_reducer.get(seal.reducer)
            if own is None or seal.setting != own.setting or seal.aggregate == own.aggregate:
                continue
            found = TwoSums(ours.setting, own, seal)
            if not self.knows(found.accused, found.setting.digest) and await self.proves(found):
                await self._tell(found)

    def seals_of(self, round: object) -> bytes:
        """What somebody on another theta gets that compares. Raises StreamError when it is not kept."""
        sums = self._rounds.get(round) if isinstance(round, int) else None
        if sums is None:
            raise StreamError("that round is not kept here")
        packed = msgpack.packb([seal.pack() for seal in sums.seals.values()])
        assert isinstance(packed, bytes)
        return packed

    # ------------------------------------------------------------------ evidence

    def knows(self, accused: object, setting: object) -> bool:
        """Whether there is proof here against that peer in that round already."""
        return (accused, setting) in self._proven

    async def proves(self, found: Evidence) -> bool:
        """Check evidence and act on it. Raises ValueError when it is nobody's word."""
        fault = await asyncio.to_thread(found.fault, self._codec, self._run, screens=self._screens)
        if fault and not self.knows(found.accused, found.setting.digest):
            self._proven.add((found.accused, found.setting.digest))
            self._reports.count(proofs.reason_of(found))
            logging.warning("%s is no reducer to be trusted: %s", found.accused, fault)
            self._reports.guilty(found, fault)
        return bool(fault)

    async def _tell(self, found: Evidence) -> None:
        """Hand evidence to everybody we see, one after another."""
        header: Header = {"accused": found.accused, "setting": found.setting.digest}
        blob = found.pack()
        for peer in self._others():
            if peer == found.accused:
                continue
            try:
                call = self._call(peer, "rpc_evidence")
                await ask(call, header, blob, max_bytes=0, timeout_s=self._timeout_s)
            except Exception as error:  # hivemind and its daemon raise many types when a peer is gone
                logging.info("%s does not take evidence: %r", peer, error)
