"""`dtrain bootstrap`: keeps a run reachable at one address, and keeps its newest state. For a small server: it does not
train."""

from __future__ import annotations

import argparse
import math
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtrain.trainer.cli_archive import ArchiveThread, remembered
from dtrain.trainer.cli_run import (
    REACH_LINES,
    check_address,
    decode_invite,
    find_manifest,
    invite_text,
    run_folder,
    stored_manifest,
)
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.dht.invite import Invite
    from dtrain.trainer.signing import SignedManifest

LOOK_S = 1.0
NAME = "bootstrap"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain bootstrap --run-id our-model --port 31337"
    parser.add_argument(
        "--run-id", metavar="NAME", help="the run; its manifest.json comes from dtrain create"
    )
    parser.add_argument(
        "--invite", metavar="TEXT", help="an invite to the run, to stand beside its other peers"
    )
    parser.add_argument("--host", default="0.0.0.0", help="IPv4 address to listen on")
    parser.add_argument(
        "--port", type=int, default=31337, help="TCP port to listen on, the same at each start"
    )
    parser.add_argument(
        "--no-archive",
        action="store_true",
        help="do not keep the run's weights for when all workers are gone",
    )
    parser.add_argument(
        "--archive-every",
        type=float,
        metavar="SECONDS",
        default=300.0,
        help="fetch the weights anew this often (default: 300), and at most a tenth of the time",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    check_address(args)
    if not 1.0 <= args.archive_every < math.inf:
        raise UsageError(f"--archive-every {args.archive_every:g} will not do: type 1 or more seconds")
    invite = decode_invite(args.invite) if args.invite else None
    run_id = args.run_id or (invite.run_id if invite else None)
    if run_id is None:
        raise UsageError("which run? type --run-id NAME, or --invite with an invite to it")
    from dtrain.trainer.manifest import validate_run_id

    run_id = validate_run_id(run_id)
    folder = run_folder(run_id) / NAME
    stored = stored_manifest(folder)
    if stored is None and invite is None:
        raise UsageError(
            f"{folder.parent} holds no manifest.json of {run_id}: make the run with dtrain create, "
            "copy that file here, or type --invite"
        )
    with ExitStack() as stack:
        return _serve(args, run_id, folder, invite, stored, stack)


def _serve(
    args: argparse.Namespace,
    run_id: str,
    folder: Path,
    invite: Invite | None,
    stored: SignedManifest | None,
    stack: ExitStack,
) -> int:
    from dtrain.dht import rendezvous
    from dtrain.dht.archive import Archive
    from dtrain.dht.bystander import keep_reachable
    from dtrain.dht.peer_settings import PeerSettings
    from dtrain.dht.process import ExchangeError
    from dtrain.trainer.control import Control
    from dtrain.trainer.control_server import ControlServer
    from dtrain.trainer.voice import Voice

    voice, control, stop = Voice(), Control(), threading.Event()
    control.stop_worker = lambda reason: stop.set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    peers = (*(invite.addresses if invite else ()), *remembered(folder))
    exchange = Archive(PeerSettings(folder / "identity.key", args.host, args.port, initial_peers=peers))
    if (folder / "manifest.json").exists():  # who served before comes back, also while nobody else is there
        exchange.reach = "direct"
    stack.callback(exchange.close)
    control.used_bytes = exchange.wire_bytes
    try:
        exchange.connect()
        signed = stored or find_manifest(exchange, run_id, invite)
        keep_reachable(exchange, run_id=run_id, manifest=signed.to_json().encode())
    except ExchangeError as error:
        raise UsageError(str(error)) from None
    (folder / "manifest.json").write_text(signed.to_json())
    text = invite_text(exchange, signed)
    keeper = None if args.no_archive else ArchiveThread(exchange, signed, invite, folder, voice, args)

    def describe() -> dict[str, Any]:
        up, down = exchange.traffic()
        return {
            **(keeper.describe() if keeper is not None else {}),
            "state": "serving",
            "peer_id": exchange.peer_id,
            "folder": str(folder.resolve()),
            "reach": exchange.reach,
            "invite": text,
            "bytes_up": up,
            "bytes_down": down,
        }

    control.describe = describe
    server = ControlServer(run_id, NAME, control, voice, rendezvous.folder() / "control")
    stack.callback(server.close)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    if keeper is not None:
        keeper.start()
        stack.callback(keeper.stop)
    voice.say(f"Keeping {run_id} reachable. {REACH_LINES[exchange.reach]} Ctrl-C ends it.")
    voice.say(f"Others join with:\n  dtrain join {text}")
    while not stop.wait(LOOK_S) and not control.finishing:
        pass
    return 0
