"""`dtrain demo`: real workers on this machine train one model together, while some come, leave and die."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from dtrain.experiments.demo_cast import Cast, Member
from dtrain.experiments.demo_dashboard import dashboard
from dtrain.experiments.demo_process import DemoProcess, stop_all
from dtrain.experiments.demo_summary import print_result, summarize
from dtrain.experiments.demo_table import Stage
from dtrain.experiments.scratch import scratch_folder
from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.wandb_log import add_flag, resolve_mode

MIN_ROUNDS = 6
EVAL_EVERY = (5, 4, 3, 2, 1)  # rounds between evaluations: the largest that also hits the last round
POLL_S = 0.2
WIDTH = 80
DESCRIPTION = """\
Starts real `dtrain worker` processes on loopback, each with a DHT peer of its own,
and shows how they train a small GPT together: one more worker joins late and gets
the weights from its peers, worker-1 (which began the run) leaves by Ctrl-C, and
worker-2 is killed. Ends with a summary; exit code 0 only if the evaluation loss
fell and all workers that are left hold the same weights.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = "example: dtrain demo --workers 3 --rounds 10"
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--workers",
        type=int,
        default=3,
        metavar="N",
        help="workers that begin together (default 3); one more joins late (more, if fewer than 3 begin)",
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds to train (default 20)")
    parser.add_argument(
        "--data", type=Path, help="text file to train on (default: Python's own library sources)"
    )
    parser.add_argument("--preset", default="tiny", help="model size: tiny (default), small, gpt2 or medium")
    parser.add_argument("--no-dashboard", action="store_true", help="do not show the run on a page")
    add_flag(parser, "the swarm's metrics")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary's figures here")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if the evaluation loss fell and every live worker's digest is equal."""
    _check(args)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    run_id = f"demo-{secrets.token_hex(4)}"
    with ExitStack() as scene:
        scene.enter_context(signals_interrupt())
        base = scene.enter_context(scratch_folder("demo"))
        if not args.no_dashboard:
            scene.enter_context(dashboard(run_id, args.rounds, base, console, args.wandb))
        cast, stage = _set_up(args, run_id, base, console)
        began = time.monotonic()
        try:
            with stage:
                _play(cast, stage)
        except KeyboardInterrupt:
            console.print("Stopping the workers.")
            raise
        finally:
            stop_all([member.process for member in cast.members if member.process is not None])
        seconds, round_timeout_s = time.monotonic() - began, _round_timeout_s(cast.members[0])
    result = summarize(cast.members, round_timeout_s=round_timeout_s, seconds=seconds)
    print_result(result, console)
    if args.json is not None:
        args.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0 if result.ok else 1


def _check(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {args.workers}")
    if args.rounds < MIN_ROUNDS:
        raise UsageError(
            f"--rounds must be at least {MIN_ROUNDS}, for workers to join and leave in, not {args.rounds}"
        )
    if args.no_dashboard and args.wandb != "disabled":
        raise UsageError("--wandb logs what the dashboard sees: leave out --no-dashboard")
    args.wandb = resolve_mode(args.wandb)
    if args.json is not None and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        raise UsageError(f"cannot write {args.json}: type --json with a file in a folder you own")


def _set_up(args: argparse.Namespace, run_id: str, base: Path, console: Console) -> tuple[Cast, Stage]:
    everyone = ["--rounds", str(args.rounds)]
    everyone += ["--eval-every", str(next(n for n in EVAL_EVERY if args.rounds % n == 0))]
    if args.data is not None:
        everyone += ["--data", str(args.data.resolve())]
    organizer = ["--preset", args.preset, "--start-workers", str(args.workers)]

    def start(member: Member) -> DemoProcess:
        first = member is cast.members[0]
        return DemoProcess(run_id, member.name, base, [*everyone, *(organizer if first else [])])

    stage = Stage(console, args.rounds)
    cast = Cast.of(args.workers, args.rounds, base, start, stage.tell)
    late = ", ".join(member.name for member in cast.members if member.late)
    console.print(
        f"{args.workers} workers begin the run {run_id}; {late} joins late, {cast.leaver.name} leaves "
        f"early, {cast.victim.name} is killed.\nStarting takes a few seconds.",
        highlight=False,
    )
    return cast, stage


def _play(cast: Cast, stage: Stage) -> None:
    over = False
    while not over:
        over = cast.over  # asked first: what a worker wrote last is still read
        cast.swarm.refresh()
        stage.show(cast.members)
        cast.play()
        if cast.failed:
            _report_failure(cast.failed[0])
        time.sleep(POLL_S)
    stage.show(cast.members)


def _report_failure(member: Member) -> None:
    """Raise what ended a worker: its own line if the user can mend it, else the end of its log."""
    assert member.process is not None
    code, lines = member.process.exit_code, member.process.last_lines()
    own_line = lines.rpartition("\n")[2]
    if code == UsageError.exit_code and own_line.startswith("dtrain: "):
        raise UsageError(own_line.removeprefix("dtrain: "))
    raise RunError(f"{member.name} failed with exit code {code}; the last it said:\n{lines}")


def _round_timeout_s(first: Member) -> float:
    """The run's round timeout, from the manifest that the first worker made."""
    assert first.process is not None
    signed = json.loads((first.process.folder / "manifest.json").read_text())
    return float(signed["manifest"]["exchange"]["round_timeout_s"])
