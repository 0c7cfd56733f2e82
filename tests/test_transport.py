"""What hivemind's transport does for us once it is patched."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P

from dtrain.dht import transport
from dtrain.dht.identity import load_or_create
from dtrain.dht.streams import StreamError, answer, ask, read
from dtrain.dht.transport import start_daemon

PATIENCE_S = 60.0  # a timeout that must not run out


def test_a_broken_connection_ends_the_wait_for_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller learns at once that the connection of its call is gone, and need not wait for the reply's timeout."""
    monkeypatch.setattr(P2P, "_iterate_protobuf_stream_handler", transport._call_stream)
    asked = asyncio.Event()

    async def serve(requests: AsyncIterator[BytesValue], _: object) -> AsyncIterator[BytesValue]:
        async def handle() -> tuple[dict[str, Any], bytes]:
            await read(requests, max_bytes=100, timeout_s=PATIENCE_S)
            asked.set()
            await asyncio.sleep(PATIENCE_S)  # until the connection breaks
            return {}, b""

        async for message in answer(requests, handle):
            yield message

    async def scenario(folder: Path) -> None:
        daemons: list[P2P] = []
        try:
            for name in ("server", "client"):
                peers = [str(address) for p2p in daemons for address in await p2p.get_visible_maddrs()]
                identity = load_or_create(folder / f"{name}.key")
                daemons.append(await start_daemon(identity, host="127.0.0.1", port=0, initial_peers=peers))
            server, client = daemons
            await server.add_protobuf_handler(
                "wait", serve, BytesValue, stream_input=True, stream_output=True
            )

            async def call(requests: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
                replies: AsyncIterator[BytesValue] = await client.iterate_protobuf_handler(
                    server.peer_id, "wait", requests, BytesValue
                )
                return replies

            asking = asyncio.create_task(ask(call, {}, b"a section", max_bytes=100, timeout_s=PATIENCE_S))
            await asyncio.wait_for(asked.wait(), PATIENCE_S)
            await client._client.disconnect(server.peer_id)
            done, _ = await asyncio.wait({asking}, timeout=PATIENCE_S / 2)
            assert done, "the caller still waits"
            with pytest.raises(StreamError, match="ended early"):
                await asking
        finally:
            for daemon in daemons:
                await daemon.shutdown()

    with tempfile.TemporaryDirectory() as path:  # short, because the path of a socket must be
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{path}/")
        asyncio.run(scenario(Path(path)))
