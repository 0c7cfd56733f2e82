"""`dtrain dashboard`: a page on which a run is watched, this machine's workers are controlled, experiments compared."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.trainer.errors import UsageError
from dtrain.trainer.wandb_log import add_flag

if TYPE_CHECKING:
    from dtrain.dht.invite import Invite
    from dtrain.experiments.dashboard_guard import Access
    from dtrain.experiments.dashboard_observer import Watcher
    from dtrain.experiments.dashboard_rows import Snapshot
    from dtrain.experiments.dashboard_stream import Hub
    from dtrain.experiments.dashboard_wandb import SwarmLog

DEFAULT_PORT = 8080
NEEDS = "the dashboard needs a few packages more: pip install 'dtrain[dashboard]'"
DESCRIPTION = """\
Opens a page on which a run is watched live. It joins the run as an observer that
trains nothing, keeps the history in a file, and takes no part in rounds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.epilog = "example: dtrain dashboard --run-id my-first-run"
    what = parser.add_argument_group("what to show")
    what.add_argument("--run-id", metavar="NAME", help="a run that a worker on this machine trains")
    what.add_argument("--invite", metavar="TEXT", help="the dtrain:// line that a worker of the run printed")
    what.add_argument("--peer", metavar="ADDRESS", action="append", default=[], help="peer to join through")
    what.add_argument(
        "--results", type=Path, metavar="DIR", help="result folders of dtrain simulate to compare"
    )
    what.add_argument("--target-rounds", type=int, default=0, metavar="N", help="for the time that is left")
    page = parser.add_argument_group("the page")
    page.add_argument("--port", type=int, help=f"TCP port (default: {DEFAULT_PORT}, or any free one)")
    page.add_argument(
        "--public", action="store_true", help="read-only, for everybody who reaches this machine"
    )
    page.add_argument(
        "--show-addresses",
        action="store_true",
        help="with --public: show the invite too, which holds peers' IP addresses",
    )
    page.add_argument("--no-browser", action="store_true", help="only print the address")
    add_flag(page, "the swarm's metrics")
    page.add_argument("--folder", type=Path, help="for the history (default: ./dtrain-runs/RUN/dashboard)")


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    invite, run_id = _check(args)
    try:
        from dtrain.experiments.dashboard_app import create_app
        from dtrain.experiments.dashboard_guard import Access
        from dtrain.experiments.dashboard_machine import Machine
        from dtrain.experiments.dashboard_results import Results
        from dtrain.experiments.dashboard_stream import Hub, make_server
        from dtrain.experiments.dashboard_wandb import SwarmLog
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "dtrain":
            raise
        raise UsageError(NEEDS) from None
    hub, access = Hub(), Access(args.public)
    listener = listen(args.port, args.public)
    swarm_log = SwarmLog(args.wandb)
    watcher = _watcher(args, run_id, invite, hub, swarm_log) if run_id else None
    app = create_app(
        hub=hub,
        access=access,
        run=watcher,
        results=None if args.results is None else Results(args.results),
        machine=None if args.public else Machine(run_id),
        show_invite=not args.public or args.show_addresses,
    )
    server = make_server(app, hub)
    if watcher is not None:
        watcher.start()
    address = _announce(listener, access, args)
    try:
        if not args.no_browser:
            open_browser(address)
        server.run(sockets=[listener])
    finally:
        listener.close()
        if watcher is not None:
            watcher.close()
        swarm_log.close()
    return 0


def _check(args: argparse.Namespace) -> tuple[Invite | None, str]:
    """(invite, run id); the run id is "" when only results are shown. UsageError for what does not fit together."""
    from dtrain.trainer.cli_run import choose_run_id, parse_invite

    if args.port is not None and not 0 <= args.port <= 65535:
        raise UsageError(f"--port {args.port} does not exist: type 1 to 65535, or 0 for any free one")
    if args.target_rounds < 0:
        raise UsageError(f"--target-rounds must be at least 0, not {args.target_rounds}")
    if args.results is not None and not args.results.is_dir():
        raise UsageError(f"--results {args.results} is no folder: type one that dtrain simulate wrote")
    if args.show_addresses and not args.public:
        raise UsageError("--show-addresses is for --public; on your own machine the invite is shown anyway")
    invite = parse_invite(args)
    if invite is None and args.run_id is None:
        if args.results is None:
            raise UsageError("what to show? type --run-id NAME, --invite TEXT, or --results DIR")
        return None, ""
    return invite, choose_run_id(args, invite)


def _watcher(
    args: argparse.Namespace, run_id: str, invite: Invite | None, hub: Hub, swarm_log: SwarmLog
) -> Watcher:
    from dtrain.experiments.dashboard_observer import Target, Watcher

    folder = args.folder or Path("dtrain-runs") / run_id / "dashboard"
    target = Target(run_id, folder, invite, tuple(args.peer), args.target_rounds)

    def publish(snapshot: Snapshot) -> None:
        hub.publish(snapshot.to_dict())
        swarm_log.take(snapshot)

    return Watcher(target, publish)


def listen(port: int | None, public: bool) -> socket.socket:
    """A bound socket: loopback only unless the page is public. The default port gives way, a typed one does not."""
    host = "0.0.0.0" if public else "127.0.0.1"
    for choice in [DEFAULT_PORT, 0] if port is None else [port]:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, choice))
            listener.listen(2048)  # from now on who comes is answered, if a little later
            return listener
        except OSError as error:
            listener.close()
            reason = error.strerror
    raise UsageError(f"--port {port} cannot be had: {reason}; type another, or 0 for any free one")


def _announce(listener: socket.socket, access: Access, args: argparse.Namespace) -> str:
    """Print where the page is; returns the address. Its fragment never leaves the browser."""
    host, port = listener.getsockname()[:2]
    if access.public:
        print(f"The dashboard is open to everybody who reaches this machine, on port {port}.", flush=True)
        if not args.show_addresses:
            print("It shows no invite, as that holds IP addresses; --show-addresses does.", flush=True)
        return f"http://127.0.0.1:{port}/"
    address = f"http://{ipaddress.IPv4Address(host)}:{port}/#token={access.token}"
    print(f"Dashboard: {address}", flush=True)
    print("Who has this address can control your workers here. Ctrl-C closes the page.", flush=True)
    return address


def open_browser(address: str) -> None:
    """Where there is a screen to open it on."""
    has_screen = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.stdout.isatty() and has_screen:
        webbrowser.open(address)
