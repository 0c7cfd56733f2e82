"""`dtrain bench pace`: what unequal machines lose to one another when they train together.

Real workers on loopback, each held to a rate of its own (`--max-tokens-per-s`), so that the machine's cores are not
what is measured. First each rate alone, then all together with eager overlap and a token target per round: the swarm's
tokens per second against the sum of what each does alone, and each worker's compute share.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.experiments.demo_process import DemoProcess, stop_all
from dtrain.experiments.scratch import scratch_folder
from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.errors import RunError
from dtrain.trainer.metrics import read_metrics

WARM_S = 20.0  # starting up, meeting, the first rounds
START_S = 120.0
RUN_FILE = """
[model]
dim = 64
num_layers = 1
num_heads = 2
hidden_dim = 128
[train]
batch_size = 2
seq_len = 32
[exchange]
overlap = "{overlap}"
round_tokens = {round_tokens}
start_workers = {workers}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument(
        "--rates", default="800,800,800,200", help="tokens per second that each worker is held to"
    )
    parser.add_argument(
        "--round-s", type=float, default=8.0, help="length of a round at those rates, in seconds"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each measurement")
    parser.add_argument("--overlap", default="eager", choices=("eager", "none"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Measure and print; exit code 0 whatever the figures are."""
    rates = [float(rate) for rate in args.rates.split(",")]
    alone = {rate: _measure([rate], args)[0]["tokens_per_s"] for rate in sorted(set(rates))}
    together = _measure(rates, args)
    total = sum(row["tokens_per_s"] for row in together)
    expected = sum(alone[rate] for rate in rates)
    for rate, row in zip(rates, together):
        row["alone_tokens_per_s"] = alone[rate]
        print(
            f"worker at {rate:g} tokens/s: {row['tokens_per_s']:.0f} together, {alone[rate]:.0f} alone, "
            f"compute share {100 * row['compute_share']:.1f} %, {row['rounds']} rounds"
        )
    print(
        f"swarm: {total:.0f} tokens/s, {100 * total / expected:.1f} % of the sum of each alone ({expected:.0f})"
    )
    if args.json is not None:
        figures = {"overlap": args.overlap, "workers": together, "share_of_sum_alone": total / expected}
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


def _measure(rates: Sequence[float], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train together for a while; one row per worker, over the time after everybody has warmed up."""
    with signals_interrupt(), scratch_folder("bench") as base:
        (base / "runtime").mkdir()
        run_file = base / "run.toml"
        target = int(sum(rates) * args.round_s)
        run_file.write_text(RUN_FILE.format(overlap=args.overlap, round_tokens=target, workers=len(rates)))
        workers: list[DemoProcess] = []
        try:
            for number, rate in enumerate(rates):
                flags = ["--config", str(run_file), "--eval-every", "0", "--checkpoint-every", "1000"]
                flags += ["--max-tokens-per-s", str(rate)]
                workers.append(DemoProcess("bench", f"worker-{number + 1}", base, flags))
            _wait_for_first_steps(workers)
            time.sleep(WARM_S)
            began = [_last(worker) for worker in workers]
            time.sleep(args.seconds)
            return [_row(before, _last(worker), worker) for before, worker in zip(began, workers)]
        finally:
            stop_all(workers)


def _events(worker: DemoProcess, kind: str) -> list[dict[str, Any]]:
    path = worker.folder / "metrics.jsonl"
    return [event for event in read_metrics(path) if event["event"] == kind] if path.exists() else []


def _wait_for_first_steps(workers: Sequence[DemoProcess]) -> None:
    until = time.monotonic() + START_S
    while not all(_events(worker, "first_step") for worker in workers):
        for worker in workers:
            if worker.exit_code is not None or time.monotonic() > until:
                raise RunError(f"{worker.name} did not start:\n{worker.last_lines()}")
        time.sleep(0.2)


def _last(worker: DemoProcess) -> dict[str, Any]:
    return _events(worker, "step")[-1]


def _row(before: dict[str, Any], after: dict[str, Any], worker: DemoProcess) -> dict[str, Any]:
    rounds = [event for event in _events(worker, "round") if before["time"] < event["time"] <= after["time"]]
    seconds = after["time"] - before["time"]
    return {
        "tokens_per_s": (after["tokens"] - before["tokens"]) / seconds,
        "compute_share": rounds[-1]["compute_share"] if rounds else 0.0,
        "rounds": len(rounds),
        "contributors": [len(event["contributors"]) for event in rounds],
    }
