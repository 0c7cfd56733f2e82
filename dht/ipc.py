"""Frames between a worker and its network process: 8 bytes of length, then msgpack. Both ends are ours and local."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgpack

_LENGTH = struct.Struct(">Q")
_MAX_BYTES = 2**40

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    body: bytes = msgpack.packb(message)
    return _LENGTH.pack(len(body)) + body


def _decode(body: bytes) -> Message:
    message: Message = msgpack.unpackb(body, max_bin_len=_MAX_BYTES, max_str_len=_MAX_BYTES)
    return message


def receive(connection: socket.socket) -> Message:
    """Block for the next message. Raises EOFError when the other end is gone."""
    (size,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return _decode(_receive_exactly(connection, size))


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        try:
            count = connection.recv_into(view[filled:])
        except OSError:
            count = 0
        if not count:
            raise EOFError
        filled += count
    return bytes(buffer)


async def receive_async(reader: asyncio.StreamReader) -> Message:
    """Await the next message. Raises EOFError when the other end is gone."""
    try:
        (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return _decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EOFError from None
