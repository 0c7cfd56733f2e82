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
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.compression.errors import PayloadError
from dtrain.dht.faults import FaultPlan
from dtrain.dht.history import RoundRecord
from dtrain.dht.membership import Member
from dtrain.dht.streams import Header, Refused, StreamError, ask, read_blob

ATTEMPTS = 3
RETRY_PAUSE_S = 0.2
RECONNECT_S = 1.5  # how long a sender whose connection broke may take to come back
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
        residual: Tensor | None,
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
        self._residual = residual
        self._round_timeout_s, self._sender_timeout_s = round_timeout_s, sender_timeout_s
        self._deadline = time.monotonic() + round_timeout_s
        # Reducers stop waiting for senders after the sender's timeout: who has not answered well after it will not.
        self._patience_s = (round_timeout_s + sender_timeout_s) / 2
        self._faults, self._disconnect = faults or FaultPlan(), disconnect
        self.aggregates: dict[int, bytes] = {}
        self._status = {j: TRYING for j in range(len(members)) if self.spans[j][1]}
        self._inbox: dict[int, bytes] = {}
        self._inbox_changed = asyncio.Event()
        self._active = set(range(len(members)))  # senders whose section of our span may still come
        self._connections = [0] * len(members)
        self._own_aggregate: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._problems: list[str] = []

    # ------------------------------------------------------------------ sending and collecting

    async def run(self) -> None:
        """Take part until every span is here, or known to be with nobody. Bounded by the round's timeout."""
        reducer = asyncio.create_task(self._reduce_own_span())
        try:
            await asyncio.gather(*(self._collect(j) for j in self._status))
            await asyncio.wait({reducer}, timeout=self._left_s())
        finally:
            reducer.cancel()
            if not self._own_aggregate.done():
                self._own_aggregate.cancel()

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
            self._accept(j, self._sections[j])
            return await asyncio.shield(self._own_aggregate)
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
        if 2 * sent >= total and self._faults.happen("half-delivered", self.round) == "close":
            self._disconnect(member_id)

    # ------------------------------------------------------------------ reducing

    def _accept(self, sender: int, section: bytes) -> None:
        if sender in self._active and sender not in self._inbox:
            self._inbox[sender] = section
            self._inbox_changed.set()

    def _drop(self, sender: int, reason: str) -> None:
        if sender in self._active and sender not in self._inbox:
            self._active.discard(sender)
            self._problems.append(f"{self.members[sender].peer_id} is not in our span: {reason}")
            self._inbox_changed.set()

    async def _reduce_own_span(self) -> None:
        first, count = self.spans[self.own_index]
        if not count:
            return
        timeout = asyncio.get_running_loop().call_later(self._sender_timeout_s, self._drop_the_slow)
        try:
            while not self._active <= self._inbox.keys():
                self._inbox_changed.clear()
                await self._inbox_changed.wait()
        finally:
            timeout.cancel()
        sections = [(i, self.members[i].weight, self._inbox[i]) for i in sorted(self._active)]
        self._inbox, self._active = {}, set()  # from here on nobody comes in and nobody is dropped
        residual = self._residual
        aggregate = await asyncio.to_thread(
            self.codec.reduce,
            sections,
            residual=None if residual is None else residual[self.codec.layout.elements(first, count)],
            run=self.run_tag,
            round=self.round,
            first_chunk=first,
            num_chunks=count,
        )
        self._faults.happen("reduced", self.round)
        self._own_aggregate.set_result(aggregate)

    def _drop_the_slow(self) -> None:
        for sender in list(self._active):
            self._drop(sender, f"nothing within {self._sender_timeout_s:g} s")

    def _drop_the_gone(self, sender: int, connection: int) -> None:
        if self._connections[sender] == connection:
            self._drop(sender, "disconnected")

    # ------------------------------------------------------------------ serving the other members

    async def serve_part(
        self, sender_id: str, header: Header, requests: AsyncIterator[BytesValue]
    ) -> tuple[Header, bytes]:
        """A member sends its section of our span and wants the aggregate. Raises StreamError to refuse."""
        sender = self._index_of(sender_id)
        if self.own_index not in self._status:
            raise StreamError("no span is reduced here")
        self._connections[sender] += 1
        connection = self._connections[sender]
        try:
            section = await self._read_section(header, requests)
        except (StreamError, asyncio.TimeoutError) as error:
            self._drop(sender, str(error) or "stalled")
            raise
        except asyncio.CancelledError:  # the connection broke
            asyncio.get_running_loop().call_later(RECONNECT_S, self._drop_the_gone, sender, connection)
            raise
        self._accept(sender, section)
        try:
            # Shielded: a caller that hangs up must not cancel the result that all the others wait for.
            aggregate = await asyncio.wait_for(asyncio.shield(self._own_aggregate), self._left_s())
            return {}, self._faults.spoil("aggregate", self.round, aggregate)
        except asyncio.CancelledError:
            if self._own_aggregate.cancelled():
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
            return {"status": HAVE}, aggregate
        return {"status": self._status.get(span, WITHOUT)}, b""

    def _index_of(self, peer_id: str) -> int:
        for index, member in enumerate(self.members):
            if member.peer_id == peer_id and index != self.own_index:
                return index
        raise StreamError("not a member of this group")
