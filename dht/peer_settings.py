"""Where and as whom a machine takes part in the network: its own business, in no manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PeerSettings:
    """Where and as whom this machine takes part in the network."""

    identity: Path
    host: str = "0.0.0.0"  # IPv4 address to listen on
    port: int = 0  # TCP; 0 = any free one
    # HOST:PORT that others dial instead, as where a port is forwarded; only with a loopback host.
    announce: str = ""
    initial_peers: tuple[str, ...] = ()  # libp2p addresses of peers to join through
    passes_on: bool = True  # be a relay for others, if this machine has a public address
    relays: bool = True  # be reached through a relay, if nobody can dial this machine
    newcomer_mbps: float = 0.0  # of our state that go to newcomers at most; 0 = half of what the line can do
