"""The libp2p daemon under hivemind: how it is started, what it may receive, and what it has carried.

The patches act on hivemind's classes, in the network process only: it hard-codes its socket folder, puts no limit on a
streamed message's length, counts no bytes, and does not notice the end of some connections.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from hivemind.p2p import P2P, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.control import ControlClient

from dtrain.dht.identity import Identity
from dtrain.dht.throttle import Throttle

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
BYTES_PER_MEGABIT = 125_000.0
MESSAGE_OVERHEAD_BYTES = 128  # of TLS, multiplexing, TCP and IP, roughly; it counts against the user's limits
WIRE_SHARE = (
    0.87  # of the bytes on the wire; the rest are headers in between and what confirms the other direction
)
COUNTED_SHARE = (
    0.97  # the same for what is counted: on the whole, without the room that a rate needs for its bursts
)
RELAY_FLAGS = {
    "relayDiscovery": False,  # with it, a relayed address takes three minutes
    "relayDataLimit": 2**50,  # bytes per relayed connection and direction
    "relayTimeLimit": "8760h",
    "relayBufferSize": 2**18,  # bytes per relayed connection and direction
}
MAX_TOLD = 4  # addresses in a line for the user
DAEMON_IDLE_S = 5  # the daemon ends by itself when nobody has been connected to it for this long


class TransportError(Exception):
    """The daemon cannot listen or reach anybody; the message says what to do."""


class Traffic:
    """Bytes of all messages handed to and received from the daemon (below that: TLS, multiplexing and TCP), which
    pass no faster than the user allows."""

    def __init__(self) -> None:
        self.up = self.down = 0
        self._wire_bytes = 0.0
        self._up_limit, self._down_limit = Throttle(), Throttle()

    def limit(self, *, up_mbps: float, down_mbps: float) -> None:
        """Keep to these rates from now on; 0 = no limit."""
        self._up_limit.bytes_per_s = up_mbps * BYTES_PER_MEGABIT * WIRE_SHARE
        self._down_limit.bytes_per_s = down_mbps * BYTES_PER_MEGABIT * WIRE_SHARE

    @property
    def wire_bytes(self) -> int:
        """What all messages so far have taken on the wire, both ways together, within a few percent."""
        return round(self._wire_bytes)

    async def sending(self, num_bytes: int) -> None:
        """Before so many bytes are sent."""
        await self._up_limit.take(num_bytes + MESSAGE_OVERHEAD_BYTES)
        self.up += num_bytes
        self._count_wire(num_bytes)

    async def receiving(self, num_bytes: int) -> None:
        """Before so many bytes are read, or after, where they come unasked."""
        self.down += num_bytes
        self._count_wire(num_bytes)
        await self._down_limit.take(num_bytes + MESSAGE_OVERHEAD_BYTES)

    def _count_wire(self, num_bytes: int) -> None:
        self._wire_bytes += (num_bytes + MESSAGE_OVERHEAD_BYTES) / COUNTED_SHARE


def patch_hivemind(private_folder: Path, traffic: Traffic) -> None:
    """Move the daemon's sockets to `private_folder`, cap messages, count bytes, notice broken streams."""
    # By default libp2p dials from the port that it listens on. A router that still remembers a connection between the
    # same two ports, made from the other side or before a restart, then lets no new one through.
    os.environ["LIBP2P_TCP_REUSEPORT"] = "false"
    P2P._UNIX_SOCKET_PREFIX = f"/unix{private_folder}/"
    send = P2P.send_raw_data

    async def counted_send(data: bytes, writer: asyncio.StreamWriter, **kwargs: Any) -> None:
        await traffic.sending(len(data))
        await send(data, writer, **kwargs)

    async def capped_receive(reader: asyncio.StreamReader) -> bytes:
        length = int.from_bytes(await reader.readexactly(P2P.HEADER_LEN), P2P.BYTEORDER)
        if length > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {length} bytes; {MAX_MESSAGE_BYTES} is the most")
        await traffic.receiving(length)
        return await reader.readexactly(length)

    P2P.send_raw_data = staticmethod(counted_send)
    P2P.receive_raw_data = staticmethod(capped_receive)
    P2P._iterate_protobuf_stream_handler = _call_stream
    _count_unary(traffic)


async def _call_stream(
    self: Any, peer_id: Any, name: str, requests: AsyncIterator[Message], reply_type: type[Message]
) -> AsyncIterator[Message]:
    """Call a streaming RPC. The replies end when the connection does.

    hivemind's own waits then for the caller's requests to end, and so forever for those that end with the replies.
    """
    _, reader, writer = await self.call_binary_stream_handler(peer_id, name)

    async def send() -> None:
        async for request in requests:
            await P2P.send_protobuf(request, writer)
        await P2P.send_protobuf(P2P.END_OF_STREAM, writer)

    async def replies() -> AsyncIterator[Message]:
        with closing(writer):
            try:
                while True:
                    try:
                        reply, error = await P2P.receive_protobuf(reply_type, reader)
                    except (asyncio.IncompleteReadError, ConnectionResetError):
                        return
                    if error is not None:
                        raise P2PHandlerError(f"{name} at {peer_id} failed: {error.message}")
                    yield reply
            finally:
                sending.cancel()

    sending = asyncio.create_task(send())
    return replies()


def _count_unary(traffic: Traffic) -> None:
    call, add = ControlClient.call_unary_handler, ControlClient.add_unary_handler

    async def counted_call(self: Any, peer_id: Any, proto: str, data: bytes) -> bytes:
        await traffic.sending(len(data))
        reply: bytes = await call(self, peer_id, proto, data)
        await traffic.receiving(len(reply))
        return reply

    async def counted_add(
        self: Any, proto: str, handler: Callable[[bytes, Any], Awaitable[bytes]], balanced: bool = False
    ) -> None:
        async def counted(data: bytes, remote: Any) -> bytes:
            await traffic.receiving(len(data))
            reply = await handler(data, remote)
            await traffic.sending(len(reply))
            return reply

        await add(self, proto, counted, balanced)

    ControlClient.call_unary_handler = counted_call
    ControlClient.add_unary_handler = counted_add


class _Daemon(P2P):  # type: ignore[misc]  # hivemind ships no types
    """hivemind's, with the daemon's flags that it does not expose."""

    @staticmethod
    def _make_process_args(*args: Any, **flags: Any) -> list[str]:
        made: list[str] = P2P._make_process_args(*args, **{**flags, **RELAY_FLAGS})
        return made


async def start_daemon(
    identity: Identity,
    *,
    host: str,
    port: int,
    initial_peers: Sequence[str] = (),
    dialable: bool = True,
    passes_on: bool = False,
    relays: Sequence[str] = (),
    announce: str = "",
) -> P2P:
    """Start the libp2p daemon on TCP `host`:`port` (0 = any free port). Raises TransportError.

    It connects with `initial_peers` at once; one that is not `dialable` listens nowhere, one that `passes_on` serves as
    a relay (`dht/relay.py`), one with `relays` can be reached through these. Others dial it at `announce` (HOST:PORT),
    if that is given. TCP only: over QUIC most streamed replies were lost to the hang-up race.
    """
    where: dict[str, Any] = {"no_listen": True, "host_maddrs": None, "dht_mode": "client"}
    if dialable:
        check_port(host, port)
        where = {"host_maddrs": [f"/ip4/{host}/tcp/{port}"]}
    if announce:
        where["announce_maddrs"] = ["/ip4/{}/tcp/{}".format(*announce.split(":"))]
    if passes_on:
        where["force_reachability"] = "public"
    if relays:
        where.update(trusted_relays=list(relays), use_auto_relay=True, force_reachability="private")
    try:
        return await _Daemon.create(
            identity_path=str(identity.path),
            initial_peers=list(initial_peers) or None,
            check_if_identity_free=False,
            use_relay=True,  # else others cannot be called through relays
            auto_nat=False,
            nat_port_map=False,
            idle_timeout=DAEMON_IDLE_S,
            **where,
        )
    except Exception as error:  # hivemind raises several types, most with the daemon's last line
        if initial_peers:
            raise TransportError(nobody_answers(initial_peers)) from None
        raise TransportError(f"the network daemon did not start: {str(error)[:300]}") from None


def nobody_answers(peers: Sequence[str]) -> str:
    """A line for the user who gave these addresses."""
    return (
        f"none of the given peers can be reached ({', '.join(peers[:MAX_TOLD])}): "
        "is that worker still running, and is its address right?"
    )


def check_port(host: str, port: int) -> None:
    """Fail with a clear word if the port is taken: the daemon itself reports it as something else."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TransportError(
                f"cannot listen on {host}:{port} ({error.strerror}); pass another --port, or --port 0 for any free one"
            ) from None
