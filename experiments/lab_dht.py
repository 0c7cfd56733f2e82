"""`dtrain bench dht`: whether records are found in a DHT of many peers, of which a part has just been killed.

The peers are as a worker's: a daemon and a node each, records signed and checked. Several share a process, and whole
processes are killed, so that nobody says goodbye; or they fall silent, as machines do whose power is cut: then nothing
refuses a connection. Of the look-ups only as many are under way at a time as there are cores, since volunteers' peers
do not share one machine's; each one's time is its own. Not modelled: the way between machines (all are on loopback).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtrain.experiments.demo_process import end_with_parent
from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.errors import RunError, UsageError

PER_PROCESS = 4
PATIENCE_S = 10.0  # of one look-up
IN_TIME_S, SHARE_IN_TIME = 2.0, 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the bench's flags."""
    parser.add_argument("--peers", type=int, default=64, help="default 64")
    parser.add_argument("--killed", type=float, default=0.25, help="share that is killed (default 0.25)")
    parser.add_argument("--silent", action="store_true", help="a power cut: the killed fall silent")
    parser.add_argument("--looks", type=int, default=8, help="look-ups by each survivor (default 8)")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="look-ups under way at a time (default: one for each core)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    """Run the bench; prints the figures. 0 if 95 % of the look-ups end with the record within 2 s."""
    at_once = args.at_once if args.at_once is not None else os.cpu_count() or 1
    if args.peers < 2 * PER_PROCESS or not 0 <= args.killed < 1 or min(args.looks, at_once) < 1:
        raise UsageError(
            f"--peers must be {2 * PER_PROCESS} at least, --killed below 1, --looks and --at-once above 0"
        )
    draw = random.Random(args.seed)
    with (
        signals_interrupt(),
        tempfile.TemporaryDirectory(prefix="dtrain-dht-") as folder,
        _swarm(Path(folder), args.peers) as swarm,
    ):
        ids = [peer for group in _ask(swarm, {"post": True}) for peer in group]
        print(f"{len(ids)} peers are up and have stored a record each.", flush=True)
        before = _look(swarm, draw.sample(ids, min(args.looks, len(ids))), at_once)
        # The first one is whom all others joined through: it goes first.
        dead = swarm[: max(1, round(args.killed * len(swarm)))] if args.killed else []
        for process in dead:
            os.killpg(process.pid, signal.SIGSTOP if args.silent else signal.SIGKILL)
        print(f"{PER_PROCESS * len(dead)} of them are {'silent' if args.silent else 'killed'}.", flush=True)
        after = _look(swarm[len(dead) :], draw.sample(ids, min(args.looks, len(ids))), at_once)
    figures = {"peers": len(ids), "killed": PER_PROCESS * len(dead), "before": before, "after": after}
    for name, found in (("before", before), ("after", after)):
        print(
            f"{name}: {found['looks']} look-ups, {100 * found['share_in_time']:.1f} % found within "
            f"{IN_TIME_S:g} s, {100 * found['share_found']:.1f} % at all; median {found['median_s']:.3f} s, "
            f"p95 {found['p95_s']:.3f} s"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if after["share_in_time"] >= SHARE_IN_TIME else 1


def _look(swarm: Sequence[subprocess.Popen[str]], whose: Sequence[str], at_once: int) -> dict[str, Any]:
    """What look-ups by all these peers came to."""
    answers = _ask(swarm, {"look": whose, "patience_s": PATIENCE_S}, at_once)
    seconds = [found for group in answers for found in group]
    found = sorted(s for s in seconds if s is not None) or [PATIENCE_S]
    return {
        "looks": len(seconds),
        "share_in_time": sum(s is not None and s <= IN_TIME_S for s in seconds) / len(seconds),
        "share_found": sum(s is not None for s in seconds) / len(seconds),
        "median_s": statistics.median(found),
        "p95_s": found[int(0.95 * (len(found) - 1))],
    }


def _ask(
    swarm: Sequence[subprocess.Popen[str]], command: dict[str, Any], at_once: int | None = None
) -> list[Any]:
    """The answers of all processes, of which so many (all) work on it at a time."""

    def ask(process: subprocess.Popen[str]) -> Any:
        assert process.stdin is not None
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        return _answer(process)

    with ThreadPoolExecutor(at_once or len(swarm)) as pool:
        return list(pool.map(ask, swarm))


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RunError("a process of the bench's peers has ended by itself; its error is above")
    return json.loads(line)


@contextmanager
def _swarm(folder: Path, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with `number` peers in all, each in a session of its own; none is left at the end."""
    swarm: list[subprocess.Popen[str]] = []
    through: list[str] = []
    began = time.monotonic()
    try:
        for first in range(0, number, PER_PROCESS):
            command = [sys.executable, "-m", "dtrain.experiments.lab_dht_peers", str(folder / str(first))]
            command += [str(min(PER_PROCESS, number - first)), *through[:1]]
            (folder / str(first)).mkdir()
            swarm.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )
            through.append(_answer(swarm[-1])[0])
            print(f"{first + PER_PROCESS} peers after {time.monotonic() - began:.0f} s", flush=True)
        yield swarm
    finally:
        for process in swarm:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with process:  # waits, and closes the pipes
                pass
