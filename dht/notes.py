"""Notes: longer records that a peer writes seldom, for observers; heartbeats stay small."""

from __future__ import annotations

import base58
from hivemind.dht.node import DHTNode
from hivemind.utils import get_dht_time

LIFETIME_S = 1800.0
MAX_NOTE_BYTES = 8192


def _key(prefix: str, topic: str) -> str:
    return f"{prefix}.note.{topic}"


async def post(node: DHTNode, prefix: str, topic: str, note: bytes) -> None:
    """Store this peer's note under a topic; it takes the place of its last one."""
    if len(note) > MAX_NOTE_BYTES:
        raise ValueError(f"a note has {len(note)} bytes; {MAX_NOTE_BYTES} is the most")
    expires = get_dht_time() + LIFETIME_S
    await node.store(
        _key(prefix, topic),
        note,
        expiration_time=expires,
        subkey=node.peer_id.to_bytes(),
        exclude_self=node.protocol.client_mode,  # as for heartbeats
    )


async def read(node: DHTNode, prefix: str, topic: str) -> dict[str, bytes]:
    """Everybody's note under a topic by peer id, unchecked but for its size."""
    found = await node.get(_key(prefix, topic), latest=True)
    records = found.value if found is not None and isinstance(found.value, dict) else {}
    return {
        base58.b58encode(owner).decode(): record.value
        for owner, record in records.items()
        if isinstance(owner, bytes)
        and isinstance(getattr(record, "value", None), bytes)
        and len(record.value) <= MAX_NOTE_BYTES
    }
