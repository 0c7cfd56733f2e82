"""Runs' manifests in the DHT: every worker of a run publishes the signed manifest under its own name."""

from __future__ import annotations

import asyncio

from hivemind.dht.node import DHTNode
from hivemind.utils import get_dht_time

from dtrain.dht.records import MAX_RECORD_BYTES

LIFETIME_S = 1800.0
PERIOD_S = 600.0


def _key(run_id: str) -> str:
    return f"dtrain-{run_id}.manifest"


async def find(node: DHTNode, run_id: str) -> list[bytes]:
    """Every manifest that somebody has published under this run id, unchecked."""
    found = await node.get(_key(run_id), latest=True)
    records = found.value.values() if found is not None and isinstance(found.value, dict) else []
    values = {record.value for record in records if isinstance(record.value, bytes)}
    return sorted(value for value in values if len(value) <= MAX_RECORD_BYTES)


async def publish(node: DHTNode, run_id: str, manifest: bytes) -> None:
    """Keep a manifest published. Runs until cancelled."""
    while True:
        expires = get_dht_time() + LIFETIME_S
        await node.store(_key(run_id), manifest, expiration_time=expires, subkey=node.peer_id.to_bytes())
        await asyncio.sleep(PERIOD_S)
