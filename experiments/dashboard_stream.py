"""The live stream: one snapshot for everybody, and no client can make the server wait or hoard.

A client that is slow gets the newest snapshot when it is ready for one, never a queue of old ones. One whose socket
takes nothing for STALLED_S is cut off.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CLIENTS = 4000
KEEP_ALIVE_S = 10.0
STALLED_S = 10.0
SOCKET_BUFFER_BYTES = 16 * 1024  # per client, in the kernel and in this process: a stalled one shows soon
MIN_PERIOD_S = 0.5


class Hub:
    """Hands the newest snapshot to all clients. `publish` may be called from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._frame = b""
        self.latest: dict[str, Any] | None = None
        self.clients = 0
        self.is_closed = False

    def publish(self, snapshot: dict[str, Any]) -> None:
        """Make this the newest snapshot."""
        self.latest = snapshot
        frame = frame_of("snapshot", snapshot)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, frame)
        else:
            self._frame = frame

    def close(self) -> None:
        """End all streams."""
        self.is_closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, self._frame)

    def _put(self, frame: bytes) -> None:
        self._frame = frame
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[bytes]:
        """Frames of one client, from now on."""
        self._loop = asyncio.get_running_loop()
        self.clients += 1
        try:
            yield b"retry: 1000\n\n"
            sent = b""
            while not self.is_closed:
                changed = self._changed
                if self._frame is not sent:
                    sent = self._frame
                    yield sent
                    await asyncio.sleep(MIN_PERIOD_S)
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
                except asyncio.TimeoutError:
                    yield frame_of("alive", {"at": time.time()})
        finally:
            self.clients -= 1


def frame_of(event: str, data: Any) -> bytes:
    """One event of the stream."""
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n".encode()


class PatientProtocol(H11Protocol):
    """Cuts a connection whose other end takes nothing for STALLED_S."""

    _cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=SOCKET_BUFFER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut = self.loop.call_later(STALLED_S, self._reset)

    def resume_writing(self) -> None:
        self._keep()
        super().resume_writing()

    def _reset(self) -> None:
        """End the connection with a reset: a mere close would leave the kernel waiting to deliver what is unsent."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _keep(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None


class StreamServer(uvicorn.Server):
    """Ends the streams before it waits for their connections, and is ended by Ctrl-C or SIGTERM without a word."""

    def __init__(self, config: uvicorn.Config, hub: Hub):
        super().__init__(config)
        self._hub = hub

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._hub.close()
        self.should_exit = True


def make_server(app: FastAPI, hub: Hub) -> StreamServer:
    """A server for `app`; `run(sockets=[...])` serves until a signal comes or `should_exit` is set."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        lifespan="off",
        log_level="critical",
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    return StreamServer(config, hub)
