"""Nobody who answers hangs up first: not between real daemons, and not as a matchmaking leader."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.p2p import P2P
from hivemind.proto import averaging_pb2

from dtrain.dht import matchmaking, streams
from dtrain.dht.identity import load_or_create
from dtrain.dht.matchmaking import RoundMatchmaking
from dtrain.dht.streams import Refused, StreamError, answer, ask, read
from dtrain.dht.transport import start_daemon

PATIENCE_S = 30.0  # a timeout that must not run out
NUM_CALLS = 2500
CONCURRENCY = 32


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For keys and sockets; short, because the path of a socket must be."""
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setattr(P2P, "_UNIX_SOCKET_PREFIX", f"/unix{path}/")
        yield Path(path)


def test_no_reply_is_lost_between_real_daemons(folder: Path) -> None:
    """Thousands of calls at once over two libp2p daemons: every reply and every refusal arrives, and no fd is left."""

    async def serve(requests: AsyncIterator[BytesValue], _: object) -> AsyncIterator[BytesValue]:
        async def handle() -> tuple[dict[str, Any], bytes]:
            header, blob = await read(requests, max_bytes=100, timeout_s=PATIENCE_S)
            if header["refuse"]:
                raise StreamError("as you wish")
            return {"n": header["n"]}, blob * header["times"]

        async for message in answer(requests, handle):
            yield message

    async def scenario() -> None:
        daemons: list[P2P] = []
        try:
            for name in ("a", "b"):
                identity = load_or_create(folder / f"{name}.key")
                peers = [str(address) for address in await daemons[0].get_visible_maddrs()] if daemons else []
                daemons.append(await start_daemon(identity, host="127.0.0.1", port=0, initial_peers=peers))
            server, client = daemons
            await server.add_protobuf_handler(
                "serve", serve, BytesValue, stream_input=True, stream_output=True
            )

            async def call(requests: AsyncIterator[BytesValue]) -> AsyncIterator[BytesValue]:
                replies: AsyncIterator[BytesValue] = await client.iterate_protobuf_handler(
                    server.peer_id, "serve", requests, BytesValue
                )
                return replies

            async def one(number: int, rng: random.Random) -> None:
                blob, times, refuse = rng.randbytes(100), rng.randrange(10, 200), number % 10 == 0
                header = {"n": number, "times": times, "refuse": refuse}
                try:
                    reply = await ask(call, header, blob, max_bytes=20000, timeout_s=PATIENCE_S)
                except Refused as refusal:
                    assert refuse and refusal.reason == "as you wish"
                else:
                    assert not refuse and reply == ({"n": number, "size": 100 * times}, blob * times)

            async def some(first: int) -> None:
                for number in range(first, NUM_CALLS, CONCURRENCY):
                    await one(number, random.Random(number))

            await one(1, random.Random(1))
            num_fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
            await asyncio.gather(*(some(first) for first in range(CONCURRENCY)))
            while streams._background:
                await asyncio.wait(streams._background)
            until = time.monotonic() + 10
            while num_fds and len(os.listdir("/proc/self/fd")) > num_fds + 4:
                assert time.monotonic() < until, "file descriptors are left"
                await asyncio.sleep(0.05)
        finally:
            for daemon in daemons:
                await daemon.shutdown()

    asyncio.run(scenario())


# ---------------------------------------------------------------------- the matchmaking leader


class Leader(RoundMatchmaking):
    """A leader whose hivemind half says what the test wants."""

    def __init__(self) -> None:
        pass


def lead(monkeypatch: pytest.MonkeyPatch, says: Callable[[], AsyncIterator[Any]]) -> AsyncIterator[Any]:
    monkeypatch.setattr(Matchmaking, "rpc_join_group", lambda self, request, context: says())
    return Leader().rpc_join_group(averaging_pb2.JoinRequest(), None)


def word(code: str) -> averaging_pb2.MessageFromLeader:
    return averaging_pb2.MessageFromLeader(code=averaging_pb2.MessageCode.Value(code))


@pytest.mark.parametrize("last", ["BEGIN_ALLREDUCE", "GROUP_DISBANDED", "NOT_LOOKING_FOR_GROUP"])
def test_a_leader_lingers_after_its_last_word(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream stays open until the follower hangs up, ACKNOWLEDGE_S at most, whatever the last word was."""
    monkeypatch.setattr(matchmaking, "ACKNOWLEDGE_S", 0.2)

    async def says() -> AsyncIterator[Any]:
        yield word("ACCEPTED")
        yield word(last)

    async def scenario() -> None:
        replies = lead(monkeypatch, says)
        assert [(await replies.__anext__()).code for _ in range(2)] == [
            word("ACCEPTED").code,
            word(last).code,
        ]
        said_at = time.monotonic()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(replies.__anext__(), PATIENCE_S)
        assert time.monotonic() - said_at > 0.1

    asyncio.run(scenario())


def test_a_leader_whose_follower_has_gone_does_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """hivemind swallows the cancellation that a follower's hang-up brings; the handler ends at once all the same."""
    monkeypatch.setattr(matchmaking, "ACKNOWLEDGE_S", PATIENCE_S)

    async def says() -> AsyncIterator[Any]:
        yield word("ACCEPTED")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async def scenario() -> None:
        async def handle() -> None:
            async for _ in lead(monkeypatch, says):
                accepted.set()

        accepted = asyncio.Event()
        handler = asyncio.create_task(handle())
        await accepted.wait()
        handler.cancel()
        done, _ = await asyncio.wait({handler}, timeout=PATIENCE_S / 2)
        assert done

    asyncio.run(scenario())
