"""A newcomer that gets the state and trains nothing, for `dtrain bench join`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

import torch

from dtrain.dht.exchange import DhtExchange
from dtrain.dht.peer_settings import PeerSettings
from dtrain.trainer.cli_run import open_run
from dtrain.trainer.errors import RunError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.model import GPT
from dtrain.trainer.outer import piece_lengths
from dtrain.trainer.signing import SignedManifest


class Newcomer:
    """A peer of the run whose first worker's folder and runtime folder lie below `base`."""

    def __init__(self, folder: Path, base: Path):
        self._folder, self._base = folder, base

    def __enter__(self) -> Newcomer:
        self._folder.mkdir()
        [first, *_] = sorted((self._base / "runtime").glob("*.json"))
        through = tuple(json.loads(first.read_text())["addresses"])
        identity = self._folder / "identity.key"
        self._exchange = DhtExchange(PeerSettings(identity, "127.0.0.1", initial_peers=through))
        self._exchange.connect()
        signed = SignedManifest.from_json((self._base / "worker-1" / "manifest.json").read_text())
        local = FlatParameters(GPT(signed.manifest.model))
        pieces = piece_lengths(torch.empty(local.num_params, device="meta"))
        open_run(self._exchange, signed, local.shapes, pieces)
        self._exchange.announce({"round": 0, "digest": "", "work": 0.0, "state": "joining"})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exchange.close()

    def download(self) -> tuple[int, float]:
        """Get the state and throw it away; (bytes, seconds)."""
        began = time.monotonic()
        state = self._exchange.fetch_state(self)
        if state is None:
            raise RunError("nobody gave the state")
        return len(state.blob), time.monotonic() - began

    def progress(self, have: int, total: int) -> None:
        """See `Watch`."""

    def left(self, donor: str, reason: str) -> None:
        """See `Watch`."""
        raise RunError(f"{donor}: {reason}")

    def trouble(self, reason: str) -> None:
        """See `Watch`."""
        raise RunError(reason)
