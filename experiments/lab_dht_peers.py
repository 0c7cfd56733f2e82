"""Some peers of `dtrain bench dht`, in one process: python -m dtrain.experiments.lab_dht_peers FOLDER NUMBER [ADDRESS].

Each has a daemon and a node of its own, as a worker has. Commands come as JSON lines, and each is answered by one:
{"post": true}                       each stores its record
{"look": [peer ids], "patience_s"}   one after another looks these peers' records up: seconds, or null if not found
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtrain.dht import notes
from dtrain.dht.connection import Connection, attach
from dtrain.dht.identity import load_or_create
from dtrain.dht.transport import Traffic, patch_hivemind

TOPIC = "bench"


async def peers(folder: Path, number: int, through: Sequence[str]) -> list[Connection]:
    made: list[Connection] = []
    for i in range(number):
        private = folder / str(i)
        private.mkdir(parents=True)
        known = list(through) or [address for first in made[:1] for address in first.addresses[:1]]
        made.append(
            await attach(
                load_or_create(private / "identity.key"),
                private,
                host="127.0.0.1",
                port=0,
                peers=known,
                passes_on=False,
                relays=False,
            )
        )
    return made


def prefix(peer_id: str) -> str:
    """Every peer's record has a key of its own, so that they lie all over the DHT."""
    return f"dtrain-bench-{peer_id}"


async def look(connection: Connection, whose: str, patience_s: float) -> float | None:
    began = time.monotonic()
    try:
        found = await asyncio.wait_for(notes.read(connection.node, prefix(whose), TOPIC), patience_s)
    except asyncio.TimeoutError:
        return None
    return time.monotonic() - began if whose in found else None


async def carry_out(made: Sequence[Connection], command: Mapping[str, Any]) -> Any:
    ids = [str(connection.p2p.peer_id) for connection in made]
    if "post" in command:
        pairs = zip(made, ids)
        await asyncio.gather(*(notes.post(c.node, prefix(i), TOPIC, i.encode()) for c, i in pairs))
        return ids

    return [await look(c, whose, command["patience_s"]) for c in made for whose in command["look"]]


async def serve(folder: Path, number: int, through: Sequence[str]) -> None:
    patch_hivemind(folder, Traffic())
    made = await peers(folder, number, through)
    print(json.dumps([made[0].addresses[0], [str(c.p2p.peer_id) for c in made]]), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await carry_out(made, json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
