"""A group of round runners in one event loop, what can go wrong between them, and what must hold at the end."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.wrappers_pb2 import BytesValue
from stream_tools import Call, Handler, Line, Messages, settled

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.dht import parts, reducer, rounds, streams
from dtrain.dht.faults import FaultPlan
from dtrain.dht.history import RoundRecord
from dtrain.dht.identity import Identity
from dtrain.dht.kept_residual import KeptResidual
from dtrain.dht.membership import Member
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.seals import sign_section
from dtrain.dht.streams import Header, StreamError, answer, ask, messages, next_message, parse_header

RUN, ROUND, GROUP, BASE = b"\x01\x02\x03\x04\x05\x06\x07\x08", 7, b"group", bytes(32)
NUM_ELEMENTS = 64 * 32 * 8
# One tensor in runs of 64: chunk order is the tensor's own order. 32 chunks make a group, so there are 8 groups.
CODEC = Codec(CodecSpec(chunk=64, k=32, value_bits=8), [("t", (NUM_ELEMENTS,))])
IDENTITIES = [Identity(Path(), Ed25519PrivateKey.from_private_bytes(bytes([i] * 32))) for i in range(20)]
PEERS = [identity.peer_id for identity in IDENTITIES]
PATIENCE_S = 60.0  # a timeout that must not run out
SHORT_S = 1.0  # one that will

Fault = Callable[[Handler], Handler]


@functools.cache
def compile_kernels() -> None:
    """Use everything of the codec once: its kernels are compiled before any timeout runs."""
    payload, place = make_payload(0), {"first_chunk": 0, "num_chunks": CODEC.num_chunks}
    CODEC.check(CODEC.cut(payload, **place), run=RUN, round=ROUND, **place)
    for residual in (None, CODEC.residual(0, CODEC.num_chunks)):
        aggregate = reduce_all([(0, 1.0, payload), (1, 1.0, payload)], residual)
        CODEC.check_aggregate(aggregate, run=RUN, round=ROUND, num_members=2, **place)
        CODEC.decode([aggregate])


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses for tests, and nothing left to compile."""
    compile_kernels()
    for module in (rounds, parts):
        monkeypatch.setattr(module, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(reducer, "RECONNECT_S", 0.2)
    monkeypatch.setattr(reducer, "TAKE_S", 0.5)
    monkeypatch.setattr(streams, "ACKNOWLEDGE_S", 0.2)
    monkeypatch.setattr(streams, "HANG_UP_S", 0.05)


def make_payload(seed: int, *, run: bytes = RUN, round: int = ROUND) -> bytes:
    tensor = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(seed))
    return CODEC.encode([tensor], CODEC.error_feedback(), decay=1.0, run=run, round=round)


def reduce_all(sections: Sequence[tuple[int, float, bytes]], residual: torch.Tensor | None = None) -> bytes:
    """What a single reducer makes of whole payloads."""
    place = {"first_chunk": 0, "num_chunks": CODEC.num_chunks}
    return CODEC.reduce(sections, residual=residual, run=RUN, round=ROUND, **place)


def flat(payload: bytes, spans: Sequence[Sequence[int]] = ((0, CODEC.num_chunks),)) -> torch.Tensor:
    """What those spans of a payload say, [NUM_ELEMENTS]."""
    total = CODEC.error_feedback()
    for first, count in spans:
        CODEC.give_back(total, payload, first, count)
    return total


class Group:
    """Members of one round in one event loop, joined by a `Line`; each has a RoundRunner unless a test plays it."""

    def __init__(
        self,
        num: int,
        *,
        played: Sequence[int] = (),
        indirect: Sequence[int] = (),
        recompress: bool = False,
        payloads: Sequence[bytes] = (),
        screens: bool = False,
        after: Group | None = None,
        faults: Mapping[int, FaultPlan] = MappingProxyType({}),
        round_timeout_s: float = PATIENCE_S,
        sender_timeout_s: float = PATIENCE_S,
    ):
        self.line, self.played = Line(), played
        self.members = [Member(PEERS[i], 100.0 + i, i not in indirect) for i in range(num)]
        self.payloads = list(payloads) or [make_payload(i) for i in range(num)]
        self.residuals = [KeptResidual(CODEC, RUN) if recompress else None for _ in range(num)]
        if after is not None:  # the same members, with what they kept as reducers
            self.residuals = after.residuals
        self.faults: dict[tuple[int, int, str], Fault | None] = {}
        """By (caller, callee, method): what becomes of the callee's handler; None = it cannot be reached."""
        self.runners = [
            RoundRunner(
                codec=CODEC,
                run=RUN,
                round=ROUND,
                base_digest=BASE,
                group_id=GROUP if after is None else b"next",
                members=self.members,
                own_index=i,
                payload=self.payloads[i],
                identity=IDENTITIES[i],
                residual=self.residuals[i],
                call=functools.partial(self.call, i),
                round_timeout_s=round_timeout_s,
                sender_timeout_s=sender_timeout_s,
                screens=screens,
                faults=faults.get(i, FaultPlan()),
                disconnect=lambda _: None,
            )
            for i in range(num)
        ]
        self.spans = self.runners[0].spans
        self.honest = [i for i in range(num) if i not in played]

    def break_reducer(self, callee: int, fault: Fault | None, *callers: int) -> None:
        """Put a fault on every call to that peer, from those callers or from all."""
        for caller in callers or range(len(self.members)):
            for method in ("rpc_aggregate_part", "rpc_fetch_span"):
                self.faults[caller, callee, method] = fault

    def call(self, caller: int, callee: int, method: str) -> Call:
        handler = self.handler(self.members[caller].peer_id, callee, method)
        fault = self.faults.get((caller, callee, method), honest)
        return unreachable if fault is None else self.line.call(fault(handler))

    def handler(self, caller_id: str, callee: int, method: str) -> Handler:
        """As `SwarmAverager` serves it."""

        def serve(requests: Messages) -> Messages:
            async def handle() -> tuple[Header, bytes]:
                header = parse_header((await next_message(requests, PATIENCE_S)).value, 2**62)
                if method == "rpc_fetch_span":
                    return self.runners[callee].serve_span(caller_id, header.get("span"))
                return await self.runners[callee].serve_part(caller_id, header, requests)

            took = functools.partial(self.runners[callee].sent_aggregate, caller_id)
            return answer(requests, handle, took if method == "rpc_aggregate_part" else None)

        return serve

    def part(self, caller: int, callee: int, section: bytes) -> Coroutine[Any, Any, tuple[Header, bytes]]:
        """Send a section by hand."""
        call = self.call(caller, callee, "rpc_aggregate_part")
        header = self.header(caller, callee, section)
        return ask(call, header, section, max_bytes=10**7, timeout_s=PATIENCE_S)

    def header(self, caller: int, callee: int, section: bytes) -> Header:
        """What a section is sent with."""
        signature = sign_section(IDENTITIES[caller], self.runners[0].setting, self.spans[callee], section)
        return {"group": GROUP, "round": ROUND, "signature": signature}

    def section(self, sender: int, reducer: int) -> bytes:
        return CODEC.cut(self.payloads[sender], *self.spans[reducer])

    async def meet(self) -> list[RoundRecord]:
        """Let all honest members run; their records in order. No residual knows yet whether the round counts."""
        await asyncio.wait_for(asyncio.gather(*(self.runners[i].run() for i in self.honest)), PATIENCE_S)
        await settled(self.line)
        return [self.runners[i].record(wait_s=0.0, exchange_s=0.0) for i in self.honest]

    async def run(self) -> list[RoundRecord]:
        """The same to its end."""
        records = await self.meet()
        for i, record in zip(self.honest, records, strict=True):
            if (residual := self.residuals[i]) is not None:
                residual.judge(record.aggregates)
        return records

    def check(self, records: Sequence[RoundRecord]) -> None:
        """One set of aggregates for all, and delivered + kept = produced, weighted, summed over the honest."""
        first = records[0]
        for record in records:
            assert (record.spans, record.aggregates) == (first.spans, first.aggregates)
            assert record.contributors == first.contributors
        delivered = torch.zeros(NUM_ELEMENTS)
        for aggregate in first.aggregates:
            weights = dict(CODEC.contributors(aggregate))
            assert weights == {i: self.members[i].weight for i in weights}
            delivered += sum(weights.values()) * CODEC.decode([aggregate])[0]
            for i in weights.keys() & set(self.played):
                span = next(s for s, a in zip(first.spans, first.aggregates, strict=True) if a is aggregate)
                delivered -= self.members[i].weight * flat(self.payloads[i], [span])
        for residual in filter(None, self.residuals):
            for first_chunk, num_chunks, weighted in residual.release():
                delivered[CODEC.layout.elements(first_chunk, num_chunks)] += weighted
        kept, produced = torch.zeros(NUM_ELEMENTS), torch.zeros(NUM_ELEMENTS)
        for i, record in zip(self.honest, records, strict=True):
            kept += self.members[i].weight * flat(self.payloads[i], record.undelivered)
            produced += self.members[i].weight * flat(self.payloads[i])
        torch.testing.assert_close(delivered + kept, produced, rtol=1e-4, atol=1e-2)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


# ---------------------------------------------------------------------- faults


def honest(handler: Handler) -> Handler:
    return handler


async def unreachable(_: Messages) -> Messages:
    raise ConnectionRefusedError("nobody there")


def saying(*values: bytes) -> Fault:
    """Answers these messages, then hangs up when the caller has."""

    async def handler(requests: Messages) -> Messages:
        for value in values:
            yield BytesValue(value=value)
        async for _ in requests:
            pass

    return lambda _: handler


def replying(blob: bytes) -> Fault:
    return saying(*(message.value for message in messages({}, blob)))


def silent(_: Handler) -> Handler:
    async def handler(requests: Messages) -> Messages:
        async for _ in requests:
            pass
        await asyncio.Event().wait()
        yield BytesValue()

    return handler


def closing_midway(_: Handler) -> Handler:
    """Announces more than it sends."""

    async def handler(requests: Messages) -> Messages:
        await next_message(requests, PATIENCE_S)
        yield BytesValue(value=msgpack.packb({"size": 1000}))
        yield BytesValue(value=bytes(500))

    return handler


def losing_the_reply(honest: Handler) -> Handler:
    """The callee does its work, but its reply breaks off after the header."""

    async def handler(requests: Messages) -> Messages:
        yield await honest(requests).__anext__()

    return handler


def refusing(_: Handler) -> Handler:
    return lambda requests: answer(requests, _refuse)


async def _refuse() -> tuple[Header, bytes]:
    raise StreamError("not today")


async def turns(num: int = 100) -> None:
    """Let everything that can go on go on."""
    for _ in range(num):
        await asyncio.sleep(0)
