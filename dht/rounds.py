"""One round of a large group: every member reduces one span, compresses the sum again and hands the same bytes to all.

A member cuts its payload by spans, sends each reducer its section, and gets the span's aggregate as the reply, or from
any other member (`parts.py`). However large the group, that costs a member about two payloads.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence

from google.protobuf.wrappers_pb2 import BytesValue

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.dht.evidence import ReducedSpan
from dtrain.dht.faults import FaultPlan
from dtrain.dht.history import RoundRecord, prove, signers
from dtrain.dht.identity import Identity
from dtrain.dht.kept_residual import KeptResidual
from dtrain.dht.membership import Member
from dtrain.dht.parts import RETRY_PAUSE_S, CallPeer, Parts
from dtrain.dht.reducer import SpanReducer
from dtrain.dht.seals import Seal, Setting, check_stamp, is_section_of, sign_section
from dtrain.dht.streams import Header, Refused, StreamError, ask, read_blob
from dtrain.dht.uplink import shares

ATTEMPTS = 3


class Malformed(StreamError):
    """A section that the codec does not allow, or that its sender has not signed."""


class RoundRunner:
    """Runs one round of one group for one member; serves the others while and after it does."""

    def __init__(
        self,
        *,
        codec: Codec,
        run: bytes,
        round: int,
        base_digest: bytes,
        group_id: bytes,
        members: Sequence[Member],
        own_index: int,
        payload: bytes,
        identity: Identity,
        residual: KeptResidual | None,
        call: CallPeer,
        round_timeout_s: float,
        sender_timeout_s: float,
        screens: bool = False,
        faults: FaultPlan | None = None,
        disconnect: Callable[[str], None] = lambda peer_id: None,
    ):
        self.codec, self.group_id = codec, group_id
        self.setting = Setting.of(run, round, base_digest, group_id, members)
        self.members, self.own_index, self._call, self._identity = members, own_index, call, identity
        self.payload = payload
        self.spans = codec.spans(shares([m.reduces for m in members], [m.mbps for m in members]))
        self._sections = [codec.cut(payload, *span) if span[1] else b"" for span in self.spans]
        self._round_timeout_s, self._sender_timeout_s = round_timeout_s, sender_timeout_s
        # Reducers stop waiting for senders after the sender's timeout: who has not answered well after it will not.
        self._patience_s = (round_timeout_s + sender_timeout_s) / 2
        self._faults, self._disconnect = faults or FaultPlan(), disconnect
        self._parts = Parts(
            [j for j, span in enumerate(self.spans) if span[1]],
            members,
            own_index,
            call=call,
            header={"group": group_id, "round": round},
            check=self._check_aggregate,
            max_bytes=self._max_aggregate_bytes,
            timeout_s=sender_timeout_s,
            deadline=time.monotonic() + round_timeout_s,
        )
        self._problems: list[str] = []
        self.seals: dict[int, Seal] = {}  # of the aggregates that are here
        self._exact = residual is None
        self.left_out_by: list[str] = []  # who has our section but not in its sum, and does not say why
        self.uploads: list[tuple[int, float]] = []  # of our sections: bytes, seconds that their receiver read
        self._reducer = SpanReducer(
            codec,
            self.spans[own_index],
            members,
            setting=self.setting,
            identity=identity,
            residual=residual,  # None = exact unions
            screens=screens,
            report=self._problems.append,
            faults=self._faults,
        )

    # ------------------------------------------------------------------ sending and collecting

    async def run(self) -> None:
        """Take part until every span is here, or known to be with nobody. Bounded by the round's timeout."""
        reducing = asyncio.create_task(self._reduce_own_span())
        try:
            await asyncio.gather(*(self._collect(j) for j in self._parts.status))
            await asyncio.wait({reducing}, timeout=self._parts.left_s)
        finally:
            reducing.cancel()
            if not self._reducer.aggregate.done():
                self._reducer.aggregate.cancel()
        await self._close_own_span()

    async def _reduce_own_span(self) -> None:
        if self.spans[self.own_index][1]:
            await self._reducer.reduce(self._sender_timeout_s)

    async def _close_own_span(self) -> None:
        """What nobody else has of our span is in nobody's theta, so it may not be in ours."""
        if self.own_index in self._parts.held and not await self._reducer.is_taken():
            self._parts.lose(self.own_index)
            self._problems.append("our span's aggregate reached nobody")

    @property
    def own_span(self) -> tuple[int, int]:
        """The one that this member reduces."""
        return self.spans[self.own_index]

    @property
    def kept(self) -> ReducedSpan | None:
        """What we answer for our span's sum with; None for an exact union, which shows everything."""
        return self._reducer.kept

    @property
    def aggregates(self) -> list[bytes]:
        """Those that came out of this group, each signed by its reducer."""
        return list(self._parts.held.values())

    @property
    def refused(self) -> dict[int, str]:
        """Members whose sections we have kept out of our span's sum, and why: see wire.REFUSALS."""
        return self._reducer.refused

    def record(self, *, wait_s: float, exchange_s: float) -> RoundRecord:
        """What came out of the round for this member."""
        inside: set[int] = set()
        undelivered, aggregates = [], self._parts.held
        for j in self._parts.status:
            aggregate = aggregates.get(j)
            indices = {i for i, _ in self.codec.contributors(aggregate)} if aggregate is not None else set()
            inside |= indices
            if self.own_index not in indices:
                undelivered.append(list(self.spans[j]))
        held = sorted(aggregates)
        return RoundRecord(
            round=self.setting.round,
            base_digest=self.setting.base_digest,
            members=[member.peer_id for member in self.members],
            contributors=[self.members[i].peer_id for i in sorted(inside)],
            spans=[list(self.spans[j]) for j in held],
            aggregates=[aggregates[j] for j in held],
            proof=prove(self.setting, [self.seals[j] for j in held]),
            undelivered=undelivered,
            problems=self._problems,
            wait_s=wait_s,
            exchange_s=exchange_s,
        )

    def bears_out(self, record: RoundRecord) -> bool:
        """Whether each aggregate of what another member says of this round is signed by the span's reducer."""
        reducers = {tuple(span): member.peer_id for span, member in zip(self.spans, self.members)}
        signed = signers(record, self.setting.run)
        return bool(signed) and signed == [reducers.get((first, count)) for first, count in record.spans]

    async def _collect(self, j: int) -> None:
        try:
            answer = await asyncio.wait_for(self._from_reducer(j), self._patience_s)
        except asyncio.TimeoutError:
            answer = None
            self._problems.append(f"{self.members[j].peer_id} did not answer within the round's timeout")
        if answer is not None:
            self._parts.keep(j, *answer)
        else:
            await self._parts.from_others(j)

    async def _from_reducer(self, j: int) -> tuple[Header, bytes] | None:
        signature = sign_section(self._identity, self.setting, self.spans[j], self._sections[j])
        if j == self.own_index:
            self._reducer.accept(j, self._sections[j], signature)
            stamp, aggregate = await asyncio.shield(self._reducer.aggregate)
            self.seals[j] = stamp.seal
            return stamp.header(), aggregate
        header = {"group": self.group_id, "round": self.setting.round, "signature": signature}
        for attempt in range(ATTEMPTS):
            try:
                reply, aggregate = await ask(
                    self._call(j, "rpc_aggregate_part"),
                    header,
                    self._faults.spoil("section", self.setting.round, self._sections[j]),
                    max_bytes=self._max_aggregate_bytes(j),
                    timeout_s=self._sender_timeout_s,
                    reply_timeout_s=self._parts.left_s,
                    on_sent=functools.partial(self._sent_section, j),
                )
                checked = self._check_aggregate(j, reply, aggregate)
                self._note_upload(j, reply.get("read_s"))
                self._note_absence(j, reply.get("why_not"), aggregate)
                return checked, aggregate
            except asyncio.CancelledError:
                raise
            except Refused as error:
                self._problems.append(f"{self.members[j].peer_id} {error}")
                return None
            except (PayloadError, StreamError) as error:
                self._problems.append(f"{self.members[j].peer_id} sent a bad aggregate: {error}")
            except Exception as error:  # hivemind and its daemon raise many types when a peer is gone
                self._problems.append(f"{self.members[j].peer_id} cannot be reached: {error!r:.200}")
            await asyncio.sleep(RETRY_PAUSE_S * (attempt + 1))
        return None

    def _note_upload(self, j: int, read_s: object) -> None:
        if isinstance(read_s, float) and 0 < read_s < self._round_timeout_s:
            self.uploads.append((len(self._sections[j]), read_s))

    def _note_absence(self, j: int, why_not: object, aggregate: bytes) -> None:
        """A reducer that has read our section counts it, or says why not."""
        if self.own_index in dict(self.codec.contributors(aggregate)):
            return
        reducer = self.members[j].peer_id
        if isinstance(why_not, str) and why_not:
            self._problems.append(f"we are not in the span of {reducer}: {why_not:.200}")
        else:
            self.left_out_by.append(reducer)
            self._problems.append(f"{reducer} leaves us out of its span and does not say why")

    def _check_aggregate(self, j: int, header: Header, aggregate: bytes) -> Header:
        """The stamp, as it goes on to others."""
        first, count = self.spans[j]
        self.codec.check_aggregate(
            aggregate,
            run=self.setting.run,
            round=self.setting.round,
            first_chunk=first,
            num_chunks=count,
            num_members=len(self.members),
        )
        for index, weight in self.codec.contributors(aggregate):
            if weight > self.members[index].counts:  # less is a reducer's to decide
                raise PayloadError("wrong-weight", f"weights {self.members[index].peer_id} by {weight}")
        reducer, union = self.members[j].peer_id, self.codec.union(aggregate)
        if (
            bool(union) != self._exact
        ):  # what is compressed again can be audited, a union shows itself what it is of
            raise PayloadError("bad-kind", "not the kind of aggregate that this round makes")
        stamp = check_stamp(header, self.setting, reducer, self.spans[j], aggregate, union)
        self.seals[j] = stamp.seal
        return stamp.header()

    def _max_aggregate_bytes(self, j: int) -> int:
        return self.codec.max_aggregate_bytes(*self.spans[j], len(self.members))

    # ------------------------------------------------------------------ planned faults

    def _sent_section(self, j: int, sent: int, total: int) -> None:
        for point in ("first-part-sent", "half-sent") if 2 * sent >= total else ("first-part-sent",):
            if self._faults.happen(point, self.setting.round) == "close":
                self._disconnect(self.members[j].peer_id)

    def sent_aggregate(self, member_id: str, sent: int, total: int) -> None:
        """Part of our span's aggregate has gone to a member."""
        if sent == total:
            self._reducer.took(member_id)
        if 2 * sent >= total and self._faults.happen("half-delivered", self.setting.round) == "close":
            self._disconnect(member_id)

    # ------------------------------------------------------------------ serving the other members

    async def serve_part(
        self, sender_id: str, header: Header, requests: AsyncIterator[BytesValue]
    ) -> tuple[Header, bytes]:
        """A member sends its section of our span and wants the aggregate. Raises StreamError to refuse."""
        sender = self._parts.index_of(sender_id)
        if self.own_index not in self._parts.status:
            raise StreamError("no span is reduced here")
        connection, began = self._reducer.connected(sender), time.monotonic()
        try:
            section, signature = await self._read_section(sender, header, requests)
        except (StreamError, asyncio.TimeoutError) as error:
            verdict = "malformed" if isinstance(error, Malformed) else "" if str(error) else "late"
            self._reducer.drop(sender, str(error) or "stalled", verdict)
            raise
        except asyncio.CancelledError:  # the connection broke
            self._reducer.disconnected(sender, connection)
            raise
        read_s = time.monotonic() - began
        self._reducer.accept(sender, section, signature)
        reduced = self._reducer.aggregate
        try:
            # Shielded: a caller that hangs up must not cancel the result that all the others wait for.
            stamp, aggregate = await asyncio.wait_for(asyncio.shield(reduced), self._parts.left_s)
            header = {"read_s": read_s, "why_not": self._reducer.why_not.get(sender, ""), **stamp.header()}
            return header, self._faults.spoil("aggregate", self.setting.round, aggregate)
        except asyncio.CancelledError:
            if reduced.cancelled():
                raise StreamError("the span was not reduced in time") from None
            raise

    async def _read_section(
        self, sender: int, header: Header, requests: AsyncIterator[BytesValue]
    ) -> tuple[bytes, bytes]:
        """A member's section and its signature, both checked."""
        first, count = span = self.spans[self.own_index]
        limit = self.codec.max_payload_bytes(first, count)
        section = await read_blob(requests, header, max_bytes=limit, timeout_s=self._sender_timeout_s)
        try:
            run, round = self.setting.run, self.setting.round
            self.codec.check(section, run=run, round=round, first_chunk=first, num_chunks=count)
        except PayloadError as error:
            raise Malformed(f"{error.reason}: {error}") from None
        signature: bytes = header.get("signature", b"")
        if not is_section_of(self.members[sender].peer_id, self.setting, span, section, signature):
            raise Malformed("bad-signature: its sender has not signed this section for this round")
        return section, signature

    def serve_span(self, asker_id: str, span: object) -> tuple[Header, bytes]:
        """What we can say of a span's aggregate to a member that lacks it. Raises StreamError to refuse."""
        header, aggregate = self._parts.serve(asker_id, span)
        if span == self.own_index and aggregate:
            self._reducer.took(asker_id)
        return header, aggregate
