"""Laws of the frames between a worker and its network process: messages come out as they went in, or not at all."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.dht import ipc

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.lists(st.dictionaries(st.text(), VALUES, max_size=5), min_size=1, max_size=5)


def read_all(connection: socket.socket) -> list[ipc.Message]:
    """Every message up to the end of the connection, with the blocking reader."""
    found = []
    while True:
        try:
            found.append(ipc.receive(connection))
        except EOFError:
            return found


async def read_all_async(connection: socket.socket) -> list[ipc.Message]:
    """The same with the reader for event loops."""
    reader, writer = await asyncio.open_connection(sock=connection)
    found = []
    try:
        while True:
            found.append(await ipc.receive_async(reader))
    except EOFError:
        return found
    finally:
        writer.close()
        await writer.wait_closed()


def deliver(data: bytes, piece_bytes: int, *, asynchronous: bool) -> list[ipc.Message]:
    """What the other end reads when `data` arrives in pieces and the connection then ends."""
    ours, theirs = socket.socketpair()

    def write() -> None:
        with ours:
            for offset in range(0, len(data), piece_bytes):
                ours.sendall(data[offset : offset + piece_bytes])

    writer = threading.Thread(target=write)
    writer.start()
    with theirs:
        found = asyncio.run(read_all_async(theirs)) if asynchronous else read_all(theirs)
    writer.join()
    return found


@pytest.mark.parametrize("asynchronous", [False, True])
@given(messages=MESSAGES, piece_bytes=st.integers(1, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_messages_come_out_as_they_went_in(
    asynchronous: bool, messages: list[dict[str, Any]], piece_bytes: int
) -> None:
    """Any messages, cut into any pieces on the way, arrive equal and in order at both kinds of reader."""
    data = b"".join(ipc.encode(message) for message in messages)
    assert deliver(data, piece_bytes, asynchronous=asynchronous) == messages


@pytest.mark.parametrize("asynchronous", [False, True])
@given(cut=st.integers(0, 200))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_half_a_message_is_none(asynchronous: bool, cut: int) -> None:
    """When the other end dies in the middle of a message, that one is not delivered and EOFError says so."""
    first, second = ipc.encode({"n": 1}), ipc.encode({"n": 2, "blob": bytes(100)})
    found = deliver((first + second)[: -1 - cut % len(second)], 1000, asynchronous=asynchronous)
    assert found == [{"n": 1}]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_payload_of_many_megabytes_passes(asynchronous: bool) -> None:
    """A blob larger than every buffer on the way arrives whole."""
    blob = bytes(range(256)) * 4096 * 20
    assert deliver(ipc.encode({"blob": blob}), 2**20, asynchronous=asynchronous) == [{"blob": blob}]


def test_a_closed_connection_is_an_end() -> None:
    """Reading from a socket that was closed here is the end of the stream as well, not another error."""
    ours, theirs = socket.socketpair()
    ours.close()
    theirs.close()
    with pytest.raises(EOFError):
        ipc.receive(theirs)
