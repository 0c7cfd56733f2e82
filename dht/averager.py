"""The averager: hivemind's DecentralizedAverager, carrying sparse payloads and sure of what it delivered.

Used as hivemind's own PowerSGD averager uses it: matchmaking, RPC plumbing and the group life cycle are hivemind's,
`_aggregate_with_group` is ours. It lives in the network process's event loop instead of a forked process of its own,
so it is never started with `start()`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, AsyncIterator  # noqa: UP035  # hivemind recognizes streams by typing's AsyncIterator only

import torch
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.group_info import GroupInfo
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time

from dtrain.compression.codec import Codec
from dtrain.compression.residual import Piece
from dtrain.dht.faults import FaultPlan, spoil_hello
from dtrain.dht.groups import Groups
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.history import RoundHistory, RoundRecord, as_others_have_it, fetch_round
from dtrain.dht.identity import Identity
from dtrain.dht.kept_residual import KeptResidual
from dtrain.dht.matchmaking import RoundMatchmaking, Ticket
from dtrain.dht.membership import Contribution, agree_on_members, pack_hello
from dtrain.dht.reachability import CLIENT
from dtrain.dht.repute import Repute
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.state_donor import StateDonor
from dtrain.dht.streams import answer, first_header, in_background
from dtrain.dht.terms import RunTerms
from dtrain.dht.uplink import Uplink

REQUEST_TIMEOUT_S = 3.0  # a leader that does not answer within this is passed over
MIN_MATCHMAKING_S = 4.0  # must exceed the request timeout, or hivemind's search can deadlock
LATE_S = 5.0  # a member this long after its round's timeout was frozen meanwhile
MAX_HEADER_SIZE_FIELD = 2**62  # sizes are judged where the blob is read

Method = Callable[[AsyncIterator[BytesValue]], Awaitable[AsyncIterator[BytesValue]]]
Reply = tuple[dict[str, Any], "bytes | memoryview"]


class SwarmAverager(DecentralizedAverager):  # type: ignore[misc]  # hivemind ships no types
    """One worker's part in the exchange: finds each round's group, runs the round, serves the other members."""

    _rpc_handlers = None  # hivemind caches these on the class: without a reset they would be the base class's
    _stub_type = None

    def __init__(
        self,
        terms: RunTerms,
        codec: Codec,
        dht: Any,
        donor: StateDonor,
        *,
        reach: str,
        identity: Identity,
        residual: KeptResidual,
        faults: FaultPlan,
        door: Heartbeats,
    ):
        super().__init__(
            [torch.zeros(1)],  # our tensors travel as payloads; hivemind's own list stays a token
            dht,
            start=False,
            prefix=terms.prefix,
            min_matchmaking_time=MIN_MATCHMAKING_S,
            request_timeout=REQUEST_TIMEOUT_S,
            client_mode=reach == CLIENT,
            allow_state_sharing=False,
        )
        self.terms, self.codec, self._donor, self._identity = terms, codec, donor, identity
        self._reach, self._door = reach, door
        # Told of each round that came about: whose contributions count in it, by tokens.
        self.on_round: Callable[[int, dict[str, float]], None] = lambda round, weights: None
        # Told of each round that was run with others, and of those whose compressed sums count.
        self.on_group: Callable[[RoundRunner], None] = lambda runner: None
        self.on_sums: Callable[[RoundRunner, RoundRecord], None] = lambda runner, record: None
        # Told of peers that have come to a round on another theta than ours.
        self.on_split: Callable[[int, list[str]], None] = lambda round, peers: None
        self.schema_hash = terms.manifest_hash  # peers of another manifest are refused while matchmaking
        self.history = RoundHistory()
        self.repute = Repute(codec, terms, identity.peer_id, door)
        self._groups = Groups()
        self._faults = faults
        self.residual = residual
        self._uplink = Uplink()
        self._own_span = (0, 0)  # of the newest round that came to an end
        self._parted: list[Piece] = []  # of the residual, to be handed over besides what is released

    async def open(self, p2p: P2P) -> None:
        """Begin to answer other peers."""
        self._p2p = p2p
        self._matchmaking = RoundMatchmaking(
            p2p,
            self.schema_hash,
            self.dht,
            base_prefix=self.terms.prefix,
            heartbeats=self._door,
            client_mode=self.client_mode,
            **self.matchmaking_kwargs,
        )
        self._pending_groups_registered = asyncio.Event()
        if not self.client_mode:
            await self.add_p2p_handlers(p2p, namespace=self.prefix)

    # ------------------------------------------------------------------ one round

    async def run_round(self, contribution: Contribution, expected: Callable[[], int]) -> RoundRecord | None:
        """Meet the round's group and reduce with it; None when no group met within the manifest's time.

        `expected()` is the number of live peers, ourselves included.
        """
        started, now = time.monotonic(), get_dht_time()
        contribution = self._faults.update(self.codec, contribution, self.terms.run_tag)
        said = spoil_hello(contribution, self._faults.happen("matchmaking", contribution.round))
        patience_s = max(MIN_MATCHMAKING_S, self.terms.matchmaking_s)
        words = await self.repute.words(self._p2p, contribution.round)
        shown, mbps = self._door.own_pass, self._uplink.mbps
        ticket = Ticket(
            data_for_gather=pack_hello(said, reach=self._reach, mbps=mbps, shown=shown, **words),
            scheduled_time=now + patience_s,
            deadline=now + patience_s + 2 * MIN_MATCHMAKING_S,
        )
        group = await self._matchmaking.find_round_group(contribution.round, ticket, expected)
        if group is None:
            return None
        wait_s = time.monotonic() - started
        with self._register_allreduce_group(group):
            return await self._aggregate_with_group(group, contribution=contribution, wait_s=wait_s)

    async def _aggregate_with_group(
        self, group: GroupInfo, *, contribution: Contribution, wait_s: float
    ) -> RoundRecord:
        started, round = time.monotonic(), contribution.round
        came = group.peer_ids, group.gathered, round, self.terms.max_weight
        agreed = agree_on_members(*came, self._door.proves, self.repute.judging)
        members, told = agreed.members, self.repute.hear(round, agreed)
        ids, own = [member.peer_id for member in members], str(self.peer_id)
        self.on_split(round, agreed.apart(own, list(map(str, group.peer_ids))))
        if own not in ids:
            self._running_groups[group.group_id].cancel()
            return RoundRecord(round, contribution.base_digest, ids, problems=told, stale=True, wait_s=wait_s)
        self.residual.forget()  # this round is the swarm's: no later one counted, nor did an earlier try at it
        self._parted += self.residual.part()
        recompress = len(members) > self.terms.exact_up_to
        runner = RoundRunner(
            codec=self.codec,
            run=self.terms.run_tag,
            round=round,
            base_digest=contribution.base_digest,
            group_id=group.group_id,
            members=members,
            own_index=ids.index(own),
            payload=contribution.payload,
            identity=self._identity,
            residual=self.residual if recompress else None,
            call=lambda j, name: self.method(ids[j], name),
            round_timeout_s=self.terms.round_timeout_s,
            sender_timeout_s=self.terms.sender_timeout_s,
            screens=recompress and self.terms.screens,
            faults=self._faults,
            disconnect=self._disconnect,
        )
        self._running_groups[group.group_id].set_result(runner)
        await self._groups.add(runner)
        with self._donor.upload.round_under_way():
            await runner.run()
        self.on_group(runner)
        self._uplink.measure(runner.uploads)
        for reason in runner.refused.values():
            self._door.count(f"update-{reason}")
        for _ in runner.left_out_by:
            self._door.count("left-out")
        self._faults.happen("before-report", contribution.round)
        record = runner.record(wait_s=wait_s, exchange_s=time.monotonic() - started)
        record.problems.extend(told)
        if time.monotonic() > started + self.terms.round_timeout_s + LATE_S:
            record = await as_others_have_it(
                record, str(self.peer_id), self.codec, self.fetch_round, runner.bears_out
            )
        if not record.stale:
            await asyncio.to_thread(self.residual.judge, record.aggregates)
        if record.aggregates and not record.stale:  # else it was no round, to be handed on to nobody
            self._own_span = runner.own_span if recompress else (0, 0)
            if recompress:
                self.on_sums(runner, record)
            self.history.keep(record)
            self.repute.note(record)
            inside = set(record.contributors)
            self.on_round(record.round, {m.peer_id: m.weight for m in members if m.peer_id in inside})
        return record

    async def fetch_round(self, peer_id: str, round: int) -> RoundRecord:
        """A past round from one peer, checked. Raises StreamError, PayloadError, or hivemind's errors."""
        method, terms = self.method(peer_id, "rpc_fetch_round"), self.terms
        past = await fetch_round(method, self.codec, terms.run_tag, round, terms.sender_timeout_s)
        self.history.keep(past)
        return past

    def release_residual(self, *, all: bool) -> dict[str, Any]:
        """See `trainer.exchange`; each piece as a list, its values as bytes."""
        released = [*self._parted, *self.residual.release(*((0, 0) if all else self._own_span))]
        self._parted = []
        pieces = [[first, count, values.numpy().tobytes()] for first, count, values in released]
        return {"released": pieces, "num_handed": self.residual.num_handed}

    async def judge_residual(self, round: int, fetch: Callable[[int], Awaitable[RoundRecord | None]]) -> None:
        """Before `round`: find out whether an earlier one counted that we left before it was over."""
        unsure = self.residual.unsure
        if unsure is None or unsure.round >= round:
            return
        past = self.history.get(unsure.round) or await fetch(unsure.round)
        await asyncio.to_thread(self.residual.judge, None if past is None else past.aggregates)

    async def run_alone(self, contribution: Contribution) -> RoundRecord:
        """A round of one: our own payload is the aggregate."""
        first, count = whole = [0, self.codec.num_chunks]
        aggregate = await asyncio.to_thread(
            self.codec.reduce,
            [(0, contribution.weight, contribution.payload)],
            run=self.terms.run_tag,
            round=contribution.round,
            first_chunk=first,
            num_chunks=count,
        )
        self.residual.forget()
        own, self._own_span = [str(self.peer_id)], (0, 0)
        record = RoundRecord(contribution.round, contribution.base_digest, own, own, [whole], [aggregate])
        self.history.keep(record)
        self.on_round(contribution.round, {str(self.peer_id): contribution.weight})
        return record

    def _disconnect(self, peer_id: str) -> None:
        """A planned fault: the connection to one peer breaks, with every stream in it."""
        in_background(self._p2p._client.disconnect(PeerID.from_base58(peer_id)))

    # ------------------------------------------------------------------ calling and answering other peers

    def method(self, peer_id: str, name: str) -> Method:
        """A streaming RPC method of another peer."""
        stub = self.get_stub(self._p2p, PeerID.from_base58(peer_id), namespace=self.prefix)
        method: Method = getattr(stub, name)
        return method

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        async for message in self._matchmaking.rpc_join_group(request, context):
            yield message

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A groupmate's section of our span; the reply is the span's aggregate."""

        runner: RoundRunner | None = None

        async def handle() -> Reply:
            nonlocal runner
            header = await self._header(stream, context, MAX_HEADER_SIZE_FIELD)
            runner = await self._groups.get(header.get("group"))
            return await runner.serve_part(str(context.remote_id), header, stream)

        def on_sent(sent: int, total: int) -> None:
            if runner is not None:
                runner.sent_aggregate(str(context.remote_id), sent, total)

        async for message in answer(stream, handle, on_sent):
            yield message

    async def rpc_fetch_span(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A groupmate that lost a reducer asks for that reducer's aggregate."""

        async def handle() -> Reply:
            header = await self._header(stream, context)
            runner = await self._groups.get(header.get("group"))
            return runner.serve_span(str(context.remote_id), header.get("span"))

        async for message in answer(stream, handle):
            yield message

    async def rpc_fetch_round(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A straggler asks for the aggregates of a past round."""

        async def handle() -> Reply:
            return self.history.reply((await self._header(stream, context)).get("round"))

        async for message in answer(stream, handle):
            yield message

    async def rpc_fetch_state(
        self, stream: AsyncIterator[BytesValue], context: P2PContext
    ) -> AsyncIterator[BytesValue]:
        """A newcomer asks for everything it needs to stand where we stand."""
        async for message in self._donor.serve(stream, lambda: self._header(stream, context)):
            yield message

    async def _header(
        self, stream: AsyncIterator[BytesValue], context: P2PContext, max_bytes: int = 0
    ) -> dict[str, Any]:
        caller, patience_s = str(context.remote_id), self.terms.sender_timeout_s
        return await first_header(stream, lambda: self._door.refuses(caller), patience_s, max_bytes)

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """hivemind's own state download is not part of our protocol: rpc_fetch_state is checked and resumable."""
        return
        yield  # makes this an async generator, as hivemind requires
