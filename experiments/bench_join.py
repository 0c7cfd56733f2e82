"""`dtrain bench join`: what a mass join costs the rounds of those who train.

Real workers train a model on loopback, held to a rate (`--max-tokens-per-s`) that leaves the cores room. Then newcomers
that only download, so that their training is not what is measured, get the state all at once; again and again, with
rounds without a download between. The figure is the median round with downloads over the median round without.

Donors give at `--newcomer-mbps`, which stands in for the half of a home's upload that a donor takes by itself. Without
a bound (0) loopback is no bound either, and what is measured is how a dozen processes share this machine's cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.experiments.bench_join_peer import Newcomer
from dtrain.experiments.demo_process import DemoProcess, stop_all
from dtrain.experiments.scratch import scratch_folder
from dtrain.experiments.signals import signals_interrupt
from dtrain.trainer.errors import RunError
from dtrain.trainer.metrics import read_metrics

RUN_ID = "bench-join"
START_S = 240.0
DOWNLOAD_S = 600.0
RUN_FILE = """
[model]
preset = "{preset}"
[train]
inner_steps = {inner_steps}
batch_size = 1
seq_len = 16
[exchange]
start_workers = {workers}
round_timeout_s = 60
sender_timeout_s = 30
"""


@dataclass(frozen=True)
class Window:
    """A stretch of time (Unix seconds), and whether newcomers were downloading in it."""

    begin: float
    end: float
    downloading: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("--preset", default="small", help="size of the model")
    parser.add_argument("--workers", type=int, default=3, help="workers that train and give")
    parser.add_argument("--newcomers", type=int, default=6, help="that download at once")
    parser.add_argument("--inner-steps", type=int, default=2, help="of 16 tokens, per round")
    parser.add_argument("--rate", type=float, default=10.0, help="tokens per second of each worker")
    parser.add_argument(
        "--newcomer-mbps",
        type=float,
        default=40.0,
        help="Mbit/s that each donor gives, as of `dtrain worker`; 0 = no bound (default 40: half of a fast home's)",
    )
    parser.add_argument(
        "--cycles", type=int, default=2, help="pairs of a stretch without and one with downloads"
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a stretch without")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Measure and print; exit code 0 whatever the figures are."""
    with signals_interrupt(), scratch_folder("bench") as base, ExitStack() as stack:
        workers: list[DemoProcess] = []
        stack.callback(lambda: stop_all(workers))
        windows, downloads = _measure(base, args, workers, stack)
        rows = [_round_seconds(worker, windows) for worker in workers]
    figures = _figures(rows, downloads)
    print(
        f"round without downloads {figures['round_s']:.2f} s, with {args.newcomers} newcomers "
        f"{figures['round_s_downloading']:.2f} s (medians of {figures['num_rounds']} and "
        f"{figures['num_rounds_downloading']}): x {figures['ratio']:.2f}"
    )
    print(
        f"a download of {figures['state_bytes'] / 1e6:.1f} MB took {figures['download_s']:.1f} s "
        f"(median of {len(downloads)})"
    )
    if args.json:
        args.json.write_text(json.dumps({"settings": _plain(args), **figures}, indent=2) + "\n")
    return 0


def _measure(
    base: Path, args: argparse.Namespace, workers: list[DemoProcess], stack: ExitStack
) -> tuple[list[Window], list[tuple[int, float]]]:
    """Alternate the two kinds of stretches; (windows, (bytes, seconds) of each download)."""
    run_file = base / "run.toml"
    settings = {"preset": args.preset, "inner_steps": args.inner_steps, "workers": args.workers}
    run_file.write_text(RUN_FILE.format(**settings))
    flags = ["--eval-every", "0", "--checkpoint-every", "1000000", "--max-tokens-per-s", str(args.rate)]
    flags += ["--newcomer-mbps", str(args.newcomer_mbps)]
    for number in range(args.workers):
        first = ["--config", str(run_file)] if number == 0 else []
        workers.append(DemoProcess(RUN_ID, f"worker-{number + 1}", base, [*flags, *first]))
        if number == 0:
            _wait(workers[0], lambda: (base / "runtime").exists() and list((base / "runtime").glob("*.json")))
    _wait(workers[0], lambda: len(_rounds(workers[0])) >= 2)
    newcomers = [stack.enter_context(Newcomer(base / f"newcomer-{n}", base)) for n in range(args.newcomers)]
    windows, downloads = [], []
    for _ in range(args.cycles):
        before, begin = len(_rounds(workers[0])), time.time()
        _wait(workers[0], lambda: len(_rounds(workers[0])) >= before + args.rounds)  # noqa: B023 (called here)
        windows.append(Window(begin, time.time(), False))
        began = time.time()
        downloads += _all_at_once(newcomers)
        windows.append(Window(began, time.time(), True))
    return windows, downloads


def _all_at_once(newcomers: Sequence[Newcomer]) -> list[tuple[int, float]]:
    """(bytes, seconds) of each newcomer's download."""
    results: list[tuple[int, float]] = []
    threads = [threading.Thread(target=lambda n=n: results.append(n.download())) for n in newcomers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DOWNLOAD_S)
    if len(results) < len(newcomers):
        raise RunError(f"{len(newcomers) - len(results)} downloads failed or took over {DOWNLOAD_S:.0f} s")
    return results


def _rounds(worker: DemoProcess) -> list[dict[str, Any]]:
    return [e for e in read_metrics(worker.folder / "metrics.jsonl") if e["event"] == "round"]


def _round_seconds(worker: DemoProcess, windows: Sequence[Window]) -> list[tuple[float, bool]]:
    """(seconds, whether newcomers were downloading) of each round that lies in one window."""
    ends = [event["time"] for event in _rounds(worker)]
    found = []
    for begin, end in itertools.pairwise(ends):
        middle = (begin + end) / 2  # a round belongs where most of it lies
        found += [(end - begin, w.downloading) for w in windows if w.begin <= middle < w.end]
    return found


def _figures(
    rows: Sequence[Sequence[tuple[float, bool]]], downloads: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    without = [seconds for row in rows for seconds, downloading in row if not downloading]
    during = [seconds for row in rows for seconds, downloading in row if downloading]
    if not without or not during:
        raise RunError("no round lay within a measurement: type a higher --rate or a lower --newcomer-mbps")
    return {
        "round_s": statistics.median(without),
        "round_s_downloading": statistics.median(during),
        "round_s_longest": max(without),
        "round_s_downloading_longest": max(during),
        "num_rounds": len(without),
        "num_rounds_downloading": len(during),
        "ratio": statistics.median(during) / statistics.median(without),
        "ratio_of_means": statistics.mean(during) / statistics.mean(without),
        "state_bytes": downloads[0][0],
        "download_s": statistics.median(seconds for _, seconds in downloads),
    }


def _wait(worker: DemoProcess, ready: Any) -> None:
    until = time.monotonic() + START_S
    while not ready():
        if worker.exit_code is not None or time.monotonic() > until:
            raise RunError(f"{worker.name} is not getting anywhere:\n{worker.last_lines()}")
        time.sleep(0.1)


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))}
