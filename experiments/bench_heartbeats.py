"""`dtrain bench heartbeats`: what being there costs a worker, rounds aside: its records, looks and greetings.

The peers are as a worker's, a daemon and a node each, all in one process for each size of swarm. Every worker says that
it is there every `heartbeat_s`, and tells of a new round now and then. Counted are the bytes of all messages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dtrain.dht.connection import Connection
from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.transport import Traffic, patch_hivemind
from dtrain.experiments.lab_dht_peers import peers
from dtrain.trainer.config import ExchangeConfig
from dtrain.trainer.errors import RunError, UsageError

WARM_S = 20.0  # at most; as long as is counted after it, else
ROUND_BEATS = 15  # heartbeats in a round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the bench's flags."""
    parser.add_argument("--peers", default="2,4,8,16", help="sizes of swarms (default 2,4,8,16)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each is counted (default 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Count swarm by swarm and print the table."""
    sizes = [int(text) if text.isdigit() else 0 for text in args.peers.split(",")]
    if min(sizes) < 2 or not args.seconds > 0:
        raise UsageError("--peers must be numbers of 2 at least, such as 4,8, and --seconds above 0")
    rows = [_in_its_own_process(size, args.seconds) for size in sizes]
    table = Table(title="What being there costs each worker")
    for name in ("workers", "kB/s up and down", "known to each"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["peers"]), f"{row['bytes_per_s'] / 1e3:.2f}", f"{row['known']:.1f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def _in_its_own_process(size: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "dtrain.experiments.bench_heartbeats", str(size), str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError("the bench's peers have ended by themselves; their error is above")
    row: dict[str, Any] = json.loads(done.stdout)
    return row


async def measure(folder: Path, size: int, seconds: float) -> dict[str, Any]:
    """Bytes per second that each of `size` workers sends, which on the whole is what each receives."""
    traffic, terms = Traffic(), ExchangeConfig()
    patch_hivemind(folder, traffic)
    made = await peers(folder, size, ())
    swarm = [
        Heartbeats(connection.node, "bench", ttl_s=terms.heartbeat_ttl_s, poll_s=terms.heartbeat_s)
        for connection in made
    ]
    for heartbeats in swarm:
        await heartbeats.open()
    tasks = [asyncio.create_task(heartbeats.poll()) for heartbeats in swarm]
    tasks += [
        asyncio.create_task(_beat(heartbeats, connection, terms.heartbeat_s))
        for heartbeats, connection in zip(swarm, made)
    ]
    await asyncio.wait(tasks, timeout=min(WARM_S, seconds))
    before = traffic.up
    ended, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:  # they go on until they are cancelled, or fail
        task.result()
    num_bytes, known = traffic.up - before, _known(swarm)
    for task in tasks:
        task.cancel()
    for connection in made:
        await connection.node.shutdown()
        await connection.p2p.shutdown()
    return {"peers": size, "bytes_per_s": num_bytes / seconds / size, "known": known}


async def _beat(heartbeats: Heartbeats, connection: Connection, period_s: float) -> None:
    beats = 0
    while True:
        round = beats // ROUND_BEATS
        status = {
            "round": round,
            "digest": f"{round:064x}",
            "work": 1e6 * round,
            "state": "training",
            "name": "bench",
            "device": "cpu",
            "tokens": 1_000_000 * round,
            "tokens_per_s": 512.0,
            "training_round": round,
            "loss": 2.5,
            "lane": 1,
            "reach": connection.reach,
            "address": connection.addresses[0],
        }
        await heartbeats.announce(status)
        await asyncio.sleep(period_s)
        beats += 1


def _known(swarm: Sequence[Heartbeats]) -> float:
    return sum(len(heartbeats.others()) for heartbeats in swarm) / len(swarm)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        print(json.dumps(asyncio.run(measure(Path(name), int(sys.argv[1]), float(sys.argv[2])))))
