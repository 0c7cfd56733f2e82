"""What a member answers about sums: for its own ones, for what it has seen, and to those who bring evidence; and whom
it has nothing to do with any more because of that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, AsyncIterator  # noqa: UP035  # hivemind recognizes streams by typing's AsyncIterator only

from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

from dtrain.compression.codec import Codec
from dtrain.dht import evidence as proofs
from dtrain.dht.auditor import Auditor, Reports, Sums
from dtrain.dht.averager import SwarmAverager
from dtrain.dht.evidence import Evidence, ReducedSpan
from dtrain.dht.faults import FaultPlan
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.history import RoundRecord
from dtrain.dht.identity import Identity
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.streams import Call, Header, StreamError, answer, first_header, read_blob

GUILTY_ROUNDS = 1000  # for which a peer that is proven to cheat stays out
SILENT_ROUNDS = 10  # for which one has nothing to do with a peer that answers none of one's audits
KEPT_SUMS, KEPT_BYTES = 3, 512 * 1024 * 1024  # that a reducer answers for; at least the newest one
MAX_EVIDENCE_BYTES = 256 * 1024 * 1024


class Answers:
    """A reducer's sums of the last rounds: each member of a round is answered once for each."""

    def __init__(self, codec: Codec, identity: Identity):
        self._codec, self._identity = codec, identity
        self._kept: OrderedDict[bytes, ReducedSpan] = OrderedDict()  # by the digest of their seals
        self._answered: set[tuple[bytes, str]] = set()

    def keep(self, reduced: ReducedSpan) -> None:
        """We have handed out this sum."""
        self._kept[reduced.commitment.seal.digest] = reduced
        size = sum(kept.num_bytes for kept in self._kept.values())
        while len(self._kept) > 1 and (len(self._kept) > KEPT_SUMS or size > KEPT_BYTES):
            digest, dropped = self._kept.popitem(last=False)
            size -= dropped.num_bytes
            self._answered = {pair for pair in self._answered if pair[0] != digest}

    async def give(self, asker: str, header: Header) -> tuple[dict[str, bytes], bytes]:
        """Header and blob for who asks. Raises StreamError to refuse."""
        digest, number = header.get("seal"), header.get("number")
        reduced = self._kept.get(digest) if isinstance(digest, bytes) else None
        if reduced is None or not isinstance(digest, bytes):
            raise StreamError("that sum is not kept here")
        if type(number) is not int or not 0 <= number < 2**64:
            raise StreamError("not the number of an audit")
        if asker not in dict(reduced.setting.members) or (digest, asker) in self._answered:
            raise StreamError("only members of the round are answered, and once")
        self._answered.add((digest, asker))
        return await asyncio.to_thread(proofs.answer, self._codec, reduced, number, self._identity)


class Tribunal:
    """Takes evidence from others, one piece at a time; who has brought what proves nothing is not heard again."""

    def __init__(self, auditor: Auditor, timeout_s: float, count: Callable[[str], None]):
        self._auditor, self._timeout_s, self._count = auditor, timeout_s, count
        self._liars: set[str] = set()
        self._judging = asyncio.Lock()

    async def hear(self, teller: str, header: Header, requests: AsyncIterator[BytesValue]) -> None:
        """Raises StreamError for what proves nothing."""
        if self._auditor.knows(header.get("accused"), header.get("setting")):
            return
        if teller in self._liars:
            raise StreamError("it has brought false evidence")
        async with self._judging:
            blob = await read_blob(requests, header, max_bytes=MAX_EVIDENCE_BYTES, timeout_s=self._timeout_s)
            try:
                proven = await self._auditor.proves(proofs.unpack(blob))
            except ValueError as error:
                proven = False
                logging.info("evidence from %s: %s", teller, error)
        if not proven:
            self._liars.add(teller)
            self._count("false-evidence")
            raise StreamError("this proves nothing")


class Audits(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """The three on the network. `refuses(peer id)` says why a peer is not answered, or ""."""

    def __init__(
        self,
        p2p: P2P,
        *,
        prefix: str,
        timeout_s: float,
        answers: Answers,
        auditor: Callable[[Callable[[str, str], Call]], Auditor],
        refuses: Callable[[str], str],
        count: Callable[[str], None],
        on_round: Callable[[RoundRunner, RoundRecord], None],
    ):
        self._on_round = on_round
        self._p2p, self._prefix, self._timeout_s, self._refuses = p2p, prefix, timeout_s, refuses
        self._answers, self.auditor = answers, auditor(self._method)
        self._tribunal = Tribunal(self.auditor, timeout_s, count)

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    def note(self, runner: RoundRunner, record: RoundRecord) -> None:
        """A round counts, in which sums were compressed again."""
        self._on_round(runner, record)
        if runner.kept is not None:
            self._answers.keep(runner.kept)
        self.auditor.look(Sums.of(runner, record))

    def _method(self, peer: str, name: str) -> Call:
        method: Call = getattr(
            self.get_stub(self._p2p, PeerID.from_base58(peer), namespace=self._prefix), name
        )
        return method

    async def rpc_audit(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A member of a round asks what our sum was made of."""

        async def handle() -> tuple[dict[str, Any], bytes]:
            asker = str(context.remote_id)
            return await self._answers.give(asker, await self._header(asker, stream, 0))

        async for message in answer(stream, handle):
            yield message

    async def rpc_seals(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A peer on another theta asks what seals a round's sums came with here."""

        async def handle() -> tuple[dict[str, Any], bytes]:
            header = await self._header(str(context.remote_id), stream, 0)
            return {}, self.auditor.seals_of(header.get("round"))

        async for message in answer(stream, handle):
            yield message

    async def rpc_evidence(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """Another member has proof against somebody."""

        async def handle() -> tuple[dict[str, Any], bytes]:
            teller = str(context.remote_id)
            await self._tribunal.hear(teller, await self._header(teller, stream, MAX_EVIDENCE_BYTES), stream)
            return {}, b""

        async for message in answer(stream, handle):
            yield message

    async def _header(self, peer: str, stream: AsyncIterator[BytesValue], max_bytes: int) -> Header:
        return await first_header(stream, lambda: self._refuses(peer), self._timeout_s, max_bytes)


async def open_audits(
    p2p: P2P, identity: Identity, averager: SwarmAverager, heartbeats: Heartbeats, faults: FaultPlan
) -> None:
    """Answer for our sums from now on, and look at others'; who is proven to cheat is put out."""
    codec, terms = averager.codec, averager.terms

    def guilty(found: Evidence, fault: str) -> None:
        heartbeats.outcasts.put_out(
            found.accused, found.setting.round + GUILTY_ROUNDS, proofs.reason_of(found)
        )

    def silent(peer_id: str) -> None:
        until = int(heartbeats.status["round"]) + SILENT_ROUNDS
        heartbeats.outcasts.put_out(peer_id, until, "audit-unanswered")

    def auditor(call: Callable[[str, str], Call]) -> Auditor:
        return Auditor(
            identity,
            codec,
            run=terms.run_tag,
            screens=terms.screens,
            timeout_s=terms.sender_timeout_s,
            call=call,
            others=lambda: [record.peer_id for record in heartbeats.others() if record.can_be_dialled],
            reports=Reports(guilty, silent, heartbeats.count),
            faults=faults,
        )

    audits = Audits(
        p2p,
        prefix=terms.prefix,
        timeout_s=terms.sender_timeout_s,
        answers=Answers(codec, identity),
        auditor=auditor,
        refuses=heartbeats.refuses,
        count=heartbeats.count,
        on_round=averager.repute.judge,
    )
    await audits.open()
    averager.on_sums = audits.note
    averager.on_split = lambda round, peers: audits.auditor.compare(round - 1, peers)
