"""One round among one group: every member reduces one span and hands the same bytes to all.

A member cuts its payload by spans, sends each reducer its section, and gets the span's aggregate as the reply. What a
reducer cannot deliver is fetched from any other member that got it, so a lost connection costs nobody a span; a span
that no reachable member has is missing for all of them alike.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from google.protobuf.wrappers_pb2 import BytesValue

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.compression.residual import Residual
from dtrain.dht.faults import FaultPlan
from dtrain.dht.history import RoundRecord
from dtrain.dht.membership import Member
from dtrain.dht.reducer import SpanReducer
from dtrain.dht.streams import Header, Refused, StreamError, ask, read_blob

ATTEMPTS = 3
RETRY_PAUSE_S = 0.2
HAVE, TRYING, WITHOUT = "have", "trying", "without"  # what a member says of a span's aggregate

CallPeer = Callable[[int, str], Callable[[AsyncIterator[BytesValue]], Awaitable[AsyncIterator[BytesValue]]]]


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
        residual: Residual | None,
        call: CallPeer,
        round_timeout_s: float,
        sender_timeout_s: float,
        faults: FaultPlan | None = None,
        disconnect: Callable[[str], None] = lambda peer_id: None,
    ):
        self.codec, self.run_tag, self.round, self.group_id = codec, run, round, group_id
        self.base_digest = base_digest
        self.members, self.own_index, self._call = members, own_index, call
        self.spans = codec.spans([1.0 if member.reduces else 0.0 for member in members])
        self._sections = [codec.cut(payload, *span) if span[1] else b"" for span in self.spans]
        self._round_timeout_s, self._sender_timeout_s = round_timeout_s, sender_timeout_s
        self._deadline = time.monotonic() + round_timeout_s
        # Reducers stop waiting for senders after the sender's timeout: who has not answered well after it will not.
        self._patience_s = (round_timeout_s + sender_timeout_s) / 2
        self._faults, self._disconnect = faults or FaultPlan(), disconnect
        self.aggregates: dict[int, bytes] = {}
        self._status = {j: TRYING for j in range(len(members)) if self.spans[j][1]}
        self._problems: list[str] = []
        self._reducer = SpanReducer(
            codec,
            self.spans[own_index],
            members,
            run=run,
            round=round,
            residual=residual,  # None = exact unions
            report=self._problems.append,
            reduced=lambda: self._faults.happen("reduced", round),
        )

    # ------------------------------------------------------------------ sending and collecting

    async def run(self) -> None:
        """Take part until every span is here, or known to be with nobody. Bounded by the round's timeout."""
        reducing = asyncio.create_task(self._reduce_own_span())
        try:
            await asyncio.gather(*(self._collect(j) for j in self._status))
            await asyncio.wait({reducing}, timeout=self._left_s())
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
        if self.own_index not in self.aggregates:
            return
        if await self._reducer.is_taken():
            return
        del self.aggregates[self.own_index]
        self._status[self.own_index] = WITHOUT
        self._problems.append("our span's aggregate reached nobody")

    def settle(self) -> tuple[int, int]:
        """The round counts: keep what our aggregate left out. Returns our span."""
        if self.own_index in self.aggregates:
            self._reducer.settle()
        return self.spans[self.own_index]

    def record(self, *, wait_s: float, exchange_s: float) -> RoundRecord:
        """What came out of the round for this member."""
        inside: set[int] = set()
        undelivered = []
        for j in self._status:
            aggregate = self.aggregates.get(j)
            indices = {i for i, _ in self.codec.contributors(aggregate)} if aggregate is not None else set()
            inside |= indices
            if self.own_index not in indices:
                undelivered.append(list(self.spans[j]))
        held = sorted(self.aggregates)
        return RoundRecord(
            round=self.round,
            base_digest=self.base_digest,
            members=[member.peer_id for member in self.members],
            contributors=[self.members[i].peer_id for i in sorted(inside)],
            spans=[list(self.spans[j]) for j in held],
            aggregates=[self.aggregates[j] for j in held],
            undelivered=undelivered,
            problems=self._problems,
            wait_s=wait_s,
            exchange_s=exchange_s,
        )

    def _left_s(self) -> float:
        return max(0.05, self._deadline - time.monotonic())

    async def _collect(self, j: int) -> None:
        try:
            aggregate = await asyncio.wait_for(self._from_reducer(j), self._patience_s)
        except asyncio.TimeoutError:
            aggregate = None
            self._problems.append(f"{self.members[j].peer_id} did not answer within the round's timeout")
        if aggregate is not None:
            self._keep(j, aggregate)
            return
        self._status[j] = WITHOUT
        await self._from_others(j)

    async def _from_reducer(self, j: int) -> bytes | None:
        if j == self.own_index:
            self._reducer.accept(j, self._sections[j])
            return await asyncio.shield(self._reducer.aggregate)
        header = {"group": self.group_id, "round": self.round}
        for attempt in range(ATTEMPTS):
            try:
                _, aggregate = await ask(
                    self._call(j, "rpc_aggregate_part"),
                    header,
                    self._faults.spoil("section", self.round, self._sections[j]),
                    max_bytes=self._max_aggregate_bytes(j),
                    timeout_s=self._sender_timeout_s,
                    reply_timeout_s=self._left_s(),
                    on_sent=functools.partial(self._sent_section, j),
                )
                self._check_aggregate(j, aggregate)
                return aggregate
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

    async def _from_others(self, j: int) -> None:
        """Ask the other members for span j until one has it, or all that can be reached are without it for good."""
        while j not in self.aggregates and time.monotonic() < self._deadline:
            others = [i for i, m in enumerate(self.members) if m.reduces and i != self.own_index]
            answers = await asyncio.gather(*(self._ask_member(i, j) for i in others))
            if j in self.aggregates or TRYING not in answers:
                return
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _ask_member(self, i: int, j: int) -> str:
        header = {"group": self.group_id, "round": self.round, "span": j}
        try:
            reply, aggregate = await ask(
                self._call(i, "rpc_fetch_span"),
                header,
                max_bytes=self._max_aggregate_bytes(j),
                timeout_s=min(self._sender_timeout_s, self._left_s()),
            )
            if reply.get("status") != HAVE:
                return TRYING if reply.get("status") == TRYING else WITHOUT
            self._check_aggregate(j, aggregate)
        except asyncio.CancelledError:
            raise
        except Exception:  # an unreachable or lying member counts as one without
            return WITHOUT
        self._keep(j, aggregate)
        return HAVE

    def _keep(self, j: int, aggregate: bytes) -> None:
        self.aggregates[j] = aggregate
        self._status[j] = HAVE

    def _check_aggregate(self, j: int, aggregate: bytes) -> None:
        first, count = self.spans[j]
        self.codec.check_aggregate(
            aggregate,
            run=self.run_tag,
            round=self.round,
            first_chunk=first,
            num_chunks=count,
            num_members=len(self.members),
        )
        for index, weight in self.codec.contributors(aggregate):
            if weight != self.members[index].weight:
                raise PayloadError("wrong-weight", f"weights {self.members[index].peer_id} by {weight}")

    def _max_aggregate_bytes(self, j: int) -> int:
        return self.codec.max_aggregate_bytes(*self.spans[j], len(self.members))

    # ------------------------------------------------------------------ planned faults

    def _sent_section(self, j: int, sent: int, total: int) -> None:
        for point in ("first-part-sent", "half-sent") if 2 * sent >= total else ("first-part-sent",):
            if self._faults.happen(point, self.round) == "close":
                self._disconnect(self.members[j].peer_id)

    def sent_aggregate(self, member_id: str, sent: int, total: int) -> None:
        """Part of our span's aggregate has gone to a member."""
        if sent == total:
            self._reducer.took(member_id)
        if 2 * sent >= total and self._faults.happen("half-delivered", self.round) == "close":
            self._disconnect(member_id)

    # ------------------------------------------------------------------ serving the other members

    async def serve_part(
        self, sender_id: str, header: Header, requests: AsyncIterator[BytesValue]
    ) -> tuple[Header, bytes]:
        """A member sends its section of our span and wants the aggregate. Raises StreamError to refuse."""
        sender = self._index_of(sender_id)
        if self.own_index not in self._status:
            raise StreamError("no span is reduced here")
        connection = self._reducer.connected(sender)
        try:
            section = await self._read_section(header, requests)
        except (StreamError, asyncio.TimeoutError) as error:
            self._reducer.drop(sender, str(error) or "stalled")
            raise
        except asyncio.CancelledError:  # the connection broke
            self._reducer.disconnected(sender, connection)
            raise
        self._reducer.accept(sender, section)
        reduced = self._reducer.aggregate
        try:
            # Shielded: a caller that hangs up must not cancel the result that all the others wait for.
            aggregate = await asyncio.wait_for(asyncio.shield(reduced), self._left_s())
            return {}, self._faults.spoil("aggregate", self.round, aggregate)
        except asyncio.CancelledError:
            if reduced.cancelled():
                raise StreamError("the span was not reduced in time") from None
            raise

    async def _read_section(self, header: Header, requests: AsyncIterator[BytesValue]) -> bytes:
        first, count = self.spans[self.own_index]
        limit = self.codec.max_payload_bytes(first, count)
        section = await read_blob(requests, header, max_bytes=limit, timeout_s=self._sender_timeout_s)
        try:
            self.codec.check(section, run=self.run_tag, round=self.round, first_chunk=first, num_chunks=count)
        except PayloadError as error:
            raise StreamError(f"{error.reason}: {error}") from None
        return section

    def serve_span(self, asker_id: str, span: object) -> tuple[Header, bytes]:
        """What we can say of a span's aggregate to a member that lacks it."""
        self._index_of(asker_id)
        if not isinstance(span, int) or not 0 <= span < len(self.members):
            raise StreamError("no such span")
        aggregate = self.aggregates.get(span)
        if aggregate is not None:
            if span == self.own_index:
                self._reducer.took(asker_id)
            return {"status": HAVE}, aggregate
        return {"status": self._status.get(span, WITHOUT)}, b""

    def _index_of(self, peer_id: str) -> int:
        for index, member in enumerate(self.members):
            if member.peer_id == peer_id and index != self.own_index:
                return index
        raise StreamError("not a member of this group")
