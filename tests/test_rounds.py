"""Laws of a round: whatever fails, all members end with the same aggregates, and what each of them produced is either
in these or kept by its sender.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgpack
import pytest
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from stream_tools import Call, Handler, Line, Messages, settled

from dtrain.compression.codec import Codec
from dtrain.compression.spec import CodecSpec
from dtrain.dht import rounds, streams
from dtrain.dht.faults import FaultPlan
from dtrain.dht.history import RoundRecord
from dtrain.dht.membership import Member
from dtrain.dht.rounds import RoundRunner
from dtrain.dht.streams import Header, Refused, StreamError, answer, ask, messages, next_message, parse_header

RUN, ROUND, GROUP, BASE = b"\x01\x02\x03\x04\x05\x06\x07\x08", 7, b"group", bytes(32)
NUM_ELEMENTS = 64 * 32 * 8
# One tensor in runs of 64: chunk order is the tensor's own order. 32 chunks make a group, so there are 8 groups.
CODEC = Codec(CodecSpec(chunk=64, k=32, value_bits=8), [("t", (NUM_ELEMENTS,))])
PATIENCE_S = 60.0  # a timeout that must not run out
SHORT_S = 1.0  # one that will

Fault = Callable[[Handler], Handler]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Use everything of the codec once: its kernels are compiled before any timeout runs."""
    payload, place = make_payload(0), {"first_chunk": 0, "num_chunks": CODEC.num_chunks}
    CODEC.check(CODEC.cut(payload, **place), run=RUN, round=ROUND, **place)
    for residual in (None, CODEC.residual(0, CODEC.num_chunks)):
        aggregate = reduce_all([(0, 1.0, payload), (1, 1.0, payload)], residual)
        CODEC.check_aggregate(aggregate, run=RUN, round=ROUND, num_members=2, **place)
        CODEC.decode([aggregate])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(rounds, "RECONNECT_S", 0.2)
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
        round_timeout_s: float = PATIENCE_S,
        sender_timeout_s: float = PATIENCE_S,
    ):
        self.line, self.played = Line(), played
        self.members = [Member(f"peer{i}", 100.0 + i, i not in indirect) for i in range(num)]
        self.payloads = [make_payload(i) for i in range(num)]
        self.residuals = [CODEC.residual(0, CODEC.num_chunks) if recompress else None for _ in range(num)]
        self.faults: dict[tuple[int, int, str], Fault | None] = {}
        """By (caller, callee, method): what becomes of the callee's handler; None = it cannot be reached."""
        self.runners = [
            RoundRunner(
                codec=CODEC,
                run=RUN,
                round=ROUND,
                base_digest=BASE,
                group_id=GROUP,
                members=self.members,
                own_index=i,
                payload=self.payloads[i],
                residual=self.residuals[i],
                call=functools.partial(self.call, i),
                round_timeout_s=round_timeout_s,
                sender_timeout_s=sender_timeout_s,
                faults=FaultPlan(),
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
        fault = self.faults.get((caller, callee, method), lambda honest: honest)
        if fault is None:
            return unreachable
        return self.line.call(fault(handler))

    def handler(self, caller_id: str, callee: int, method: str) -> Handler:
        """As `SwarmAverager` serves it."""

        def serve(requests: Messages) -> Messages:
            async def handle() -> tuple[Header, bytes]:
                header = parse_header((await next_message(requests, PATIENCE_S)).value, 2**62)
                if method == "rpc_fetch_span":
                    return self.runners[callee].serve_span(caller_id, header.get("span"))
                return await self.runners[callee].serve_part(caller_id, header, requests)

            return answer(requests, handle)

        return serve

    def part(self, caller: int, callee: int, section: bytes) -> Coroutine[Any, Any, tuple[Header, bytes]]:
        """Send a section by hand."""
        call = self.call(caller, callee, "rpc_aggregate_part")
        return ask(call, {"group": GROUP, "round": ROUND}, section, max_bytes=10**7, timeout_s=PATIENCE_S)

    def section(self, sender: int, reducer: int) -> bytes:
        return CODEC.cut(self.payloads[sender], *self.spans[reducer])

    async def run(self) -> list[RoundRecord]:
        """Let all honest members run; their records in order."""
        await asyncio.wait_for(asyncio.gather(*(self.runners[i].run() for i in self.honest)), PATIENCE_S)
        await settled(self.line)
        return [self.runners[i].record(wait_s=0.0, exchange_s=0.0) for i in self.honest]

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
        for own_span, residual in zip(self.spans, self.residuals, strict=True):
            if residual is not None and list(own_span) in first.spans:
                where = first.spans.index(list(own_span))
                inside = sum(weight for _, weight in CODEC.contributors(first.aggregates[where]))
                delivered += inside * residual
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


# ---------------------------------------------------------------------- rounds without faults


@pytest.mark.parametrize("indirect", [(), (1,), (0, 3)])
@pytest.mark.parametrize("num", [2, 4, 5])
def test_all_end_with_everything(num: int, indirect: tuple[int, ...]) -> None:
    """Without faults every member gets the same aggregates of all spans with everybody inside, as one reducer would
    have made them; nobody hangs up too early, and members whom nobody can dial take part all the same.
    """

    async def scenario() -> None:
        group = Group(num, indirect=indirect)
        records = await group.run()
        group.check(records)
        assert records[0].contributors == [member.peer_id for member in group.members]
        for record in records:
            assert (record.undelivered, record.problems) == ([], [])
        sections = [(i, group.members[i].weight, group.payloads[i]) for i in range(num)]
        alone = CODEC.decode([reduce_all(sections)])
        assert torch.equal(CODEC.decode(records[0].aggregates)[0], alone[0])
        assert group.line.num_hung_up_first == 0

    play(scenario)


def test_recompressed_aggregates_keep_the_rest_in_the_residuals() -> None:
    """With recompression, aggregates plus the reducers' residuals are what the members produced."""

    async def scenario() -> None:
        group = Group(5, recompress=True)
        group.check(await group.run())
        assert all(r is not None and r.abs().max() > 0 for r in group.residuals)

    play(scenario)


# ---------------------------------------------------------------------- a reducer that fails everybody


def of_another_round() -> bytes:
    """An aggregate of span 1 of three, well made but for the round before."""
    first, count = CODEC.spans([1.0] * 3)[1]
    section = CODEC.cut(make_payload(0, round=ROUND - 1), first, count)
    return CODEC.reduce([(0, 100.0, section)], run=RUN, round=ROUND - 1, first_chunk=first, num_chunks=count)


def weighted(index: int, weight: float) -> bytes:
    """An aggregate of span 1 of three that weights a member as the reducer likes."""
    first, count = CODEC.spans([1.0] * 3)[1]
    section = CODEC.cut(make_payload(0), first, count)
    return CODEC.reduce([(index, weight, section)], run=RUN, round=ROUND, first_chunk=first, num_chunks=count)


REDUCER_FAULTS: dict[str, Callable[[], tuple[Fault | None, str]]] = {
    "gone": lambda: (None, "cannot be reached"),
    "garbage header": lambda: (saying(b"\xc1\xc1"), "not msgpack"),
    "garbage": lambda: (replying(b"garbage" * 100), "bad-magic"),
    "empty": lambda: (replying(b""), "too-short"),
    "too large": lambda: (saying(msgpack.packb({"size": 2**40})), "announces"),
    "refuses": lambda: (refusing, "refused: not today"),
    "closes midway": lambda: (closing_midway, "ended early"),
    "another round": lambda: (replying(of_another_round()), "wrong-round"),
    "wrong weight": lambda: (replying(weighted(0, 1e9)), "wrong-weight"),
    "not a member": lambda: (replying(weighted(3, 100.0)), "bad-contributors"),
}


@pytest.mark.parametrize("kind", REDUCER_FAULTS)
def test_a_span_that_nobody_has_is_missing_for_all_alike(kind: str) -> None:
    """A reducer that fails everybody costs its span and nothing else: the others keep what they had for it."""

    async def scenario() -> None:
        fault, reason = REDUCER_FAULTS[kind]()
        group = Group(3, played=[1], sender_timeout_s=PATIENCE_S)
        group.break_reducer(1, fault)
        sending = [asyncio.create_task(group.part(1, j, group.section(1, j))) for j in group.honest]
        records = await group.run()
        await asyncio.gather(*sending)
        group.check(records)
        for record in records:
            assert record.spans == [list(group.spans[0]), list(group.spans[2])]
            assert record.undelivered == [list(group.spans[1])]
            assert record.contributors == ["peer0", "peer1", "peer2"]
            assert any(reason in problem and "peer1" in problem for problem in record.problems), (
                record.problems
            )

    play(scenario)


def test_a_reducer_that_never_answers_costs_one_round_timeout() -> None:
    """Silence ends with the round's timeout; everything else of the round stands."""

    async def scenario() -> None:
        group = Group(3, played=[1], round_timeout_s=2 * SHORT_S, sender_timeout_s=SHORT_S)
        group.break_reducer(1, silent)
        records = await group.run()
        group.check(records)
        for record in records:
            assert record.spans == [list(group.spans[0]), list(group.spans[2])]
            assert record.undelivered == [list(group.spans[1])]
            assert record.contributors == ["peer0", "peer2"]

    play(scenario)


# ---------------------------------------------------------------------- a reducer that fails one of them


@pytest.mark.parametrize("fault", [None, saying(b"\xc1"), refusing, closing_midway])
def test_a_lost_reducer_is_made_up_for_by_the_others(fault: Fault | None) -> None:
    """Who cannot get through to a reducer fetches the span from the others; only its own part of it is kept back."""

    async def scenario() -> None:
        group = Group(3, sender_timeout_s=SHORT_S)
        group.break_reducer(1, fault, 0)
        records = await group.run()
        group.check(records)
        assert [record.undelivered for record in records] == [[list(group.spans[1])], [], []]
        assert len(records[0].spans) == 3
        assert any("peer0 is not in our span" in problem for problem in records[1].problems)

    play(scenario)


def test_a_lost_reply_costs_nothing() -> None:
    """When the section arrived and only the reply was lost, the aggregate comes from the others with us inside."""

    async def scenario() -> None:
        group = Group(3)
        group.break_reducer(1, losing_the_reply, 0)
        records = await group.run()
        group.check(records)
        assert [record.undelivered for record in records] == [[], [], []]
        assert len(records[0].problems) == rounds.ATTEMPTS

    play(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_any_pattern_of_faults_leaves_one_result(seed: int) -> None:
    """However the calls between honest members fail, all end with the same aggregates and the accounts close."""

    async def scenario() -> None:
        rng, kinds = random.Random(seed), (None, saying(b"\xc1"), refusing, closing_midway, losing_the_reply)
        group = Group(4, recompress=seed % 2 == 1, sender_timeout_s=0.3)
        for caller in range(4):
            for callee in range(4):
                if rng.random() < 0.4:
                    group.faults[caller, callee, "rpc_aggregate_part"] = rng.choice(kinds)
        group.check(await group.run())

    play(scenario)


# ---------------------------------------------------------------------- senders that fail


def flipped(section: bytes) -> bytes:
    return section[:-1] + bytes([section[-1] ^ 1])


BAD_SECTIONS: dict[str, tuple[Callable[[Group, int], bytes], str]] = {
    "empty": (lambda group, j: b"", "too-short"),
    "garbage": (lambda group, j: b"garbage" * 100, "bad-magic"),
    "one bit": (lambda group, j: flipped(group.section(2, j)), "bad-checksum"),
    "too large": (lambda group, j: bytes(10**6), "announces 1000000 bytes"),
    "another span": (lambda group, j: group.section(2, 1 - j), "wrong-range"),
    "another round": (
        lambda group, j: CODEC.cut(make_payload(2, round=ROUND - 1), *group.spans[j]),
        "wrong-round",
    ),
    "another run": (
        lambda group, j: CODEC.cut(make_payload(2, run=b"other---"), *group.spans[j]),
        "wrong-run",
    ),
}


@pytest.mark.parametrize("kind", BAD_SECTIONS)
def test_a_sender_of_garbage_is_left_out_at_once(kind: str) -> None:
    """A section that breaks the format is refused with its reason, and the others do not wait any longer for it."""

    async def scenario() -> None:
        make, reason = BAD_SECTIONS[kind]
        group = Group(3, played=[2], indirect=[2])

        async def send(j: int) -> None:
            with pytest.raises(Refused) as caught:
                await group.part(2, j, make(group, j))
            assert reason in caught.value.reason

        sending = [asyncio.create_task(send(j)) for j in group.honest]
        records = await group.run()
        await asyncio.gather(*sending)
        group.check(records)
        for record in records:
            assert record.contributors == ["peer0", "peer1"] and record.undelivered == []
            assert any(reason in problem and "peer2" in problem for problem in record.problems)

    play(scenario)


def test_a_sender_that_never_sends_costs_one_sender_timeout() -> None:
    """A silent member is left out of every span; the others are all in."""

    async def scenario() -> None:
        group = Group(3, played=[2], indirect=[2], sender_timeout_s=SHORT_S)
        records = await group.run()
        group.check(records)
        for record in records:
            assert record.contributors == ["peer0", "peer1"] and record.undelivered == []
            assert record.problems == [f"peer2 is not in our span: nothing within {SHORT_S:g} s"]

    play(scenario)


def test_a_sender_that_sends_twice_counts_once() -> None:
    """The first section of a member counts; a second one, equal or not, gets the same aggregate as everybody."""

    async def scenario() -> None:
        group = Group(3, played=[2], indirect=[2])
        replies = []

        async def send(j: int) -> None:
            other = CODEC.cut(make_payload(99), *group.spans[j])
            for section in (group.section(2, j), other, flipped(other)):
                replies.append(asyncio.create_task(group.part(2, j, section)))
                for _ in range(50):  # let this one be taken in before the next is sent
                    await asyncio.sleep(0)

        sending = [asyncio.create_task(send(j)) for j in group.honest]
        records = await group.run()
        await asyncio.gather(*sending)
        outcomes = await asyncio.gather(*replies, return_exceptions=True)
        group.check(records)
        assert all(record.contributors == ["peer0", "peer1", "peer2"] for record in records)
        assert all(record.problems == [] for record in records)
        aggregates = [outcome[1] for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert sorted(aggregates) == sorted(records[0].aggregates * 2)
        assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 2  # the damaged ones

    play(scenario)


async def half(section: bytes) -> AsyncIterator[BytesValue]:
    """The first half of a section, then silence."""
    header, piece = messages({"group": GROUP, "round": ROUND}, section)
    yield header
    yield BytesValue(value=piece.value[: len(piece.value) // 2])
    await asyncio.Event().wait()


async def send_half(group: Group, caller: int, callee: int) -> None:
    """Send half a section and lose the connection."""
    replies = await group.call(caller, callee, "rpc_aggregate_part")(half(group.section(caller, callee)))
    reading = asyncio.ensure_future(replies.__anext__())
    for _ in range(50):
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})


def test_a_sender_may_lose_its_connection_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that breaks within a section is no reason to leave the sender out, if it comes back soon."""
    monkeypatch.setattr(rounds, "RECONNECT_S", PATIENCE_S)

    async def scenario() -> None:
        group = Group(2, played=[1], indirect=[1])
        running = asyncio.create_task(group.run())
        await send_half(group, 1, 0)
        await group.part(1, 0, group.section(1, 0))
        records = await running
        group.check(records)
        assert (records[0].contributors, records[0].problems) == (["peer0", "peer1"], [])

    play(scenario)


def test_a_sender_that_does_not_come_back_is_not_waited_for() -> None:
    """Who broke off is left out soon, long before the sender's timeout."""

    async def scenario() -> None:
        group = Group(2, played=[1], indirect=[1])
        running = asyncio.create_task(group.run())
        await send_half(group, 1, 0)
        records = await running
        group.check(records)
        assert records[0].contributors == ["peer0"]
        assert records[0].problems == ["peer1 is not in our span: disconnected"]

    play(scenario)


def test_one_callers_end_does_not_take_the_aggregate_from_the_others() -> None:
    """A member that hangs up while it waits for the aggregate cancels nobody else's."""

    async def scenario() -> None:
        group = Group(4, played=[2, 3], indirect=[2, 3])
        waiting = [asyncio.create_task(group.part(2, j, group.section(2, j))) for j in group.honest]
        running = asyncio.create_task(group.run())
        for _ in range(50):
            await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.gather(*(group.part(3, j, group.section(3, j)) for j in group.honest))
        records = await running
        group.check(records)
        assert records[0].contributors == [member.peer_id for member in group.members]

    play(scenario)


# ---------------------------------------------------------------------- what is served to whom


def test_strangers_and_nonsense_are_refused() -> None:
    """Only members are served, and only spans that exist."""

    async def scenario() -> None:
        group = Group(3, indirect=[2])
        runner = group.runners[0]
        for stranger in ("peer9", "", "peer0"):
            with pytest.raises(StreamError, match="not a member"):
                runner.serve_span(stranger, 0)
            with pytest.raises(StreamError, match="not a member"):
                await runner.serve_part(stranger, {"size": 0}, half(b""))
        for span in (-1, 3, 2**70, None, "0", 0.0, [0]):
            with pytest.raises(StreamError, match="no such span"):
                runner.serve_span("peer1", span)
        with pytest.raises(StreamError, match="no span is reduced here"):
            await group.runners[2].serve_part("peer1", {"size": 0}, half(b""))

    play(scenario)


def test_a_member_says_what_it_knows_of_a_span() -> None:
    """Before the end "trying", afterwards the aggregate itself, or "without" for a span that it could not get."""

    async def scenario() -> None:
        group = Group(3, played=[1], indirect=[2])
        group.break_reducer(1, refusing)
        runner = group.runners[0]
        assert runner.serve_span("peer1", 0) == ({"status": rounds.TRYING}, b"")
        sending = asyncio.create_task(group.part(1, 0, group.section(1, 0)))
        records = await group.run()
        await sending
        assert runner.serve_span("peer1", 0) == ({"status": rounds.HAVE}, records[0].aggregates[0])
        assert runner.serve_span("peer1", 1) == ({"status": rounds.WITHOUT}, b"")
        assert runner.serve_span("peer1", 2) == ({"status": rounds.WITHOUT}, b"")

    play(scenario)


def test_a_late_section_is_answered_and_changes_nothing() -> None:
    """Who sends after the reduction gets the aggregate that all have, without itself; nobody is dropped any more."""

    async def scenario() -> None:
        group = Group(3, played=[2], indirect=[2], sender_timeout_s=SHORT_S)
        records = await group.run()
        for j in group.honest:
            _, aggregate = await group.part(2, j, group.section(2, j))
            assert aggregate == records[0].aggregates[j]
        await send_half(group, 2, 0)
        await asyncio.sleep(2 * rounds.RECONNECT_S)
        again = group.runners[0].record(wait_s=0.0, exchange_s=0.0)
        assert (again.contributors, len(again.problems)) == (["peer0", "peer1"], 1)

    play(scenario)
