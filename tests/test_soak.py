"""Many fault-free rounds: nothing is lost, nothing grows."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from swarm_tools import WorkerProcess, swarm
from test_chaos import RUN_FILE

ROUNDS = 300
SETTLED = 60  # by then caches are full: the allocator's, the DHT's, the history of past rounds


def sizes(worker: WorkerProcess) -> dict[str, tuple[int, int]]:
    """(resident bytes, open files) of the worker, its network process and its daemon."""
    found = {}
    for process in [psutil.Process(worker.process.pid), *worker.children()]:
        with process.oneshot():
            found[f"{process.name()} {process.pid}"] = (process.memory_info().rss, process.num_fds())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("exact_up_to", [4, 1], ids=["exact", "recompressed"])
def test_three_hundred_rounds_lose_nothing(exact_up_to: int, tmp_path: Path) -> None:
    """300 rounds of four real workers: every round has all four, one theta, no problem; memory and files stay."""
    (tmp_path / "run.toml").write_text(RUN_FILE.format(exact_up_to=exact_up_to))
    flags = ("--config", str(tmp_path / "run.toml"), "--eval-every", "0", "--audit", "--rounds", str(ROUNDS))
    with swarm("soak", tmp_path) as run:
        workers = [run.start(name, *flags) for name in ("a", "b", "c", "d")]
        for worker in workers:
            worker.wait_for_round(SETTLED)
        early = [sizes(worker) for worker in workers]
        for worker in workers:
            worker.wait_for("round", lambda event: event["round"] >= ROUNDS - 5, deadline_s=1500)
        late = [sizes(worker) for worker in workers]
        assert [worker.wait() for worker in workers] == [0, 0, 0, 0]

        digests = [worker.digests() for worker in workers]
        for number in range(1, ROUNDS + 1):
            assert len({d[number] for d in digests}) == 1, f"round {number}"
        for worker in workers:
            assert not worker.events("resync")
            for event in worker.events("round"):
                assert len(event["contributors"]) == 4 and not event["problem"], event
            assert max(event["error"] for event in worker.events("audit")) <= 1e-4
        for before, after in zip(early, late):
            for name, (rss, fds) in before.items():
                assert after[name][0] <= rss * 1.02 + 2**20, f"{name}: {rss} -> {after[name][0]} bytes"
                assert after[name][1] <= fds * 1.02 + 1, f"{name}: {fds} -> {after[name][1]} open files"
