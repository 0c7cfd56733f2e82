"""Streaming RPCs that lose no reply.

On a hivemind stream, when the side that answers hangs up first, its p2p daemon may reset the stream and discard reply
bytes that the caller's daemon has not read yet. So here the caller always hangs up first: its end-of-stream is the
acknowledgement, and the answering side waits for it after its last message, on error paths too. Success means "all
announced bytes arrived", never "the stream ended cleanly".

A message sequence is one msgpack header, then a blob in pieces: `{"size": bytes of the blob, ...}`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue

PIECE_BYTES = 256 * 1024  # small enough for relays, large enough that framing is noise
MAX_HEADER_BYTES = 64 * 1024
MAX_REASON = 200  # characters of a refusal
ACKNOWLEDGE_S = 5.0  # longest wait for a caller's end-of-stream
HANG_UP_S = 2.0

Header = dict[str, Any]
OnSent = Callable[[int, int], None]
Call = Callable[[AsyncIterator[BytesValue]], Awaitable[AsyncIterator[BytesValue]]]

_background: set[asyncio.Task[None]] = set()


class StreamError(Exception):
    """The other side broke the format, refused, or went away; the text is the reason."""


class Refused(StreamError):
    """The other side answered, with a refusal. `reason` is its word, shortened."""

    def __init__(self, reason: str):
        super().__init__(f"refused: {reason}")
        self.reason = reason


def messages(header: Mapping[str, Any], blob: bytes | memoryview = b"") -> Iterator[BytesValue]:
    """The message sequence for a header and its blob."""
    yield BytesValue(value=msgpack.packb({**header, "size": len(blob)}))
    view = memoryview(blob)
    for offset in range(0, len(view), PIECE_BYTES):
        yield BytesValue(value=bytes(view[offset : offset + PIECE_BYTES]))


def parse_header(raw: bytes, max_bytes: int) -> Header:
    """Decode and check a header. Raises StreamError on anything but a map with a plausible size."""
    if len(raw) > MAX_HEADER_BYTES:
        raise StreamError(f"a header of {len(raw)} bytes; {MAX_HEADER_BYTES} is the most")
    try:
        header = msgpack.unpackb(raw)
    except Exception:  # msgpack raises half a dozen types on hostile bytes
        raise StreamError("the header is not msgpack") from None
    if not isinstance(header, dict):
        raise StreamError("the header is not a map")
    if "refused" in header:
        raise Refused(str(header["refused"])[:MAX_REASON])
    size = header.get("size")
    if not isinstance(size, int) or not 0 <= size <= max_bytes:
        raise StreamError(f"announces {size!r:.40} bytes where at most {max_bytes} fit")
    return header


async def read(
    stream: AsyncIterator[BytesValue],
    *,
    max_bytes: int,
    timeout_s: float,
    header_timeout_s: float | None = None,
    on_bytes: Callable[[Header, bytes], None] | None = None,
) -> tuple[Header, bytes]:
    """Read one header and its blob; `timeout_s` bounds the wait for each message, `header_timeout_s` for the first.

    With `on_bytes(header, piece)` the pieces go there instead and the returned blob is empty.
    Raises StreamError, or asyncio.TimeoutError when the other side stalls.
    """
    wait_s = timeout_s if header_timeout_s is None else header_timeout_s
    header = parse_header((await next_message(stream, wait_s)).value, max_bytes)
    return header, await read_blob(
        stream, header, max_bytes=max_bytes, timeout_s=timeout_s, on_bytes=on_bytes
    )


async def read_blob(
    stream: AsyncIterator[BytesValue],
    header: Header,
    *,
    max_bytes: int,
    timeout_s: float,
    on_bytes: Callable[[Header, bytes], None] | None = None,
) -> bytes:
    """Read the blob that `header` announces; see `read`."""
    blob, left = bytearray(), header["size"]
    if left > max_bytes:
        raise StreamError(f"announces {left} bytes where at most {max_bytes} fit")
    while left:
        piece = (await next_message(stream, timeout_s)).value
        if not piece or len(piece) > left:
            raise StreamError(f"sent {len(piece)} bytes where {left} were left")
        left -= len(piece)
        if on_bytes is None:
            blob += piece
        else:
            on_bytes(header, piece)
    return bytes(blob)


async def first_header(
    stream: AsyncIterator[BytesValue], refusal: Callable[[], str], timeout_s: float, max_bytes: int = 0
) -> Header:
    """The header of a request, for its answering side. Raises StreamError, also with `refusal()` where that gives a
    reason not to let the caller in."""
    first = await next_message(stream, timeout_s)
    if reason := refusal():
        raise StreamError(reason)
    return parse_header(first.value, max_bytes)


async def next_message(stream: AsyncIterator[BytesValue], timeout_s: float) -> BytesValue:
    """The next message. Raises StreamError at the stream's end, asyncio.TimeoutError when nothing comes."""
    try:
        return await asyncio.wait_for(stream.__anext__(), timeout_s)
    except StopAsyncIteration:
        raise StreamError("the stream ended early") from None


async def ask(
    call: Call,
    header: Mapping[str, Any],
    blob: bytes | memoryview = b"",
    *,
    max_bytes: int,
    timeout_s: float,
    reply_timeout_s: float | None = None,
    on_bytes: Callable[[Header, bytes], None] | None = None,
    on_sent: OnSent | None = None,
) -> tuple[Header, bytes]:
    """Send a header and blob, return the reply's header and blob, then hang up (which acknowledges).

    `reply_timeout_s` bounds the wait for the first reply message where it may take longer than `timeout_s`.
    Raises StreamError, asyncio.TimeoutError, or hivemind's own errors when the peer cannot be reached.
    """
    acknowledged = asyncio.Event()

    async def requests() -> AsyncIterator[BytesValue]:
        async for message in _watched(header, blob, on_sent):
            yield message
        await acknowledged.wait()

    stream = await asyncio.wait_for(call(requests()), timeout_s)
    try:
        return await read(
            stream,
            max_bytes=max_bytes,
            timeout_s=timeout_s,
            header_timeout_s=reply_timeout_s,
            on_bytes=on_bytes,
        )
    finally:
        acknowledged.set()
        in_background(_hang_up(stream))


async def answer(
    requests: AsyncIterator[BytesValue],
    handle: Callable[[], Awaitable[tuple[Mapping[str, Any], bytes | memoryview]]],
    on_sent: OnSent | None = None,
) -> AsyncIterator[BytesValue]:
    """The answering side: run `handle`, send its header and blob (or why not), wait for the acknowledgement.

    `handle` reads what it needs from `requests` and raises StreamError to refuse.
    """
    stalled = False
    try:
        header, blob = await handle()
    except asyncio.TimeoutError:
        header, blob, stalled = {"refused": "timed out"}, b"", True
    except StreamError as error:
        header, blob = {"refused": str(error)[:MAX_REASON]}, b""
    except Exception:  # a mistake of ours; hivemind would report it and hang up first
        logging.exception("a request of another peer failed")
        header, blob = {"refused": "internal error"}, b""
    async for message in _watched(header, blob, on_sent):
        yield message
    if stalled:
        # The read that was given up has closed `requests`: only a hang-up, which cancels us, is heard.
        await asyncio.sleep(ACKNOWLEDGE_S)
    else:
        await _until_acknowledged(requests)


async def _watched(
    header: Mapping[str, Any], blob: bytes | memoryview, on_sent: OnSent | None
) -> AsyncIterator[BytesValue]:
    """The messages; `on_sent(bytes of the blob handed over so far, bytes in all)` after each piece."""
    sent = -1
    for message in messages(header, blob):
        yield message
        sent = 0 if sent < 0 else sent + len(message.value)
        if on_sent is not None and sent > 0:
            on_sent(sent, len(blob))


async def _until_acknowledged(requests: AsyncIterator[Any]) -> None:
    """Swallow what is left of the caller's stream up to its end, for ACKNOWLEDGE_S at most."""

    async def drain() -> None:
        async for _ in requests:
            pass

    try:
        await asyncio.wait_for(drain(), ACKNOWLEDGE_S)
    except asyncio.TimeoutError:
        pass


async def _hang_up(stream: AsyncIterator[BytesValue]) -> None:
    """Let the acknowledgement out, give the answering side a moment to close first, then free the stream."""
    try:
        await asyncio.wait_for(stream.__anext__(), HANG_UP_S)
    except Exception:  # however it ends, it has ended
        pass
    try:
        await stream.aclose()  # type: ignore[attr-defined]  # hivemind's streams are async generators
    except Exception:
        pass


def in_background(work: Any) -> asyncio.Task[None]:
    """Run a coroutine to its end; asyncio itself keeps only weak references to tasks."""
    task: asyncio.Task[None] = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)
    return task
