"""Laws of streaming RPCs: a reply arrives whole or fails with a reason, and the caller always hangs up first."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_tools import Handler, Line, Messages, settled

from dtrain.dht import streams
from dtrain.dht.streams import (
    MAX_HEADER_BYTES,
    MAX_REASON,
    PIECE_BYTES,
    Refused,
    StreamError,
    answer,
    ask,
    messages,
    next_message,
    parse_header,
    read,
)

PATIENCE_S = 30.0  # a timeout that must not run out


async def stream(*values: bytes) -> AsyncIterator[BytesValue]:
    """A stream of these messages, then its end."""
    for value in values:
        yield BytesValue(value=value)


def read_from(*values: bytes, max_bytes: int = 10**6) -> tuple[dict[str, Any], bytes]:
    return asyncio.run(read(stream(*values), max_bytes=max_bytes, timeout_s=PATIENCE_S))


def head(**fields: object) -> bytes:
    return bytes(msgpack.packb(fields))


# ---------------------------------------------------------------------- the format


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
def test_a_blob_comes_out_as_it_went_in(size: int) -> None:
    """Any size arrives equal, in pieces of at most PIECE_BYTES, with the header's fields beside it."""
    blob = random.Random(size).randbytes(size)
    sent = list(messages({"round": 3, "group": b"g"}, memoryview(blob)))
    assert all(len(message.value) <= PIECE_BYTES for message in sent)
    header, received = read_from(*(message.value for message in sent))
    assert (header, received) == ({"round": 3, "group": b"g", "size": size}, blob)


def test_pieces_can_go_elsewhere() -> None:
    """With on_bytes each piece is handed over as it comes, with the header, and none is kept."""
    seen: list[tuple[int, bytes]] = []

    async def scenario() -> tuple[dict[str, Any], bytes]:
        return await read(
            stream(head(size=5, n=9), b"abc", b"de"),
            max_bytes=5,
            timeout_s=PATIENCE_S,
            on_bytes=lambda header, piece: seen.append((header["n"], piece)),
        )

    assert asyncio.run(scenario())[1] == b""
    assert seen == [(9, b"abc"), (9, b"de")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "ended early"),
        ([head(size=4)], "ended early"),
        ([head(size=4), b"abc"], "ended early"),
        ([head(size=4), b"abcde"], "5 bytes where 4 were left"),
        ([head(size=4), b"abc", b"de"], "2 bytes where 1 were left"),
        ([head(size=4), b"", b"abcd"], "0 bytes where 4 were left"),
        ([head(size=101)], "at most 100"),
        ([head(size=2**63)], "at most 100"),
        ([head(size=-1)], "at most 100"),
        ([head(size="4"), b"abcd"], "at most 100"),
        ([head(size=4.0), b"abcd"], "at most 100"),
        ([head(size=None)], "at most 100"),
        ([head(other=1)], "at most 100"),
        ([msgpack.packb([4])], "not a map"),
        ([b"\xc1"], "not msgpack"),
        ([b"\xdf\xff\xff\xff\xff"], "not msgpack"),
        ([b"\x91" * 5000], "not msgpack"),
        ([head(size=4, pad=bytes(MAX_HEADER_BYTES))], "a header of"),
        ([head(refused="no reason")], "refused: no reason"),
    ],
)
def test_what_breaks_the_format_is_named(values: list[bytes], reason: str) -> None:
    """Too little, too much, empty pieces and impossible headers raise StreamError with a short reason."""
    with pytest.raises(StreamError, match=reason):
        read_from(*values, max_bytes=100)


@given(values=st.lists(st.binary(max_size=30) | st.builds(head, size=st.integers(0, 60)), max_size=5))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_garbage_is_a_stream_error_or_as_announced(values: list[bytes]) -> None:
    """Whatever comes, either StreamError is raised or exactly the announced number of bytes is returned."""
    try:
        header, blob = read_from(*values, max_bytes=50)
    except StreamError:
        return
    assert len(blob) == header["size"] <= 50


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_garbage_header_is_a_stream_error(raw: bytes) -> None:
    """Arbitrary bytes are no header, or one with a plausible size."""
    try:
        assert 0 <= parse_header(raw, 10)["size"] <= 10
    except StreamError:
        pass


def test_a_refusal_cannot_flood_the_log() -> None:
    """Texts that come from the other side are cut short wherever they end up in a message."""
    for raw in (head(refused="x" * 60000), head(size="x" * 60000)):
        with pytest.raises(StreamError) as caught:
            parse_header(raw, 10)
        assert len(str(caught.value)) < MAX_REASON + 50


def test_a_stalled_stream_times_out() -> None:
    """When nothing comes for timeout_s, before the header or between pieces, asyncio.TimeoutError is raised."""

    async def stalls(*values: bytes) -> AsyncIterator[BytesValue]:
        for value in values:
            yield BytesValue(value=value)
        await asyncio.Event().wait()

    for values in ([], [head(size=4)], [head(size=4), b"abc"]):
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(read(stalls(*values), max_bytes=10, timeout_s=0.02))


# ---------------------------------------------------------------------- asking and answering, in memory


def echo(requests: Messages) -> Messages:
    """A handler that sends back what it got."""

    async def handle() -> tuple[dict[str, Any], bytes]:
        return await read(requests, max_bytes=10**8, timeout_s=PATIENCE_S)

    return answer(requests, handle)


def failing(error: Exception) -> Handler:
    """A handler that reads the header and then fails."""

    def handler(requests: Messages) -> Messages:
        async def handle() -> tuple[dict[str, Any], bytes]:
            await next_message(requests, PATIENCE_S)
            raise error

        return answer(requests, handle)

    return handler


def on_a_line(handler: Handler, blob: bytes = b"", **limits: Any) -> tuple[Any, Line]:
    """(reply or error of one call, the line), after both ends have hung up."""

    async def scenario() -> tuple[Any, Line]:
        line = Line()
        limits.setdefault("max_bytes", 10**8)
        limits.setdefault("timeout_s", PATIENCE_S)
        try:
            outcome: Any = await ask(line.call(handler), {"n": 1}, blob, **limits)
        except (StreamError, asyncio.TimeoutError) as error:
            outcome = error
        await settled(line)
        return outcome, line

    return asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 1, 10 * PIECE_BYTES + 3])
def test_an_answer_arrives_and_the_caller_hangs_up_first(size: int) -> None:
    """Both ways any number of bytes arrive whole, and the answering side stays until the caller's end of stream."""
    blob = random.Random(size).randbytes(size)
    outcome, line = on_a_line(echo, blob)
    assert outcome == ({"n": 1, "size": size}, blob)
    assert (line.num_calls, line.num_acknowledged, line.num_hung_up_first) == (1, 1, 0)


def test_the_line_loses_what_a_hasty_answer_sent() -> None:
    """A handler that ends with its last message loses it on our line: it is as bad as the worst real one."""

    async def hasty(requests: Messages) -> Messages:
        await next_message(requests, PATIENCE_S)
        for message in messages({}, b"reply"):
            yield message

    outcome, line = on_a_line(hasty)
    assert isinstance(outcome, StreamError) and "ended early" in str(outcome)
    assert line.num_hung_up_first == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StreamError("not here"), "not here"),
        (StreamError("x" * 100000), "x" * MAX_REASON),
        (ValueError("secret path"), "internal error"),
        (asyncio.TimeoutError(), "timed out"),
    ],
)
def test_a_refusal_arrives_too(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every error path the caller gets the reason: there, too, the answering side does not hang up first."""
    monkeypatch.setattr(streams, "HANG_UP_S", 0.05)
    outcome, line = on_a_line(failing(error), bytes(3 * PIECE_BYTES))
    assert isinstance(outcome, Refused) and outcome.reason == reason
    assert (line.num_acknowledged, line.num_hung_up_first) == (1, 0)


def test_a_refusal_of_a_caller_that_stalled_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that timed out has closed the request stream; the refusal still waits for the caller's hang-up."""
    monkeypatch.setattr(streams, "HANG_UP_S", 0.02)

    def handler(requests: Messages) -> Messages:
        async def handle() -> tuple[dict[str, Any], bytes]:
            await next_message(requests, PATIENCE_S)
            await next_message(requests, 0.02)
            raise AssertionError("the caller sends one message only")

        return answer(requests, handle)

    outcome, line = on_a_line(handler)
    assert isinstance(outcome, Refused) and outcome.reason == "timed out"
    assert line.num_hung_up_first == 0


def test_a_caller_that_never_acknowledges_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an end of stream the answering side leaves after ACKNOWLEDGE_S, not before and not much later."""
    monkeypatch.setattr(streams, "ACKNOWLEDGE_S", 0.2)

    async def scenario() -> None:
        line = Line()

        async def requests() -> AsyncIterator[BytesValue]:
            for message in messages({}, b"request"):
                yield message
            await asyncio.Event().wait()

        replies = await line.call(echo)(requests())
        assert await read(replies, max_bytes=10, timeout_s=PATIENCE_S) == ({"size": 7}, b"request")
        read_at = time.monotonic()
        assert line.open == 1
        await settled(line)
        assert time.monotonic() - read_at > 0.1
        assert line.num_hung_up_first == 1
        await replies.aclose()  # type: ignore[attr-defined]  # an async generator

    asyncio.run(scenario())


def test_a_caller_that_sends_without_end_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can hold a handler longer than ACKNOWLEDGE_S by sending on and on."""
    monkeypatch.setattr(streams, "ACKNOWLEDGE_S", 0.1)

    async def scenario() -> None:
        line = Line()

        async def requests() -> AsyncIterator[BytesValue]:
            while True:
                yield BytesValue(value=head(size=0))
                await asyncio.sleep(0)

        replies = await line.call(echo)(requests())
        await settled(line)
        await replies.aclose()  # type: ignore[attr-defined]

    asyncio.run(scenario())


def test_a_caller_that_goes_ends_the_handler() -> None:
    """When a caller gives up, its handler is cancelled in the middle of its work and nothing is left."""

    async def scenario() -> None:
        line, begun, ended = Line(), asyncio.Event(), asyncio.Event()

        def handler(requests: Messages) -> Messages:
            async def handle() -> tuple[dict[str, Any], bytes]:
                for _ in range(20):  # let the caller get to where it waits for the reply
                    await asyncio.sleep(0)
                begun.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()
                raise AssertionError

            return answer(requests, handle)

        asking = asyncio.create_task(ask(line.call(handler), {}, max_bytes=1, timeout_s=PATIENCE_S))
        await begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(ended.wait(), PATIENCE_S)
        await settled(line)

    asyncio.run(scenario())


def test_only_the_first_word_may_take_long() -> None:
    """reply_timeout_s is for the reply's beginning; pieces that stall after it fail within timeout_s."""

    async def late(requests: Messages) -> Messages:
        await asyncio.sleep(0.3)
        yield BytesValue(value=head(size=2))
        yield BytesValue(value=b"a")
        await asyncio.Event().wait()

    began = time.monotonic()
    outcome, _ = on_a_line(late, timeout_s=0.1, reply_timeout_s=PATIENCE_S)
    assert isinstance(outcome, asyncio.TimeoutError)
    assert time.monotonic() - began < PATIENCE_S / 2
    assert isinstance(on_a_line(late, timeout_s=0.1)[0], asyncio.TimeoutError)


def test_a_call_that_does_not_connect_fails() -> None:
    """A peer that takes no call costs timeout_s; one that is gone raises what hivemind raises."""

    async def never(_: Messages) -> Messages:
        await asyncio.Event().wait()
        raise AssertionError

    async def gone(_: Messages) -> Messages:
        raise ConnectionRefusedError

    for call, error in ((never, asyncio.TimeoutError), (gone, ConnectionRefusedError)):
        with pytest.raises(error):
            asyncio.run(ask(call, {}, max_bytes=1, timeout_s=0.05))


def test_more_than_the_limit_is_not_taken_in() -> None:
    """A reply that announces more than max_bytes is refused at its header."""
    outcome, line = on_a_line(echo, bytes(101), max_bytes=100)
    assert isinstance(outcome, StreamError) and "at most 100" in str(outcome)
    assert line.open == 0
