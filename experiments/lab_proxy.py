"""Home connections on loopback, for machines without namespaces: every connection between two workers passes through a
proxy that delays its bytes and holds them to both ends' rates.

Each worker has a port of the proxy's, which it announces; who dials that is known by the process that holds the other
end. What TCP hides is not modelled: lost packets, queues that overflow; nor are routers with NAT, and moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from dtrain.experiments.lab_config import Place

PIECE_BYTES = 16_384
LAG_S = 2.0
"""How far ahead of a line's rate a sender's bytes are taken in; then TCP holds it back."""
NOT_MODELLED = "on loopback: lost packets, NAT, moves and full queues are not modelled"


@dataclass
class _Host:
    place: Place
    listens: int  # where the worker itself is
    announced: int  # where others dial it
    is_cut: bool = False
    side: int = 0
    up_free: float = 0.0  # when the uplink has sent all that it was given, by the loop's clock
    down_free: float = 0.0
    connections: set[asyncio.Task[None]] = field(default_factory=set)


class ProxyPlaces:
    """See `lab_places.Places`."""

    not_modelled = NOT_MODELLED
    cannot: tuple[str, ...] = ("move", "fill")

    def __init__(self, places: Mapping[str, Place]):
        self._hosts = {name: _Host(place, _free_port(), 0) for name, place in places.items()}
        self._counts = {name: {"up_bytes": 0, "down_bytes": 0} for name in places}
        self._pids: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lab-proxy", daemon=True)
        self._thread.start()
        self._ready.wait()

    def started(self, name: str, pid: int) -> None:
        """See Places."""
        self._pids[name] = pid

    def command(self, name: str) -> list[str]:
        """See Places."""
        return []

    def flags(self, name: str) -> list[str]:
        """See Places."""
        host = self._hosts[name]
        return [
            "--host",
            "127.0.0.1",
            "--port",
            str(host.listens),
            "--announce",
            f"127.0.0.1:{host.announced}",
        ]

    def cut(self, name: str, is_cut: bool) -> None:
        """See Places."""
        self._hosts[name].is_cut = is_cut

    def partition(self, sides: Sequence[Sequence[str]]) -> None:
        """See Places."""
        for host in self._hosts.values():
            host.side = 0
        for number, side in enumerate(sides):
            for name in side:
                self._hosts[name].side = number

    def move(self, name: str) -> None:
        """See Places: addresses stay as they are here."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Bytes by host."""
        return {name: dict(count) for name, count in self._counts.items()}

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # ------------------------------------------------------------------ the proxy's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        servers = [self._loop.run_until_complete(self._serve(name)) for name in self._hosts]
        self._ready.set()
        self._loop.run_forever()
        for server in servers:
            server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _serve(self, name: str) -> asyncio.Server:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._pass_through(name, reader, writer)
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._hosts[name].announced = server.sockets[0].getsockname()[1]
        return server

    async def _pass_through(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        port = writer.get_extra_info("peername")[1]
        dialer = await self._loop.run_in_executor(None, self._who_dials, port)
        if not self._reaches(dialer, target):
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._hosts[target].listens)
        both = [
            asyncio.create_task(self._carry(reader, back, dialer, target)),
            asyncio.create_task(self._carry(there, writer, target, dialer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            back.close()

    def _who_dials(self, port: int) -> str:
        """The worker whose process holds the other end of a connection; "" if none of them does."""
        for name, pid in list(self._pids.items()):
            with contextlib.suppress(psutil.Error):
                own = psutil.Process(pid)
                for process in [own, *own.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        if any(c.laddr and c.laddr.port == port for c in process.net_connections("tcp4")):
                            return name
        return ""

    def _reaches(self, one: str, other: str) -> bool:
        if not one:
            return True
        a, b = self._hosts[one], self._hosts[other]
        return not (a.is_cut or b.is_cut or a.side != b.side)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str, target: str
    ) -> None:
        """Bytes of one direction: each piece leaves when both lines have had the time for it, and its way is done."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(self._deliver(queue, writer, source, target))
        try:
            while piece := await reader.read(PIECE_BYTES):
                at = self._due(source, target, len(piece))
                queue.put_nowait((at, piece))
                await asyncio.sleep(max(0.0, at - self._loop.time() - LAG_S))
            queue.put_nowait((self._loop.time(), b""))
            await delivering
        finally:
            delivering.cancel()

    async def _deliver(
        self,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        source: str,
        target: str,
    ) -> None:
        while True:
            at, piece = await queue.get()
            if not piece:
                return
            await asyncio.sleep(max(0.0, at - self._loop.time()))
            while not self._reaches(source, target):  # TCP would send it again and again
                await asyncio.sleep(0.1)
            writer.write(piece)
            await writer.drain()
            for name, way in ((source, "up_bytes"), (target, "down_bytes")):
                if name:
                    self._counts[name][way] += len(piece)

    def _due(self, source: str, target: str, size: int) -> float:
        """When a piece that is sent now is there."""
        at = self._loop.time()
        way_s = 0.0
        if source:
            host = self._hosts[source]
            at = host.up_free = max(at, host.up_free) + _seconds(size, host.place.link.up_mbps)
            way_s += host.place.link.rtt_ms / 4e3
        if target:
            host = self._hosts[target]
            at = host.down_free = max(at, host.down_free) + _seconds(size, host.place.link.down_mbps)
            way_s += host.place.link.rtt_ms / 4e3
        return at + way_s


def _seconds(size: int, mbps: float) -> float:
    return size * 8 / (mbps * 1e6) if mbps else 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
