"""`dtrain bench dashboard`: many viewers, some that never read, a million points, and what all that costs the run.

The server runs in a process of its own, as `dtrain dashboard` would, on a made-up run of --workers workers that tells
something new every second. The viewers share the machine's other cores with it. The round times are those of real
workers; see `dashboard_cost`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from dtrain.experiments.dashboard_cost import round_cost
from dtrain.trainer.errors import UsageError

SETTLE_S = 3.0
DROP_S = 40.0  # how long the ones that never read are watched
BARS = {
    "lag_p95_s": 2.0,
    "rss_peak_mb": 500.0,
    "viewers_lost": 0.0,
    "silent_last_drop_s": 30.0,
    "first_paint_worst_ms": 300.0,
    "round_time_ratio": 1.05,
}
FIRST_PAINT = (
    "/api/info",
    "/api/run",
    *(f"/api/curves/{name}" for name in ("eval_loss", "train_loss", "tokens_per_s")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the bench's flags."""
    parser.add_argument("--viewers", type=int, default=1000, help="clients of the live stream (default 1000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they look (default 60)")
    parser.add_argument("--silent", type=int, default=100, help="clients that never read (default 100)")
    parser.add_argument("--points", type=int, default=1_000_000, help="stored points (default 1,000,000)")
    parser.add_argument("--workers", type=int, default=30, help="workers of the run (default 30)")
    parser.add_argument(
        "--cost-seconds",
        type=float,
        default=30.0,
        help="length of each stretch in which round times are measured (default 30; 0: not at all)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    """Run the bench; prints the figures. 0 if all bars are kept."""
    if min(args.viewers, args.silent, args.points, args.workers) < 1 or args.seconds <= 0:
        raise UsageError("--viewers, --silent, --points, --workers and --seconds must be above 0")
    needed = args.viewers + args.silent + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * needed) if hard > 0 else 2 * needed, hard))
    with tempfile.TemporaryDirectory(prefix="dtrain-load-") as folder, _server(Path(folder), args) as server:
        figures: dict[str, Any] = {
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}",
            "viewers": args.viewers,
            "workers": args.workers,
            "points": args.points,
            **_first_paint(server.port),
            **asyncio.run(_look(server, args.viewers, args.seconds)),
            **asyncio.run(_never_read(server.port, args.silent)),
        }
    if args.cost_seconds > 0:
        figures |= round_cost(args.viewers, args.cost_seconds)
    for name, value in figures.items():
        print(f"{name:<28} {value:,.3f}" if isinstance(value, float) else f"{name:<28} {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    missed = [
        f"{name} is {figures[name]:.3g}, at most {bar:g} is asked"
        for name, bar in BARS.items()
        if name in figures and not figures[name] <= bar
    ]
    if figures["silent_dropped"] < args.silent:
        missed.append(f"only {figures['silent_dropped']:.0f} of {args.silent} silent clients were dropped")
    for line in missed:
        print(f"Missed: {line}")
    return 1 if missed else 0


@dataclass
class _Server:
    port: int
    process: psutil.Process

    def rss_mb(self) -> float:
        return float(self.process.memory_info().rss) / 1e6

    def cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def _server(folder: Path, args: argparse.Namespace) -> Iterator[_Server]:
    """The server's process, with its points stored."""
    from dtrain.experiments.dashboard_load_server import serve  # needs the web server's libraries

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, folder, args.points, args.workers), daemon=True)
    process.start()
    try:
        port = _port(ours)
        yield _Server(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.join(10.0)


def _port(connection: Connection) -> int:
    if not connection.poll(600.0):
        raise UsageError("the server did not start; type a smaller --points")
    return int(connection.recv())


def _first_paint(port: int) -> dict[str, float]:
    """Server time of all that the page asks for before it can draw: the worst of five, and the median."""
    spent = []
    for _ in range(5):
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        began = time.perf_counter()
        for path in FIRST_PAINT:
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, path
        spent.append(1000 * (time.perf_counter() - began))
        connection.close()
    return {"first_paint_median_ms": statistics.median(spent), "first_paint_worst_ms": max(spent)}


@dataclass
class Looks:
    """What the viewers saw. A lag is the time from a snapshot's making until a viewer has all of it."""

    lags_s: list[float] = field(default_factory=list)
    lost: int = 0
    num_bytes: int = 0


async def _look(server: _Server, viewers: int, seconds: float) -> dict[str, float]:
    looks, before = Looks(), server.rss_mb()
    stop = asyncio.Event()
    tasks = [asyncio.create_task(view(server.port, looks, stop)) for _ in range(viewers)]
    await asyncio.sleep(
        SETTLE_S + viewers / 500
    )  # all are connected; the burst of the beginning is no live lag
    looks.lags_s.clear()
    cpu, peak, until = server.cpu_s(), before, time.monotonic() + seconds
    while time.monotonic() < until:
        peak = max(peak, server.rss_mb())
        await asyncio.sleep(0.5)
    used = (server.cpu_s() - cpu) / seconds
    stop.set()
    await asyncio.gather(*tasks)
    if len(looks.lags_s) < 20:
        raise UsageError("too few snapshots arrived to measure; type a larger --seconds")
    lags = statistics.quantiles(looks.lags_s, n=100)
    return {
        "snapshots_seen": float(len(looks.lags_s)),
        "viewers_lost": float(looks.lost),
        "lag_median_s": lags[49],
        "lag_p95_s": lags[94],
        "lag_worst_s": max(looks.lags_s),
        "rss_before_mb": before,
        "rss_peak_mb": peak,
        "server_cores": used,
    }


async def view(port: int, looks: Looks, stop: asyncio.Event) -> None:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
        writer.write(b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        while not stop.is_set():
            line = await asyncio.wait_for(reader.readline(), 30.0)
            if not line:
                looks.lost += 1
                break
            looks.num_bytes += len(line)
            if line.startswith(b'data: {"at":'):
                made = float(line[12:40].split(b",")[0].rstrip(b"}"))
                looks.lags_s.append(time.time() - made)
        writer.close()
    except (OSError, asyncio.TimeoutError):
        looks.lost += 1


async def _never_read(port: int, silent: int) -> dict[str, float]:
    """Clients that ask for the stream and read nothing: when is the last of them cut off?"""
    loop, began = asyncio.get_running_loop(), time.monotonic()
    sockets: list[socket.socket] = []
    for _ in range(silent):
        client = socket.socket()
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /api/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        sockets.append(client)
    dropped: dict[int, float] = {}
    while len(dropped) < silent and time.monotonic() - began < DROP_S:
        await asyncio.sleep(0.25)
        for index in _cut(sockets):
            dropped.setdefault(index, time.monotonic() - began)
    for client in sockets:
        client.close()
    return {"silent_dropped": float(len(dropped)), "silent_last_drop_s": max(dropped.values(), default=0.0)}


def _cut(sockets: list[socket.socket]) -> list[int]:
    """Which connections the other end has ended; asked of the kernel, as reading would spoil the silence."""
    ports = {client.getsockname()[1]: index for index, client in enumerate(sockets)}
    alive = set()
    for connection in psutil.Process().net_connections("tcp"):
        if (
            connection.laddr
            and connection.laddr.port in ports
            and connection.status == psutil.CONN_ESTABLISHED
        ):
            alive.add(ports[connection.laddr.port])
    return [index for index in ports.values() if index not in alive]
