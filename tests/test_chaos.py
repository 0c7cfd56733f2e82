"""Faults at named points of a round, in a swarm of four real workers: what the honest three must never lose."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from swarm_tools import Swarm, WorkerProcess, eventually, swarm

from dtrain.dht.faults import STOPPED_S, VARIABLE
from dtrain.trainer.metrics import read_metrics

pytestmark = pytest.mark.xdist_group("processes")

RUN_FILE = """
[model]
dim = 64
num_layers = 1
num_heads = 2
hidden_dim = 128
[train]
batch_size = 2
seq_len = 32
inner_steps = 3
[exchange]
start_workers = 4
matchmaking_s = 10
round_timeout_s = 12
sender_timeout_s = 5
heartbeat_s = 1
heartbeat_ttl_s = 6
exact_up_to = {exact_up_to}
"""
ROUND_TIMEOUT_S = 12.0
FAULT_ROUND = 2
ASLEEP_S = 60.0
POINTS = ("matchmaking", "first-part-sent", "half-sent", "reduced", "half-delivered", "before-report")
CLOSABLE = ("first-part-sent", "half-sent", "half-delivered")
RECOMPRESSED = ("reduced", "half-delivered", "aggregate")  # at these points sums are compressed again

CASES = [
    *((point, "kill") for point in POINTS),
    *((point, "stop") for point in POINTS),
    *((point, "close") for point in CLOSABLE),
    *(("matchmaking", kind) for kind in ("weight", "stale-round", "wrong-digest")),
    *(("section", kind) for kind in ("garbage", "nan", "wrong-shape", "stale-round")),
    *(("aggregate", kind) for kind in ("garbage", "wrong-shape", "weight")),
]
TAKEN_UP = "taken up: what this machine owes as a reducer"
IN_CI = ("half-sent", "kill")
IN_A_ROW = [("section", "nan", 2), ("half-delivered", "close", 4), ("reduced", "stop", 6)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Swarm]:
    with swarm("chaos", tmp_path) as made:
        yield made


def start(
    run: Swarm, name: str, faults: list[dict[str, object]], log_level: str = "WARNING"
) -> WorkerProcess:
    flags = ("--config", str(run.base / "run.toml"), "--eval-every", "0", "--audit")
    env = {VARIABLE: json.dumps(faults), "DTRAIN_LOG_LEVEL": log_level}
    return run.start(name, *flags, env=env)


def inject(run: Swarm, *planned: tuple[str, str, int]) -> None:
    """Faults (point, kind, round) of worker d; then the laws."""
    points = {point for point, _, _ in planned}
    run_file = RUN_FILE.format(exact_up_to=1 if points & set(RECOMPRESSED) else 4)
    (run.base / "run.toml").write_text(run_file)
    honest = [start(run, name, []) for name in ("a", "b", "c")]
    faults: list[dict[str, object]] = [{"point": p, "kind": k, "round": r} for p, k, r in planned]
    faulty = start(run, "d", faults)
    last_round = max(round for _, _, round in planned)
    for worker in honest:
        worker.wait_for_round(last_round + 5)
    for point, kind, round in planned:
        said = f"planned fault: {kind} at {point} of round {round}"
        assert said in faulty.log.read_text(), f"{said}: it did not happen"
        before = next(event for event in honest[0].events("round") if event["round"] == round)
        assert len(before["contributors"]) == 4, "the fault came before the swarm was whole"
    check_one_theta([*honest, faulty])
    check_nothing_is_lost(honest)
    check_time(honest)
    if "kill" in {kind for _, kind, _ in planned}:
        faulty = start(run, "d", [], "INFO")
    check_comes_back(honest[0], faulty, last_round)
    if "stop" in {kind for _, kind, _ in planned}:
        check_resynced_soon(honest[0], faulty)
    if points & {"reduced", "half-delivered"} and faulty is not run.workers[3]:
        assert TAKEN_UP in faulty.log.read_text(), "what it owed as a reducer is lost"


def check_one_theta(workers: list[WorkerProcess]) -> None:
    """Honest workers that completed a round have the same theta after it; the faulty one too, or it resynced."""
    *honest, faulty = [worker.digests() for worker in workers]
    for number in sorted(set().union(*honest)):
        assert len({d[number] for d in honest if number in d}) == 1, (
            f"the honest disagree after round {number}"
        )
    resynced = bool(workers[-1].events("resync"))
    wrong = [n for n, digest in faulty.items() if any(d.get(n, digest) != digest for d in honest)]
    assert not wrong or resynced, f"the faulty worker differs in rounds {wrong} and was not brought back"


def check_nothing_is_lost(workers: list[WorkerProcess]) -> None:
    """What a worker produced is delivered or in its error feedback: its auditor found no difference."""
    for worker in workers:
        audits = worker.events("audit")
        assert len(audits) > FAULT_ROUND
        for audit in audits:
            assert audit["error"] <= 1e-5 * max(1.0, audit["scale"]), f"{worker.name}: {audit}"
        # Every round is in the log, none was skipped without a word.
        numbers = [event["round"] for event in worker.events("round")]
        missed = set(range(numbers[0], numbers[-1] + 1)) - set(numbers)
        assert not missed or worker.events("resync"), f"{worker.name} skipped rounds {missed}"


def check_time(workers: list[WorkerProcess]) -> None:
    """A round's exchange never takes longer than its timeout."""
    for worker in workers:
        slowest = max(event["exchange_s"] for event in worker.events("round"))
        assert slowest <= ROUND_TIMEOUT_S + 1.0, f"{worker.name}: {slowest} s"


def check_comes_back(honest: WorkerProcess, faulty: WorkerProcess, fault_round: int) -> None:
    """A worker that is not dead, or was started again, contributes again, with everybody's theta."""
    peer_id = faulty.events("start")[0]["peer_id"]
    seen = honest.events("round")[-1]["round"]
    back = honest.wait_for("round", lambda e: e["round"] > fault_round + 1 and peer_id in e["contributors"])
    number = max(back["round"], seen)
    faulty.wait_for_round(number)
    assert faulty.digests()[faulty.events("round")[-1]["round"]]
    check_one_theta([honest, faulty])


def check_resynced_soon(honest: WorkerProcess, faulty: WorkerProcess) -> None:
    """A frozen worker that wakes up is brought back to the others' theta within two of their rounds."""
    everything = read_metrics(faulty.folder / "metrics.jsonl")
    gaps = [(after["time"] - before["time"], after["time"]) for before, after in pairwise(everything)]
    slept_s, woke = max(gaps)
    assert slept_s >= STOPPED_S - 1.0
    before = [event["round"] for event in honest.events("round") if event["time"] <= woke]
    back = next(event for event in faulty.events("resync") if event["time"] >= woke)
    reached = [event["round"] for event in honest.events("round") if event["time"] <= back["time"]]
    assert max(reached) - max(before) <= 2, f"{max(reached) - max(before)} rounds until it was back"


def test_a_fault_harms_nobody_else(run: Swarm) -> None:
    """The honest keep one theta, lose no delta, and lose no more time than a round's timeout."""
    inject(run, (*IN_CI, FAULT_ROUND))


def test_fault_after_fault_harms_nobody_else(run: Swarm) -> None:
    """The same for one worker that lies, loses a connection and freezes, and takes part again each time."""
    inject(run, *IN_A_ROW)


@pytest.mark.slow
def test_a_minute_asleep_is_made_up_for(run: Swarm) -> None:
    """A worker whose processes are all frozen for a minute (SIGSTOP, SIGCONT) is back at the others' theta within two
    rounds and contributes again, with nothing done for it; the others lost nothing."""
    (run.base / "run.toml").write_text(RUN_FILE.format(exact_up_to=4))
    *honest, sleeper = [start(run, name, []) for name in ("a", "b", "c", "d")]
    sleeper.wait_for_round(FAULT_ROUND)
    frozen = [psutil.Process(sleeper.process.pid), *sleeper.children()]
    for process in frozen:
        process.suspend()
    fell_asleep = time.monotonic()
    eventually(lambda: time.monotonic() - fell_asleep > ASLEEP_S, "the minute does not pass", 2 * ASLEEP_S)
    missed = honest[0].events("round")[-1]["round"]
    for process in frozen:
        process.resume()
    check_comes_back(honest[0], sleeper, missed)
    check_resynced_soon(honest[0], sleeper)
    check_one_theta([*honest, sleeper])
    check_nothing_is_lost(honest)


@pytest.mark.slow
@pytest.mark.parametrize(("point", "kind"), [case for case in CASES if case != IN_CI])
def test_every_fault_at_every_point_harms_nobody_else(point: str, kind: str, run: Swarm) -> None:
    """The same for the whole matrix of points and kinds (`make chaos`)."""
    inject(run, (point, kind, FAULT_ROUND))
