"""Laws of a reducer: whatever its group's members send or fail to send, it makes one aggregate of what is good in time,
gives it to every member that asks, and to nobody else.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from round_tools import (
    CODEC,
    IDENTITIES,
    PATIENCE_S,
    PEERS,
    ROUND,
    SHORT_S,
    Group,
    make_payload,
    play,
    quicken,
    refusing,
    turns,
)
from stream_tools import Messages

from dtrain.dht import parts, reducer
from dtrain.dht.seals import sign_section
from dtrain.dht.streams import Header, Refused, StreamError, ask, messages, read


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


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
            assert record.contributors == [PEERS[0], PEERS[1]] and record.undelivered == []
            assert any(reason in problem and PEERS[2] in problem for problem in record.problems)

    play(scenario)


@pytest.mark.parametrize("kind", ["none", "another's", "of another section", "of another round"])
def test_a_section_without_its_senders_signature_is_refused(kind: str) -> None:
    """A section that is in order, but not signed by who sends it for this round: it is in no sum."""

    async def scenario() -> None:
        group = Group(3, played=[2], indirect=[2])
        setting = group.runners[0].setting

        def signature(j: int) -> bytes:
            section, span = group.section(2, j), group.spans[j]
            return {
                "none": b"",
                "another's": sign_section(IDENTITIES[1], setting, span, section),
                "of another section": sign_section(IDENTITIES[2], setting, span, group.section(1, j)),
                "of another round": sign_section(
                    IDENTITIES[2], replace(setting, round=ROUND - 1), span, section
                ),
            }[kind]

        async def send(j: int) -> None:
            call, section = group.call(2, j, "rpc_aggregate_part"), group.section(2, j)
            header = {**group.header(2, j, section), "signature": signature(j)}
            with pytest.raises(Refused, match="bad-signature"):
                await ask(call, header, section, max_bytes=10**7, timeout_s=PATIENCE_S)

        sending = [asyncio.create_task(send(j)) for j in group.honest]
        records = await group.run()
        await asyncio.gather(*sending)
        group.check(records)
        assert all(record.contributors == [PEERS[0], PEERS[1]] for record in records)

    play(scenario)


def test_a_sender_that_never_sends_costs_one_sender_timeout() -> None:
    """A silent member is left out of every span; the others are all in."""

    async def scenario() -> None:
        group = Group(3, played=[2], indirect=[2], sender_timeout_s=SHORT_S)
        records = await group.run()
        group.check(records)
        for record in records:
            assert record.contributors == [PEERS[0], PEERS[1]] and record.undelivered == []
            assert record.problems == [f"{PEERS[2]} is not in our span: nothing within {SHORT_S:g} s"]

    play(scenario)


def test_a_sender_that_sends_twice_counts_once() -> None:
    """The first section of a member counts; a second one, equal or not, gets the same aggregate as everybody."""

    async def scenario() -> None:
        group = Group(4, played=[2, 3], indirect=[2, 3])
        replies: list[asyncio.Task[tuple[Header, bytes]]] = []

        async def send(j: int) -> None:
            other = CODEC.cut(make_payload(99), *group.spans[j])
            for section in (group.section(2, j), other, flipped(other)):
                replies.append(asyncio.create_task(group.part(2, j, section)))
                await turns()  # let this one be taken in before the next is sent
            await group.part(3, j, group.section(3, j))  # what all have been waiting for

        running = asyncio.create_task(group.run())
        await asyncio.gather(*(send(j) for j in group.honest))
        records = await running
        outcomes = await asyncio.gather(*replies, return_exceptions=True)
        group.check(records)
        assert all(len(record.contributors) == 4 and record.problems == [] for record in records)
        aggregates = [outcome[1] for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert sorted(aggregates) == sorted(records[0].aggregates * 2)
        assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 2  # the damaged ones

    play(scenario)


async def halves(said: Header, section: bytes, go_on: asyncio.Event) -> AsyncIterator[BytesValue]:
    """The first half of a section; when told so, the other half; then silence."""
    header, piece = messages(said, section)
    middle = len(piece.value) // 2
    yield header
    yield BytesValue(value=piece.value[:middle])
    await go_on.wait()
    yield BytesValue(value=piece.value[middle:])
    await asyncio.Event().wait()


async def send_half(
    group: Group, caller: int, callee: int, go_on: asyncio.Event
) -> asyncio.Task[tuple[Header, bytes]]:
    """Send half a section; the task sends the rest and reads the reply. Cancelling it breaks the connection."""
    section = group.section(caller, callee)
    requests = halves(group.header(caller, callee, section), section, go_on)
    replies = await group.call(caller, callee, "rpc_aggregate_part")(requests)
    reading = asyncio.create_task(read(replies, max_bytes=10**7, timeout_s=PATIENCE_S))
    await turns()
    return reading


def test_a_sender_may_lose_its_connection_and_come_back() -> None:
    """A connection that breaks within a section is no reason to leave the sender out while it has another."""

    async def scenario() -> None:
        group, never, go_on = Group(2, played=[1], indirect=[1]), asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(group.run())
        broken = await send_half(group, 1, 0, never)
        another = await send_half(group, 1, 0, go_on)
        broken.cancel()
        await asyncio.sleep(2 * reducer.RECONNECT_S)
        go_on.set()
        await another
        records = await running
        group.check(records)
        assert (records[0].contributors, records[0].problems) == ([PEERS[0], PEERS[1]], [])

    play(scenario)


def test_a_sender_that_does_not_come_back_is_not_waited_for() -> None:
    """Who broke off is left out soon, long before the sender's timeout."""

    async def scenario() -> None:
        group = Group(3, played=[1], indirect=[1])
        running = asyncio.create_task(group.run())
        for callee in group.honest:
            (await send_half(group, 1, callee, asyncio.Event())).cancel()
        records = await running
        group.check(records)
        for record in records:
            assert record.contributors == [PEERS[0], PEERS[2]]
            assert record.problems == [f"{PEERS[1]} is not in our span: disconnected"]

    play(scenario)


def test_what_reaches_nobody_is_kept() -> None:
    """A reducer whose sum nobody has got does not count it either: the whole payload is undelivered."""

    async def scenario() -> None:
        group = Group(2, played=[1], indirect=[1], recompress=True)
        running = asyncio.create_task(group.run())
        (await send_half(group, 1, 0, asyncio.Event())).cancel()
        records = await running
        group.check(records)
        assert (records[0].contributors, records[0].aggregates) == ([], [])
        assert records[0].undelivered == [list(span) for span in group.spans if span[1]]
        assert group.residuals[0] is not None and group.residuals[0].release() == []

    play(scenario)


def test_one_callers_end_does_not_take_the_aggregate_from_the_others() -> None:
    """A member that hangs up while it waits for the aggregate cancels nobody else's."""

    async def scenario() -> None:
        group = Group(4, played=[2, 3], indirect=[2, 3])
        waiting = [asyncio.create_task(group.part(2, j, group.section(2, j))) for j in group.honest]
        running = asyncio.create_task(group.run())
        await turns()
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await asyncio.gather(*(group.part(3, j, group.section(3, j)) for j in group.honest))
        records = await running
        group.check(records)
        assert records[0].contributors == [member.peer_id for member in group.members]

    play(scenario)


# ---------------------------------------------------------------------- what is served to whom


async def nothing() -> Messages:
    return
    yield BytesValue()  # makes this an async generator


def test_strangers_and_nonsense_are_refused() -> None:
    """Only members are served, and only spans that exist."""

    async def scenario() -> None:
        group = Group(3, indirect=[2])
        runner = group.runners[0]
        for stranger in (PEERS[9], "", PEERS[0]):
            with pytest.raises(StreamError, match="not a member"):
                runner.serve_span(stranger, 0)
            with pytest.raises(StreamError, match="not a member"):
                await runner.serve_part(stranger, {"size": 0}, nothing())
        for span in (-1, 3, 2**70, None, "0", 0.0, [0]):
            with pytest.raises(StreamError, match="no such span"):
                runner.serve_span(PEERS[1], span)
        with pytest.raises(StreamError, match="no span is reduced here"):
            await group.runners[2].serve_part(PEERS[1], {"size": 0}, nothing())

    play(scenario)


def test_a_member_says_what_it_knows_of_a_span() -> None:
    """Before the end "trying", afterwards the aggregate itself, or "without" for a span that it could not get."""

    async def scenario() -> None:
        group = Group(3, played=[1], indirect=[2])
        group.break_reducer(1, refusing)
        runner = group.runners[0]
        assert runner.serve_span(PEERS[1], 0) == ({"status": parts.TRYING}, b"")
        sending = asyncio.create_task(group.part(1, 0, group.section(1, 0)))
        records = await group.run()
        await sending
        header, aggregate = runner.serve_span(PEERS[1], 0)
        assert (header["status"], aggregate) == (parts.HAVE, records[0].aggregates[0])
        assert runner.serve_span(PEERS[1], 1) == ({"status": parts.WITHOUT}, b"")
        assert runner.serve_span(PEERS[1], 2) == ({"status": parts.WITHOUT}, b"")

    play(scenario)


def test_a_late_section_is_answered_and_changes_nothing() -> None:
    """Who sends after the reduction gets the aggregate that all have; nobody comes in or is dropped any more."""

    async def scenario() -> None:
        group = Group(4, played=[2, 3], indirect=[2, 3], sender_timeout_s=SHORT_S)
        in_time = [asyncio.create_task(group.part(2, j, group.section(2, j))) for j in group.honest]
        records = await group.run()
        await asyncio.gather(*in_time)
        for late, j in itertools.product(group.played, group.honest):
            (await send_half(group, late, j, asyncio.Event())).cancel()
        await asyncio.sleep(2 * reducer.RECONNECT_S)
        for late, j in itertools.product(group.played, group.honest):
            _, aggregate = await group.part(late, j, group.section(late, j))
            assert aggregate == records[0].aggregates[j]
        for runner in (group.runners[j] for j in group.honest):
            record = runner.record(wait_s=0.0, exchange_s=0.0)
            assert record.contributors == [PEERS[0], PEERS[1], PEERS[2]]
            assert record.problems == [f"{PEERS[3]} is not in our span: nothing within {SHORT_S:g} s"]

    play(scenario)
