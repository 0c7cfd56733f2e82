"""A peer that keeps a run's state for newcomers and trains nothing, as the process that starts it sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.dht.exchange import DhtExchange
from dtrain.dht.partial_state import NOTE
from dtrain.dht.state_files import Watch
from dtrain.dht.terms import run_prefix


@dataclass(frozen=True)
class FetchedState:
    """A downloaded state, each of its pieces checked against the digest, in a file that is the caller's now."""

    round: int
    work: float
    digest: bytes
    path: Path


class Archive(DhtExchange):
    """`connect`, `find_manifests`, `archive`; then `swarm` tells what the workers have, `fetch` gets it, `serve_state`
    gives it on, and `announce` has newcomers know of it."""

    def archive(
        self,
        *,
        run_id: str,
        manifest: bytes,
        manifest_hash: bytes,
        pieces: Sequence[int],
        admission: Mapping[str, Any] | None,
        sender_timeout_s: float,
        heartbeat_s: float,
        heartbeat_ttl_s: float,
    ) -> None:
        """Begin. The arguments are those of `open_run`."""
        self._state_files.sweep()
        self._run = {
            "run_id": run_id,
            "prefix": run_prefix(run_id, manifest_hash),
            "manifest": manifest,
            "manifest_hash": manifest_hash,
            "admission": dict(admission or {}),
            "pieces": list(pieces),
            "transfer_folder": str(self._state_files.folder),
            "newcomer_mbps": self._settings.newcomer_mbps,
            "sender_timeout_s": sender_timeout_s,
            "heartbeat_s": heartbeat_s,
            "heartbeat_ttl_s": heartbeat_ttl_s,
            "worker_pid": os.getpid(),
        }
        self._begin(heartbeat_s, heartbeat_ttl_s)

    def _enter_run(self) -> None:
        self.process.command("archive", **self._run)

    def seen_addresses(self) -> list[str]:
        """Where peers of the run said that they are, the newest last."""
        return self._address_book.addresses()

    def fetch(self, watch: Watch, *, above: float, wanted: float) -> FetchedState | None:
        """Download a state with at least `wanted` tokens behind it; None when nobody can give one now.

        A download that broke off is gone on with as long as it has more than `above`, which we have already.
        """
        goes_on = (self._state_files.folder / NOTE).exists()
        answer = self._fetch_state(watch, above + 1 if goes_on else wanted)
        if answer is None:
            return None
        path = Path(answer["path"])
        with suppress(FileNotFoundError):
            path.with_name(NOTE).unlink()  # the file is no download under way any more
        return FetchedState(answer["round"], answer["work"], answer["digest"], path)
