"""`dtrain service`: have a worker, or a bootstrap peer, begin at login and begin again when it fails."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dtrain.trainer.errors import UsageError

COMMANDS = ("join", "worker", "bootstrap")
KEPT_VARIABLES = ("DTRAIN_RUNTIME_DIR", "CUDA_VISIBLE_DEVICES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.usage = "dtrain service install COMMAND ... | status [NAME] | uninstall [NAME]"
    parser.epilog = "example: dtrain service install join dtrain://lQGi... --hours 22:00-08:00 --up 5mbit"
    parser.add_argument("action", choices=("install", "status", "uninstall"), help="what to do")
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ... | NAME",
        help="install: the command as you would type it (join, worker or bootstrap); else the service's name, "
        "which is the run's",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the action."""
    from dtrain.trainer.service import manager

    if args.action == "install":
        return _install(args.words)
    found = manager()
    if len(args.words) > 1:
        raise UsageError(f"dtrain service {args.action} takes one name, not {' '.join(args.words)}")
    names = found.names()
    wanted = args.words or names
    if not names or not set(wanted) <= set(names):
        there = f"there are: {', '.join(names)}" if names else "begin with dtrain service install join INVITE"
        raise UsageError(f"no {'such ' if args.words else ''}service is installed; {there}")
    if args.action == "status":
        for name in wanted:
            print(f"{name}: {found.state(name)}; {found.file(name)}")
        return 0
    if len(wanted) > 1:
        raise UsageError(f"which one? type dtrain service uninstall with one of {', '.join(names)}")
    path = found.file(wanted[0])
    found.uninstall(wanted[0])
    print(f"Ended {wanted[0]} and removed {path}. What it trained stays in dtrain-runs.")
    return 0


def _install(words: list[str]) -> int:
    from dtrain.trainer.service import Service, manager

    name, command = checked(words)
    folder = Path.cwd()
    variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    service = Service(name, (sys.executable, "-m", "dtrain.trainer.cli", *command), folder, variables)
    found = manager()
    more = found.install(service)
    print(f"{name} runs now, and again at each login, in {folder}; its file is {found.file(name)}.")
    print(f"{more}\ndtrain status shows what it does; dtrain service uninstall {name} ends it.")
    return 0


def checked(words: list[str]) -> tuple[str, list[str]]:
    """The run's name, and the command as a service needs it. What is wrong with it is told now, not at the login."""
    from dtrain.trainer.cli import parse
    from dtrain.trainer.cli_run import choose_run_id, decode_invite

    if not words or words[0] not in COMMANDS:
        shown = f", not {words[0]}" if words else ""
        raise UsageError(
            f"type the command that the service shall run{shown}: dtrain service install join INVITE "
            "(or worker, or bootstrap)"
        )
    args = parse(words)
    invite = decode_invite(args.invite) if args.invite else None
    run_id = choose_run_id(args, invite)
    for flag in ("config", "data"):
        path = getattr(args, flag, None)
        if path is not None and not path.exists():
            raise UsageError(f"there is no file {path} (--{flag})")
    if words[0] == "join" and not args.yes:
        words = [*words, "--yes"]  # nobody is there to be asked
    return run_id, words
