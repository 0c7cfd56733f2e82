"""Joining a run: 25M parameters over a link that breaks, and many at once. `make join-test`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from swarm_tools import Swarm, WorkerProcess, eventually, swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.xdist_group("processes")]

DEADLINE_S = 600.0
RUN_FILE = """
[model]
preset = "{preset}"
[train]
inner_steps = 1
batch_size = 1
seq_len = 16
[exchange]
start_workers = {workers}
round_timeout_s = 60
sender_timeout_s = 30
"""
FLAGS = ("--eval-every", "0", "--checkpoint-every", "1")


def three_that_train(run: Swarm, preset: str, *flags: str) -> list[WorkerProcess]:
    """Three workers of a run whose first rounds nobody remembers: newcomers have to download its state."""
    run_file = run.base / "run.toml"
    run_file.write_text(RUN_FILE.format(preset=preset, workers=1))
    first = run.start("a", "--config", str(run_file), *FLAGS, "--rounds", "2")
    assert first.process.wait(DEADLINE_S) == 0
    for name in "bc":
        shutil.copytree(run.base / "a" / "checkpoints", run.base / name / "checkpoints")
    workers = [run.start("a", *FLAGS, *flags)]
    workers[0].wait_for("start", lambda event: event["pid"] == workers[0].process.pid, DEADLINE_S)
    workers += [run.start(name, *FLAGS, *flags) for name in "bc"]
    for worker in workers:
        worker.wait_for("round", lambda event: len(event["contributors"]) == 3, DEADLINE_S)
    return workers


def downloaded(worker: WorkerProcess) -> list[int]:
    """Bytes that were here, download event by download event."""
    return [event["have_bytes"] for event in worker.events("download")]


def wait_for_bytes(worker: WorkerProcess, share: float) -> None:
    worker.wait_for("download", lambda event: event["have_bytes"] >= share * event["total_bytes"], DEADLINE_S)


def test_a_newcomer_resumes_after_two_cuts(tmp_path: Path) -> None:
    """Its network process is killed, then all of it; each time it goes on where it was, and its digest is the run's."""
    with swarm("cuts", tmp_path) as run:
        others = three_that_train(run, "small", "--newcomer-mbps", "16")
        late = run.start("d", *FLAGS)
        wait_for_bytes(late, 0.2)
        next(p for p in late.children() if "dtrain.dht.start" in " ".join(p.cmdline())).kill()
        at_first_cut = downloaded(late)
        eventually(lambda: len(downloaded(late)) > len(at_first_cut) + 2, "it does not go on", DEADLINE_S)
        wait_for_bytes(late, 0.5)
        late.process.kill()
        late.process.wait()
        at_second_cut = downloaded(late)
        late = run.start("d", *FLAGS)
        joined = late.wait_for("joined", deadline_s=DEADLINE_S)
        assert joined["source"] == "peers"
        everything = downloaded(late)
        assert everything[len(at_first_cut)] >= at_first_cut[-1] > 0
        assert everything[len(at_second_cut)] >= at_second_cut[-1] > 0
        assert everything[-1] == late.events("download")[-1]["total_bytes"] > 100e6
        mine = late.wait_for("round", lambda event: event["own_included"], DEADLINE_S)
        theirs = others[0].wait_for("round", lambda event: event["round"] == mine["round"], DEADLINE_S)
        assert mine["digest"] == theirs["digest"]


def test_six_newcomers_at_once_all_train_within_three_rounds(tmp_path: Path) -> None:
    """A mass join: everybody gets the state, and contributes at most three rounds after it is in."""
    with swarm("mass", tmp_path) as run:
        others = three_that_train(run, "tiny", "--max-tokens-per-s", "8")  # a round in two seconds
        late = [run.start(f"n{number}", *FLAGS, "--max-tokens-per-s", "8") for number in range(6)]
        for worker in late:
            joined = worker.wait_for("joined", deadline_s=DEADLINE_S)
            contributed = worker.wait_for("first_contribution", deadline_s=DEADLINE_S)
            assert joined["source"] == "peers" and worker.events("download")
            assert contributed["round"] <= joined["round"] + 3
        mine = late[-1].events("round")[-1]
        theirs = others[0].wait_for("round", lambda event: event["round"] == mine["round"], DEADLINE_S)
        assert mine["digest"] == theirs["digest"]
