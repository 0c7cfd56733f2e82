"""`dtrain join INVITE`: show what the run is and what joining costs here, ask, and train."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dtrain.trainer.cli_flags import add_limit_flags, add_machine_flags, add_no_run_flags
from dtrain.trainer.cli_worker import run_worker
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.trainer.voice import Voice
    from dtrain.trainer.worker import Worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain join dtrain://lQGi... --hours 22:00-08:00 --up 5mbit"
    parser.add_argument("invite", metavar="INVITE", help="the dtrain:// text that you were given")
    parser.add_argument("--yes", action="store_true", help="join without asking")
    add_machine_flags(parser)
    add_limit_flags(parser, leave_out=("--threads",))
    add_no_run_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command until the run or the user ends it."""

    def approve(worker: Worker, voice: Voice) -> bool:
        from dtrain.trainer.estimate import estimate, free_memory_bytes, size

        cost = estimate(worker)
        voice.say(cost.lines(worker.manifest, worker.codec.num_params))
        free = free_memory_bytes()
        if cost.memory_bytes > free:
            raise UsageError(
                f"this needs about {size(cost.memory_bytes)} of memory and {size(free)} are free: "
                "close other programs, or join with another machine"
            )
        return args.yes or not sys.stdin.isatty() or _ask()

    return run_worker(args, approve)


def _ask() -> bool:
    try:
        answer = input("Join? [Y/n] ")
    except EOFError:
        return False
    if answer.strip().lower() in ("", "y", "yes"):
        return True
    print("Not joined.")
    return False
