"""How others could call this machine, asked before it joins a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dtrain.dht.addresses import by_peer
from dtrain.dht.connection import connect_all, start
from dtrain.dht.identity import load_or_create
from dtrain.dht.transport import Traffic, patch_hivemind

BLOCKED = "blocked"


async def probe_reach(peers: Sequence[str], *, host: str = "0.0.0.0", port: int = 0) -> str:
    """ "direct", "relayed" or "client" (`dht/reachability.py`): how others can call TCP `port` of this machine, tried
    by `peers` (libp2p addresses, as an invite has them), which dial back; "blocked" if none of them can be reached.

    Without peers there is nobody to ask: ValueError. Raises TransportError when the port is taken. For a process that
    uses hivemind for nothing else; leaves nothing running.
    """
    known = by_peer(peers)
    if not known:
        raise ValueError("no peers to ask")
    with tempfile.TemporaryDirectory(prefix="dtrain-probe-") as folder:
        patch_hivemind(Path(folder), Traffic())
        identity = load_or_create(Path(folder) / "probe.key")
        p2p, reach, _ = await start(
            identity, Path(folder), host, port, known, before="", passes_on=False, relays=True
        )
        try:
            return reach if await connect_all(p2p, known) else BLOCKED
        finally:
            await p2p.shutdown()
