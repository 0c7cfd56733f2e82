"""`dtrain invite`: an invite to a run that a worker or bootstrap peer of this machine takes part in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dtrain.trainer.cli_admission import day, issue_token, issued_tokens, parse_lasting
from dtrain.trainer.cli_control import find_workers
from dtrain.trainer.cli_run import decode_invite, run_folder, stored_manifest
from dtrain.trainer.errors import UsageError

DEFAULT_LASTS, DEFAULT_USES = "30d", 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain invite --run-id our-model --expires 30d --uses 10"
    parser.add_argument("--run-id", metavar="NAME", help="the run; not needed where there is only one")
    parser.add_argument(
        "--expires",
        metavar="TIME",
        help=f"with --admission token: 12h, 30d, never (default: {DEFAULT_LASTS})",
    )
    parser.add_argument(
        "--uses", type=int, metavar="N", help=f"machines that may join with it (default: {DEFAULT_USES})"
    )
    parser.add_argument("--list", action="store_true", help="list the invites that were made, with their ids")


def run(args: argparse.Namespace) -> int:
    """Print the invite on a line of its own, so that it can be copied or piped."""
    lasts_s = parse_lasting(args.expires or DEFAULT_LASTS)
    if args.list:
        return _list(args)
    text, folder = invite_of_this_machine(args)
    signed = stored_manifest(folder)
    if signed is None or signed.manifest.admission.mode != "token":
        if args.expires or args.uses:
            raise UsageError("this run's invites neither expire nor count: leave out --expires and --uses")
        print(text)
        return 0
    from dataclasses import replace

    token = issue_token(signed, folder.parent, lasts_s=lasts_s, uses=args.uses or DEFAULT_USES)
    print(replace(decode_invite(text), token=token).encode())
    machines = "1 machine" if token.grant.uses == 1 else f"{token.grant.uses} machines"
    until = f"until {day(token.grant.expires)}" if token.grant.expires else "for good"
    print(
        f"For {machines}, {until}. Who has this line can join: give it to those only whom you invite. "
        f"To take it back: dtrain revoke {token.grant.id}",
        file=sys.stderr,
    )
    return 0


def _list(args: argparse.Namespace) -> int:
    folder = run_folder(args.run_id) if args.run_id else invite_of_this_machine(args)[1].parent
    issued = issued_tokens(folder)
    for entry in issued:
        until = f"until {day(entry['expires'])}" if entry["expires"] else "for good"
        print(f"{entry['id']}  {entry['uses']} uses, made {day(entry['issued'])}, {until}")
    if not issued:
        print(f"No invites with a token have been made in {folder}.")
    return 0


def invite_of_this_machine(args: argparse.Namespace) -> tuple[str, Path]:
    """An invite without a token through a worker of this machine, and that worker's folder."""
    args.name = None
    best: dict[str, tuple[bool, bool]] = {}
    invites: dict[str, tuple[str, Path]] = {}
    for worker in find_workers(args):
        with worker:
            status = worker.status()
        folder = Path(status.folder)
        rank = (folder.parent / "organizer.key").exists(), status.reach == "direct"
        if status.invite and (status.run_id not in best or rank > best[status.run_id]):
            best[status.run_id], invites[status.run_id] = rank, (status.invite, folder)
    if not invites:
        raise UsageError("the worker is still on its way into the run: try again in a moment")
    if len(invites) > 1:
        raise UsageError(f"for which run? type --run-id with one of {', '.join(sorted(invites))}")
    return invites.popitem()[1]
