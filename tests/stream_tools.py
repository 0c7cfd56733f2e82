"""Streams between two ends in one event loop, with the manners of hivemind's and the worst of its luck.

As in hivemind, the answering side hangs up when its handler ends, and a caller that hangs up cancels the handler. When
the answering side hangs up first, every message that the caller has not read yet is lost: on real streams that happens
now and then (`dtrain/dht/streams.py` tells why), here always, unless a test wants it otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from google.protobuf.wrappers_pb2 import BytesValue

Messages = AsyncIterator[BytesValue]
Handler = Callable[[Messages], Messages]
Call = Callable[[Messages], Awaitable[Messages]]
PREFETCH = 5  # messages that hivemind reads ahead of a handler


class Line:
    """A telephone line: `call(handler)` is what a hivemind stub's streaming method would be."""

    def __init__(self, *, loses: bool = True) -> None:
        self.loses = loses
        self.num_calls = 0
        self.num_acknowledged = 0
        """Calls that the caller ended with an end of stream."""
        self.num_hung_up_first = 0
        """Calls in which the answering side hung up before the caller's end of stream."""
        self.open = 0

    def call(self, handler: Handler) -> Call:
        async def connect(requests: Messages) -> Messages:
            self.num_calls += 1
            self.open += 1
            return _Connection(self, handler, requests).replies()

        return connect


class _Connection:
    def __init__(self, line: Line, handler: Handler, requests: Messages):
        self._line = line
        self._inbox: asyncio.Queue[BytesValue | None] = asyncio.Queue(PREFETCH)
        self._outbox: asyncio.Queue[BytesValue | None] = asyncio.Queue()
        self._caller_done = False
        self._writing = asyncio.create_task(self._write(requests))
        self._answering = asyncio.create_task(self._answer(handler))

    async def _write(self, requests: Messages) -> None:
        async for message in requests:
            await self._inbox.put(message)
        self._line.num_acknowledged += 1
        self._caller_done = True
        await self._inbox.put(None)

    async def _incoming(self) -> Messages:
        while (message := await self._inbox.get()) is not None:
            yield message

    async def _answer(self, handler: Handler) -> None:
        try:
            async for message in handler(self._incoming()):
                await self._outbox.put(message)
        except Exception:
            pass  # hivemind sends the error's text and hangs up
        finally:
            if not self._caller_done:
                self._line.num_hung_up_first += 1
                while self._line.loses and not self._outbox.empty():
                    self._outbox.get_nowait()
            self._outbox.put_nowait(None)
            self._line.open -= 1

    async def replies(self) -> Messages:
        try:
            while (message := await self._outbox.get()) is not None:
                yield message
        finally:  # the caller hangs up
            self._caller_done = True
            self._writing.cancel()
            self._answering.cancel()


async def settled(line: Line, deadline_s: float = 10.0) -> None:
    """Wait until every handler on the line has ended."""
    until = asyncio.get_running_loop().time() + deadline_s
    while line.open:
        assert asyncio.get_running_loop().time() < until, f"{line.open} handlers are left"
        await asyncio.sleep(0.005)
