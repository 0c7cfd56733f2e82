"""`dtrain bench exchange`: what a round costs, against stock hivemind and against the all-gather of payloads.

Every peer is a process with its own p2p daemon on loopback. All implementations average the same seeded tensors, and
take turns round by round, so that whatever else the machine does hits them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from dtrain.compression.errors import CompressionError
from dtrain.compression.spec import CodecSpec
from dtrain.experiments.bench_exchange_light import light_row
from dtrain.experiments.bench_exchange_report import (
    IMPLEMENTATIONS,
    PeerRound,
    Row,
    comparison,
    growth,
    machine,
    make_row,
    make_table,
)
from dtrain.experiments.bench_exchange_swarm import Swarm, Terms, background
from dtrain.experiments.scratch import scratch_folder
from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.config import ExchangeConfig
from dtrain.trainer.errors import UsageError

DEFAULT_PEERS = "2,4,8"
LIGHT_PEERS = "4,8,16"
DEFAULT_PARAMS = 5e6
MIN_PARAMS = 4096
AT_REST_S = 10.0
WIDTH = 80
DESCRIPTION = """\
Averages random tensors among real peers on this machine, each with a p2p daemon of
its own, and reports what a round costs: seconds until the slowest peer holds the
average, matchmaking and codec included, and all bytes that a peer hands to its
daemon and gets from it, DHT and heartbeats included. The implementations take turns.

  dtrain            this project's exchange, as a worker uses it
  hivemind-float16  stock hivemind's DecentralizedAverager with Float16 compression
  all-gather        the same payloads as dtrain's, everyone's to everyone

Then groups of --light-peers without processes: the bytes of the exchange itself,
with sums compressed again, to see that they do not grow with the group.

8 peers of each need about 16 GB of memory.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--peers", default=DEFAULT_PEERS, metavar="N,N", help=f"numbers of peers (default {DEFAULT_PEERS})"
    )
    parser.add_argument(
        "--light-peers",
        default=LIGHT_PEERS,
        metavar="N,N",
        help=f"numbers of peers to count bytes for in memory, or none (default {LIGHT_PEERS})",
    )
    parser.add_argument(
        "--params",
        type=float,
        default=DEFAULT_PARAMS,
        metavar="N",
        help=f"elements to average (default {DEFAULT_PARAMS:.0e})",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="rounds to take the median of (default 7)"
    )
    parser.add_argument("--k", type=int, default=64, help="kept of every 4096 elements (default 64)")
    parser.add_argument(
        "--exact-up-to",
        type=int,
        default=ExchangeConfig().exact_up_to,
        metavar="N",
        help="groups of up to N peers exchange the exact union, larger ones compress sums again (default %(default)s)",
    )
    parser.add_argument(
        "--implementations",
        default=",".join(IMPLEMENTATIONS),
        metavar="A,B",
        help="which ones to measure (default: all)",
    )
    parser.add_argument(
        "--at-rest-s",
        type=float,
        default=AT_REST_S,
        metavar="S",
        help="seconds to count what peers send between rounds (default %(default)g)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 unless a peer failed. Raises UsageError, or RunError with what a peer said last."""
    comparisons, implementations, light = _check(args)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows: list[Row] = []
    with signals_interrupt(), scratch_folder("bench") as base:
        for terms in comparisons:
            rows += _compare(terms, implementations, args.rounds, args.at_rest_s, base, console)
        rows += [light_row(peers, int(args.params), args.k) for peers in light]
    console.print(make_table(rows))
    for line in [*comparison(rows), *growth(rows)]:
        console.print(line, highlight=False)
    if args.json is not None:
        result = {"rows": rows, "k": args.k, "exact_up_to": args.exact_up_to, "machine": machine()}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _compare(
    terms: Terms, implementations: list[str], rounds: int, at_rest_s: float, base: Path, console: Console
) -> list[Row]:
    """All implementations at one number of peers."""
    with ExitStack() as stack, console.status("") as status:
        began = time.monotonic()
        status.update(f"{terms.peers} peers each are starting")
        swarms = [stack.enter_context(Swarm(name, terms, base)) for name in implementations]
        for swarm in swarms:
            swarm.join()
        for swarm in swarms:
            swarm.meet()
        console.print(
            f"{terms.peers} peers each are up after {time.monotonic() - began:.0f} s.", highlight=False
        )
        done: list[list[list[PeerRound]]] = [[] for _ in swarms]
        for number in range(rounds + 1):
            for swarm, taken in zip(swarms, done):
                status.update(f"{terms.peers} peers: round {number} of {rounds}, {swarm.implementation}")
                taken.append(swarm.round(number))
        status.update(f"{terms.peers} peers at rest")
        rates = background(swarms, at_rest_s)
        status.update("ending the peers")
    # Round 0 is not counted: connections are made and memory is touched for the first time.
    return [
        make_row(swarm.implementation, terms.params, taken[1:], rate)
        for swarm, taken, rate in zip(swarms, done, rates)
    ]


def _check(args: argparse.Namespace) -> tuple[list[Terms], list[str], list[int]]:
    peers = _numbers("--peers", args.peers, DEFAULT_PEERS)
    light = [] if args.light_peers == "none" else _numbers("--light-peers", args.light_peers, LIGHT_PEERS)
    if not MIN_PARAMS <= args.params <= 1e10:
        raise UsageError(f"--params must be between {MIN_PARAMS} and 1e10, not {args.params:g}")
    if args.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, not {args.rounds}")
    if args.at_rest_s <= 0:
        raise UsageError(f"--at-rest-s must be above 0 seconds, not {args.at_rest_s:g}")
    if args.exact_up_to < 0:
        raise UsageError(f"--exact-up-to must be at least 0, not {args.exact_up_to}")
    try:
        CodecSpec(k=args.k)
    except CompressionError as error:
        raise UsageError(f"--k: {error}") from None
    implementations = args.implementations.split(",")
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise UsageError(f"--implementations knows {', '.join(IMPLEMENTATIONS)}, not {name!r}")
    if args.json is not None and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        raise UsageError(f"cannot write {args.json}: type --json with a file in a folder you own")
    terms = [Terms(count, int(args.params), args.k, args.exact_up_to) for count in peers]
    return terms, implementations, light


def _numbers(flag: str, words: str, example: str) -> list[int]:
    try:
        peers = [int(word) for word in words.split(",")]
    except ValueError:
        peers = []
    if not peers or min(peers) < 2:
        raise UsageError(f"{flag} takes numbers from 2 up, such as {example}, not {words}")
    return peers
