"""`dtrain bench`: speed and size, measured side by side."""

from __future__ import annotations

import argparse
import importlib

BENCHES = {
    "codec": (
        "dtrain.experiments.bench_codec",
        "the codec against plain torch, the memory floor and the entropy",
    ),
    "exchange": ("dtrain.experiments.bench_exchange", "a round against stock hivemind and an all-gather"),
    "data": ("dtrain.experiments.bench_data", "how long training waits for streamed data"),
    "memory": ("dtrain.experiments.bench_memory", "what memory a worker takes, by preset and option"),
    "optimizers": ("dtrain.experiments.bench_optimizers", "what an inner optimizer adds to a step"),
    "dashboard": ("dtrain.experiments.dashboard_load", "the dashboard under many viewers"),
    "dht": ("dtrain.experiments.lab_dht", "look-ups among many peers of which some have just died"),
    "heartbeats": (
        "dtrain.experiments.bench_heartbeats",
        "what being there costs a worker, by the swarm's size",
    ),
    "join": ("dtrain.experiments.bench_join", "what a mass join costs those who train"),
    "pace": ("dtrain.experiments.bench_pace", "what unequal machines lose to one another"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benches and their flags."""
    parser.epilog = "example: dtrain bench codec"
    parsers = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, (module, text) in BENCHES.items():
        importlib.import_module(module).add_arguments(parsers.add_parser(name, help=text, description=text))


def run(args: argparse.Namespace) -> int:
    """Run one bench."""
    return int(importlib.import_module(BENCHES[args.bench][0]).run(args))
