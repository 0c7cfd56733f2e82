"""`dtrain status`, `pause`, `resume`, `finish`, `stop`, `limit`, `log`: see and steer this machine's workers."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from dtrain.trainer.cli_flags import add_limit_flags, typed_limits
from dtrain.trainer.errors import UsageError

if TYPE_CHECKING:
    from dtrain.trainer.control_client import ControlClient
    from dtrain.trainer.control_pb2 import Status

EXAMPLES = {
    "status": "dtrain status --watch",
    "pause": "dtrain pause",
    "resume": "dtrain resume",
    "finish": "dtrain finish",
    "stop": "dtrain stop",
    "limit": "dtrain limit --up 5mbit --gpu 50% --hours 22:00-08:00 --monthly 200GB --on-battery no",
    "log": "dtrain log --follow",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the command that the parser is for."""
    command = parser.prog.split()[-1]
    parser.epilog = f"example: {EXAMPLES[command]}"
    parser.add_argument("--run-id", metavar="NAME", help="only workers of this run")
    parser.add_argument("--name", help="only the worker of this name")
    if command == "status":
        parser.add_argument("--json", action="store_true", help="for programs: one JSON object a worker")
        parser.add_argument("--watch", action="store_true", help="show it anew whenever it changes")
    elif command == "log":
        parser.add_argument("--lines", type=int, default=20, help="how many of the last lines; 0 = all kept")
        parser.add_argument("--follow", action="store_true", help="go on with the lines to come")
    elif command == "limit":
        add_limit_flags(parser)
    else:
        parser.add_argument("--all", action="store_true", help="all workers of this machine")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands."""
    changes = typed_limits(args) if args.command == "limit" else {}
    with ExitStack() as stack:
        workers = [stack.enter_context(client) for client in find_workers(args)]
        if args.command == "status":
            return _show(workers, args)
        if args.command == "log":
            return _log(_only(workers), args)
        if args.command == "limit":
            return _limit(_only(workers), changes)
        for worker in workers if args.all else [_only(workers)]:
            _steer(worker, args.command)
    return 0


def find_workers(args: argparse.Namespace) -> list[ControlClient]:
    """The workers of this machine that the flags mean. UsageError if there is none."""
    from dtrain.dht import rendezvous
    from dtrain.trainer import control_files
    from dtrain.trainer.control_client import ControlClient

    found = control_files.find(rendezvous.folder() / "control")
    wanted = [e for e in found if args.run_id in (None, e.run_id) and args.name in (None, e.name)]
    if not wanted:
        others = f"; there are: {', '.join(f'{e.name} of {e.run_id}' for e in found)}" if found else ""
        kind = "such worker" if args.run_id or args.name else "worker"
        raise UsageError(f"no {kind} runs on this machine{others or ': begin one with dtrain join INVITE'}")
    return [ControlClient(endpoint) for endpoint in wanted]


def _only(workers: list[ControlClient]) -> ControlClient:
    if len(workers) > 1:
        names = ", ".join(f"--run-id {w.endpoint.run_id} --name {w.endpoint.name}" for w in workers)
        raise UsageError(f"several workers run on this machine; name one of them: {names}")
    return workers[0]


def _steer(worker: ControlClient, command: str) -> None:
    name = worker.endpoint.name
    if command == "pause":
        status = worker.pause()
        now = (
            "it stands aside"
            if status.state == "paused"
            else "what it has trained of this round is handed in"
        )
        print(f"Pausing {name}: {now}. dtrain resume goes on.")
    elif command == "resume":
        status = worker.resume()
        print(f"{name} is held: {status.held}." if status.held else f"{name} goes on.")
    elif command == "finish":
        worker.finish()
        print(f"{name} leaves after this round. dtrain resume takes that back; dtrain stop leaves sooner.")
    else:
        worker.stop()
        print(f"{name} leaves now; what it trained and has not handed in yet is kept on disk.")


def _limit(worker: ControlClient, changes: dict[str, object]) -> int:
    status = worker.set_limits(**changes) if changes else worker.status()
    print(f"Limits of {worker.endpoint.name}: {describe_limits(status)}.")
    if status.held:
        print(f"Held now: {status.held}.")
    return 0


def _log(worker: ControlClient, args: argparse.Namespace) -> int:
    for line in worker.read_log(max(0, args.lines), follow=args.follow):
        print(f"{time.strftime('%H:%M:%S', time.localtime(line.time))}  {line.text}", flush=True)
    return 0


def _show(workers: list[ControlClient], args: argparse.Namespace) -> int:
    if args.watch:
        for status in _only(workers).watch_status():
            _print_status(status, args.json)
        return 0
    for worker in workers:
        _print_status(worker.status(), args.json)
    return 0


def _print_status(status: Status, as_json: bool) -> None:
    if as_json:
        from google.protobuf.json_format import MessageToDict

        fields = MessageToDict(
            status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(fields), flush=True)
        return
    print(describe(status), flush=True)


def describe(status: Status) -> str:
    """A worker's status in a few lines for its user."""
    if status.state == "serving":
        return (
            f"{status.name} of run {status.run_id}: serving newcomers at {status.reach} reach"
            + (f", with the state after round {status.round}\n" if status.round else "\n")
            + f"  {status.bytes_up / 1e6:.1f} MB up, {status.bytes_down / 1e6:.1f} MB down since its start; "
            f"{status.memory_gb:.1f} GB of memory"
        )
    state = f"{status.state}: {status.held}" if status.held else status.state
    if status.progress.stage:
        state += f" ({status.progress.stage} {status.progress.done:g} of {status.progress.total:g})"
    if status.finishing:
        state += ", leaves after this round"
    lines = [f"{status.name} in run {status.run_id}: {state}"]
    if status.state == "training":
        steps = f"step {status.step} of {status.inner_steps}" if status.inner_steps else f"step {status.step}"
        lines.append(
            f"  round {status.round + 1}, {steps}, {status.tokens_per_s:,.0f} tokens/s, loss {status.loss:.3f}"
        )
    lines += [
        f"  contributed {status.rounds_contributed} rounds since its start, {status.tokens:,} tokens in all"
        + (f"; {status.last_share_percent:.1f} % of its last round" if status.last_share_percent else ""),
        f"  {status.workers} workers are there; others reach this one: {status.reach or 'not known yet'}",
        f"  {status.bytes_up / 1e6:.1f} MB up, {status.bytes_down / 1e6:.1f} MB down since its start; "
        f"{status.bytes_today / 1e9:.2f} GB today, {status.bytes_this_month / 1e9:.2f} GB this month",
        f"  {status.memory_gb:.1f} GB of memory, on {status.device or 'a device not chosen yet'}; "
        f"limits: {describe_limits(status)}",
    ]
    return "\n".join(lines)


def describe_limits(status: Status) -> str:
    """A worker's limits in one line."""
    from dtrain.trainer.limits import Limits

    given = {name.name: value for name, value in status.limits.ListFields()}
    return Limits(**given).describe()
