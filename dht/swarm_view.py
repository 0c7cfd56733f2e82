"""What a worker is shown of its swarm, now and then, by its network process."""

from __future__ import annotations

from typing import Any

from hivemind.utils import get_dht_time

from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.transport import Traffic


def view_of(heartbeats: Heartbeats, traffic: Traffic) -> dict[str, Any]:
    """Who is there and what it last said, how long ago, and whether that is believed; bytes; refusals."""
    now, others = get_dht_time(), heartbeats.others()
    believed = {record.peer_id for record in heartbeats.ahead()}
    own = float(heartbeats.status.get("work", 0.0))
    peers = [
        [r.peer_id, dict(r.status), now - r.heard, r.work <= own or r.peer_id in believed] for r in others
    ]
    carried = {"up": traffic.up, "down": traffic.down, "wire": traffic.wire_bytes}
    return {"peers": peers, "traffic": carried, **heartbeats.refusals()}
