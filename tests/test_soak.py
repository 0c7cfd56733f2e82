"""Many fault-free rounds: nothing is lost, nothing grows."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import psutil
import pytest
from swarm_tools import Swarm, WorkerProcess, swarm
from test_chaos import RUN_FILE

pytestmark = pytest.mark.xdist_group("processes")

ROUNDS, SHORT_ROUNDS = 300, 40
# Rounds in which sizes are watched: by the first of them the allocators' caches and the daemon's heap are full.
EARLY, LATE = (120, 180), (235, 295)
WATCH_S = 0.5
NAMES = ("a", "b", "c", "d")

Sizes = dict[str, tuple[float, float]]
"""By process: (resident bytes, open files)."""


def start(run: Swarm, rounds: int, exact_up_to: int) -> list[WorkerProcess]:
    (run.base / "run.toml").write_text(RUN_FILE.format(exact_up_to=exact_up_to))
    flags = ("--config", str(run.base / "run.toml"), "--eval-every", "0", "--audit", "--rounds", str(rounds))
    return [run.start(name, *flags) for name in NAMES]


def watched(workers: list[WorkerProcess], first: int, last: int) -> Sizes:
    """Of each worker, its network process and its daemon over these rounds: the median of its memory, and the fewest
    files that were open at a time. Streams come and go, and what is never closed is in every look.
    """
    workers[0].wait_for("round", lambda event: event["round"] >= first, deadline_s=1500)
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    while workers[0].events("round")[-1]["round"] < last:
        for worker in workers:
            for process in [psutil.Process(worker.process.pid), *worker.children()]:
                with process.oneshot():
                    size = process.memory_info().rss, process.num_fds()
                    seen[f"{worker.name}: {process.name()} {process.pid}"].append(size)
        time.sleep(WATCH_S)
    return {name: (median(r for r, _ in sizes), min(f for _, f in sizes)) for name, sizes in seen.items()}


def check_every_round(workers: list[WorkerProcess], rounds: int) -> None:
    """All four in every round, one theta after it, no problem, and the books close."""
    assert [worker.wait() for worker in workers] == [0] * len(NAMES)
    digests = [worker.digests() for worker in workers]
    for number in range(1, rounds + 1):
        assert len({d[number] for d in digests}) == 1, f"round {number}"
    for worker in workers:
        assert not worker.events("resync")
        for event in worker.events("round"):
            assert len(event["contributors"]) == len(NAMES) and not event["problem"], event
        assert max(event["error"] for event in worker.events("audit")) <= 1e-4


def test_forty_rounds_lose_nothing(tmp_path: Path) -> None:
    """The same for a short run, whose sums are compressed again."""
    with swarm("soak", tmp_path) as run:
        check_every_round(start(run, SHORT_ROUNDS, exact_up_to=1), SHORT_ROUNDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("exact_up_to", [4, 1], ids=["exact", "recompressed"])
def test_three_hundred_rounds_lose_nothing(exact_up_to: int, tmp_path: Path) -> None:
    """300 rounds of four real workers: nothing is lost, and neither memory nor open files grow by 2 %."""
    with swarm("soak", tmp_path) as run:
        workers = start(run, ROUNDS, exact_up_to)
        early, late = watched(workers, *EARLY), watched(workers, *LATE)
        check_every_round(workers, ROUNDS)
    growth = {name: (late[name][0] / rss, late[name][1] - fds) for name, (rss, fds) in early.items()}
    for name, (memory, files) in growth.items():
        print(f"{name}: memory x {memory:.4f}, open files {files:+g}")
    for name, (memory, files) in growth.items():
        assert memory <= 1.02, f"{name}: {early[name][0]:.0f} -> {late[name][0]:.0f} bytes"
        assert files <= 0.02 * early[name][1] + 1, f"{name}: {early[name][1]} -> {late[name][1]} open files"
