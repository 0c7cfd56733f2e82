"""What viewers of a dashboard cost the run: round times with and without them, side by side.

Two real workers on loopback train in rounds of about ROUND_S, held to a rate (`--max-tokens-per-s`): the viewers are on
this machine only because the bench is, so it is not the race for its cores that is measured, but what the observer asks
of the run, and whatever else delays a round. Stretches without a dashboard and with one and all its viewers take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.experiments.demo_process import DemoProcess, stop_all
from dtrain.experiments.scratch import scratch_folder
from dtrain.trainer.errors import RunError
from dtrain.trainer.metrics import read_metrics

ROUND_S = 2.0
TOKENS_PER_S = 800.0
TURNS = 3
START_S = 180.0
WARM_ROUNDS = 5
RUN_FILE = f"""
[model]
dim = 64
num_layers = 1
num_heads = 2
hidden_dim = 128
[train]
batch_size = 2
seq_len = 32
[exchange]
overlap = "none"
round_tokens = {int(2 * TOKENS_PER_S * ROUND_S)}
start_workers = 2
"""


def round_cost(viewers: int, seconds: float) -> dict[str, float]:
    """Figures of TURNS stretches of `seconds` each way."""
    with scratch_folder("load") as base:
        (base / "runtime").mkdir()
        run_file = base / "run.toml"
        run_file.write_text(RUN_FILE)
        flags = ["--config", str(run_file), "--eval-every", "0", "--checkpoint-every", "1000"]
        flags += ["--max-tokens-per-s", str(TOKENS_PER_S)]
        workers: list[DemoProcess] = []
        try:
            for number in (1, 2):
                workers.append(DemoProcess("load", f"worker-{number}", base, flags))
            _wait_for_rounds(workers)
            alone: list[float] = []
            watched: list[float] = []
            lost = 0
            for _ in range(TURNS):
                alone += _durations(workers[0], seconds)
                durations, gone = asyncio.run(_watched(workers[0], base, viewers, seconds))
                watched += durations
                lost += gone
        finally:
            stop_all(workers)
    return {
        "rounds_without": float(len(alone)),
        "rounds_with": float(len(watched)),
        "round_without_s": statistics.median(alone),
        "round_with_s": statistics.median(watched),
        "round_time_ratio": statistics.median(watched) / statistics.median(alone),
        "round_time_ratio_of_means": statistics.fmean(watched) / statistics.fmean(alone),
        "cost_viewers_lost": float(lost),
    }


def _wait_for_rounds(workers: Sequence[DemoProcess]) -> None:
    until = time.monotonic() + START_S
    while not all(_joint_rounds(worker) >= WARM_ROUNDS for worker in workers):
        for worker in workers:
            if worker.exit_code is not None or time.monotonic() > until:
                raise RunError(f"{worker.name} trained no rounds:\n{worker.last_lines()}")
        time.sleep(0.2)


def _rounds(worker: DemoProcess) -> list[dict[str, Any]]:
    path = worker.folder / "metrics.jsonl"
    return [event for event in read_metrics(path) if event["event"] == "round"] if path.exists() else []


def _joint_rounds(worker: DemoProcess) -> int:
    return sum(len(event["contributors"]) == 2 for event in _rounds(worker))


def _durations(worker: DemoProcess, seconds: float) -> list[float]:
    """Seconds of each round that begins and ends in the stretch from now on."""
    began = time.time()
    time.sleep(seconds)
    ends = [event["time"] for event in _rounds(worker) if began <= event["time"] <= began + seconds]
    if len(ends) < 3:
        raise RunError(f"{worker.name} has trained too few rounds:\n{worker.last_lines()}")
    return [after - before for before, after in itertools.pairwise(ends)]


async def _watched(worker: DemoProcess, base: Path, viewers: int, seconds: float) -> tuple[list[float], int]:
    """The same with a dashboard and its viewers, and how many of those lost their connection."""
    from dtrain.experiments.dashboard_load import Looks, view

    page = DemoProcess("load", "dashboard", base, ["--no-browser", "--port", "0"], command="dashboard")
    looks, stop = Looks(), asyncio.Event()
    try:
        port = await _port(page)
        tasks = [asyncio.create_task(view(port, looks, stop)) for _ in range(viewers)]
        await _all_look(page, looks, viewers)
        durations = await asyncio.to_thread(_durations, worker, seconds)
        stop.set()
        await asyncio.gather(*tasks)
        return durations, looks.lost
    finally:
        stop_all([page])


async def _port(page: DemoProcess) -> int:
    until = time.monotonic() + START_S
    while page.exit_code is None and time.monotonic() < until:
        address = page.log.read_text(errors="replace").partition("http://127.0.0.1:")[2]
        if address:
            return int(address.partition("/")[0])
        await asyncio.sleep(0.1)
    raise RunError(f"the dashboard did not start:\n{page.last_lines()}")


async def _all_look(page: DemoProcess, looks: Any, viewers: int) -> None:
    until = time.monotonic() + START_S
    while len(looks.lags_s) < 3 * viewers:  # some snapshots each: the rush of the beginning is over
        if page.exit_code is not None or looks.lost or time.monotonic() > until:
            raise RunError(f"the viewers do not see the run; {looks.lost} lost:\n{page.last_lines()}")
        await asyncio.sleep(0.2)
