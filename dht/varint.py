"""The few pieces of protobuf's encoding in which libp2p's relays are spoken with: varints and delimited fields."""

from __future__ import annotations

import asyncio

MAX_MESSAGE_BYTES = 2**16


def pack_bytes(number: int, value: bytes) -> bytes:
    """A field of bytes, for a field number below 16 and up to 127 bytes."""
    assert number < 16 and len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def field(message: bytes, wanted: int) -> int | bytes | None:
    """A message's field, or None. Raises ValueError on what is no message of numbers and bytes."""
    found, position = None, 0
    while position < len(message):
        key, position = _varint(message, position)
        value: int | bytes
        if key & 7 == 0:
            value, position = _varint(message, position)
        elif key & 7 == 2:
            size, position = _varint(message, position)
            value, position = message[position : position + size], position + size
        else:
            raise ValueError(f"wire type {key & 7}")
        if key >> 3 == wanted:
            found = value
    if position > len(message):
        raise ValueError("cut off")
    return found


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    number = shift = 0
    while position < len(message) and shift < 64:
        byte = message[position]
        number |= (byte & 127) << shift
        shift, position = shift + 7, position + 1
        if byte < 128:
            return number, position
    raise ValueError("no varint")


async def read_delimited(reader: asyncio.StreamReader) -> bytes:
    """A message with its length before it. Raises ValueError when it is too long."""
    size = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        size |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 21:
            break
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes; {MAX_MESSAGE_BYTES} is the most")
    return await reader.readexactly(size)
