"""The archive of `dtrain bootstrap`: wires where the run's state comes from to where it is kept, in a thread."""

from __future__ import annotations

import argparse
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.trainer.cli_admission import admission_args, show_pass
from dtrain.trainer.errors import UsageError
from dtrain.trainer.state_layout import ask_state_pieces, keep_pieces, recall_pieces

if TYPE_CHECKING:
    from dtrain.dht.archive import Archive
    from dtrain.dht.invite import Invite
    from dtrain.trainer.archive import StateFile
    from dtrain.trainer.signing import SignedManifest
    from dtrain.trainer.voice import Voice

PEERS = "peers.json"
LOOK_S = 1.0
END_S = 1.0
OFFER_S = 10.0
STAGE = "Getting the run's state"
MEGA = 1e6


def remembered(folder: Path) -> list[str]:
    """Addresses of peers that were there when this bootstrap peer ran last: else, started again alone, it would begin
    a DHT of its own beside theirs."""
    try:
        return [str(address) for address in json.loads((folder / PEERS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def remember(folder: Path, addresses: list[str]) -> None:
    """Keep them for `remembered`, if there are any and they are new."""
    if not addresses or addresses == remembered(folder):
        return
    draft = folder / f"{PEERS}.tmp"
    with suppress(OSError):  # a full disk must not end what else is served
        draft.write_text(json.dumps(addresses) + "\n")
        os.replace(draft, folder / PEERS)


class ArchiveThread:
    """Keeps the run's newest state in `folder`/archive from `start` to `stop`; says why if it cannot."""

    def __init__(
        self,
        exchange: Archive,
        signed: SignedManifest,
        invite: Invite | None,
        folder: Path,
        voice: Voice,
        args: argparse.Namespace,
    ):
        self._exchange, self._signed, self._invite, self._folder = exchange, signed, invite, folder
        self._voice, self._args = voice, args
        self._pieces = recall_pieces(folder, signed.manifest)
        self._stop, self._began = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="archive")
        self._file: StateFile | None = None
        self._trouble = ""

    def start(self) -> None:
        """What is here from last time is offered before this returns: who came first would begin the run anew."""
        self._thread.start()
        if self._pieces is not None:
            self._began.wait(OFFER_S)

    def stop(self) -> None:
        """The thread ends by itself; with a download under way, when the exchange closes."""
        self._stop.set()
        self._thread.join(END_S)

    def describe(self) -> dict[str, Any]:
        """Fields of `control.proto`'s Status."""
        kept = self._file.kept if self._file is not None else None
        return {"round": kept.round, "tokens": int(kept.work)} if kept is not None else {}

    def _run(self) -> None:
        from dtrain.dht.process import ExchangeError
        from dtrain.trainer.archive import Archivist

        try:
            self._file = self._open()
            archivist = Archivist(
                self._exchange, self._file, self, self._voice.say, every_s=self._args.archive_every
            )
        except (UsageError, ExchangeError, OSError) as error:
            if not self._stop.is_set():
                self._voice.say(f"The run's state is not kept here: {error}.")
            return
        finally:
            self._began.set()
        while not self._stop.wait(LOOK_S):
            archivist.look()
            remember(self._folder, self._exchange.seen_addresses())

    def _open(self) -> StateFile:
        """Take part in the run as one that keeps its state."""
        from dtrain.trainer.archive import StateFile

        signed, manifest, exchange = self._signed, self._signed.manifest, self._exchange
        shown = show_pass(manifest, self._invite, exchange.peer_id, self._folder)
        pieces = self._pieces
        if pieces is None:
            pieces = ask_state_pieces(signed.to_json(), self._stop)
            keep_pieces(self._folder, manifest, pieces)
        exchange.archive(
            run_id=manifest.run_id,
            manifest=signed.to_json().encode(),
            manifest_hash=manifest.hash,
            pieces=pieces,
            admission=admission_args(manifest, shown, self._folder),
            sender_timeout_s=manifest.exchange.sender_timeout_s,
            heartbeat_s=manifest.exchange.heartbeat_s,
            heartbeat_ttl_s=manifest.exchange.heartbeat_ttl_s,
        )
        return StateFile(self._folder / "archive", pieces)

    # ------------------------------------------------------------------ trainer.exchange.Watch

    def progress(self, have: int, total: int) -> None:
        self._voice.progress(STAGE, have / MEGA, total / MEGA, "MB")
        if have == total:
            self._voice.done()

    def left(self, donor: str, reason: str) -> None:
        self._voice.say(f"Worker {donor[-8:]} gave bad data ({reason}); downloading from others only.")

    def trouble(self, reason: str) -> None:
        if reason != self._trouble:  # once, not at each try
            self._trouble = reason
            self._voice.say(f"The run's state cannot be fetched: {reason}.")
