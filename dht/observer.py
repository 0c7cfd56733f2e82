"""A peer that watches a run: hears the heartbeats and reads the notes, trains nothing, and is waited for by nobody."""

from __future__ import annotations

import os
import time

from dtrain.dht import ipc
from dtrain.dht.exchange import OPEN_TIMEOUT_S, DhtExchange
from dtrain.dht.peer_settings import PeerSettings
from dtrain.dht.terms import run_prefix


class Observer(DhtExchange):
    """`connect`, `find_manifests`, `observe`; then `swarm` and `posted` tell what there is to see. Never announces."""

    def __init__(self, settings: PeerSettings):
        self._heard = 0.0
        super().__init__(settings)

    def observe(
        self,
        *,
        run_id: str,
        manifest: bytes,
        manifest_hash: bytes,
        heartbeat_s: float,
        heartbeat_ttl_s: float,
    ) -> None:
        """Begin to watch a run. `manifest` is its signed form, handed to whoever asks for it."""
        self._run = {
            "run_id": run_id,
            "prefix": run_prefix(run_id, manifest_hash),
            "manifest": manifest,
            "manifest_hash": manifest_hash,
            "heartbeat_s": heartbeat_s,
            "heartbeat_ttl_s": heartbeat_ttl_s,
            "worker_pid": os.getpid(),
        }
        self._heartbeat_ttl_s = heartbeat_ttl_s
        self._enter_run()
        self._open.set()
        self.process.set_up = self._come_back

    @property
    def is_connected(self) -> bool:
        """Whether the network process works. It says so four times a second."""
        return self._open.is_set() and time.monotonic() - self._heard < 5.0

    def _enter_run(self) -> None:
        self.process.command("observe", timeout_s=OPEN_TIMEOUT_S, **self._run)

    def _hear(self, message: ipc.Message) -> None:
        self._heard = time.monotonic()
        super()._hear(message)
