"""`dtrain invite`: an invite to a run that a worker or bootstrap peer of this machine takes part in."""

from __future__ import annotations

import argparse

from dtrain.trainer.cli_control import find_workers
from dtrain.trainer.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain invite --run-id our-model"
    parser.add_argument("--run-id", metavar="NAME", help="the run; not needed where there is only one")


def run(args: argparse.Namespace) -> int:
    """Print the invite on a line of its own, so that it can be copied or piped."""
    args.name = None
    invites: dict[str, str] = {}
    for worker in find_workers(args):
        with worker:
            status = worker.status()
        if status.invite and (status.reach == "direct" or status.run_id not in invites):
            invites[status.run_id] = status.invite
    if not invites:
        raise UsageError("the worker is still on its way into the run: try again in a moment")
    if len(invites) > 1:
        raise UsageError(f"for which run? type --run-id with one of {', '.join(sorted(invites))}")
    print(invites.popitem()[1])
    return 0
