"""A real swarm: worker processes with DHT peers and averagers of their own, on loopback."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from swarm_tools import WorkerProcess, eventually, leftovers, our_processes, swarm

from dtrain.compression.codec import Codec
from dtrain.dht.credit_file import load
from dtrain.dht.identity import load_or_create
from dtrain.experiments.memory import MemoryExchange, MemorySwarm
from dtrain.trainer.cli import main
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.metrics import MetricsLog
from dtrain.trainer.model import GPT
from dtrain.trainer.settings import MachineSettings
from dtrain.trainer.signing import SignedManifest
from dtrain.trainer.worker import Worker

pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("processes")]
NOTICED_S = 2.0  # after the death of a network process, until the worker knows
SMALL = ("--preset", "tiny", "--inner-steps", "2", "--batch-size", "2", "--eval-every", "0")


def assert_one_theta(workers: list[WorkerProcess], at_least: int) -> None:
    """Workers that completed the same round have the same digest after it, in `at_least` rounds that two share."""
    shared = 0
    digests = [worker.digests() for worker in workers]
    for number in sorted(set().union(*digests)):
        seen = {d[number] for d in digests if number in d}
        shared += sum(number in d for d in digests) > 1
        assert len(seen) == 1, f"round {number}: {seen}"
    assert shared >= at_least


@pytest.mark.parametrize(("strategy", "names"), [("sparseloco", "abc"), ("diloco", "ab")])
def test_the_transport_changes_nothing(strategy: str, names: str, tmp_path: Path) -> None:
    """With a fixed H and the same peers, an in-memory swarm and a swarm of processes end with the same theta."""
    rounds = 3
    peer_ids = {name: load_or_create(tmp_path / name / "identity.key").peer_id for name in names}
    with swarm("equal", tmp_path) as real:
        flags = (*SMALL, "--start-workers", str(len(names)), "--rounds", str(rounds), "--seed", "5")
        flags = (*flags, "--strategy", strategy)
        workers = [real.start(name, *flags) for name in names]
        assert [worker.wait() for worker in workers] == [0] * len(names)
        assert_one_theta(workers, rounds)
        for event in workers[0].events("round"):
            assert sorted(event["contributors"]) == sorted(peer_ids.values())
            assert event["bytes_up"] > 0 and event["bytes_down"] > 0
        real_digest = workers[0].events("stop")[0]["digest"]

    signed = SignedManifest.from_json((tmp_path / "a" / "manifest.json").read_text())
    assert in_memory_digests(signed, peer_ids, rounds, tmp_path / "memory") == {real_digest}


def in_memory_digests(
    signed: SignedManifest, peer_ids: dict[str, str], rounds: int, folder: Path
) -> set[str]:
    """Final digests of the same run, trained by threads over a MemoryExchange."""
    torch.set_num_threads(1)
    manifest = signed.manifest
    memory = MemorySwarm(manifest, Codec(manifest.codec, FlatParameters(GPT(manifest.model)).shapes))
    made, logs = [], []
    for name, peer_id in peer_ids.items():
        settings = MachineSettings(name, folder / name, "cpu", 1, max_rounds=rounds, eval_every=0)
        (folder / name).mkdir(parents=True)
        logs.append(metrics := MetricsLog(folder / name / "metrics.jsonl"))
        made.append(Worker(manifest, settings, MemoryExchange(memory, peer_id), metrics, lambda _: None))
    threads = [threading.Thread(target=worker.run) for worker in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    for log in logs:
        log.close()
    assert {worker.outer.round for worker in made} == {rounds}
    return {worker.outer.digest.hex() for worker in made}


def test_a_newcomer_gets_theta_from_its_peers_and_contributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that joins a run under way is in the first round that begins after it has theta; `dtrain stop` from
    another terminal ends it cleanly."""
    with swarm("late", tmp_path) as run:
        first = run.start("a", *SMALL, "--max-tokens-per-s", "200")  # a round a second
        first.wait_for_round(3)
        late = run.start("b", "--eval-every", "0")
        joined = late.wait_for("joined")
        assert joined["source"] == "peers" and joined["round"] >= 3
        contributed = late.wait_for("first_contribution")
        assert contributed["round"] <= joined["round"] + 2
        assert late.events("first_step")[0]["seconds"] > 0
        late.wait_for("round", lambda event: event["own_included"] and len(event["contributors"]) == 2)
        first.interrupt()
        assert first.wait() == 0
        assert countersigners(first) == {late.events("start")[0]["peer_id"]}
        monkeypatch.setenv("DTRAIN_RUNTIME_DIR", str(tmp_path / "runtime"))
        assert main(["stop", "--name", "b"]) == 0
        assert late.wait() == 0
        [stopped] = late.events("stop")
        assert stopped["round"] == late.events("round")[-1]["round"]
        assert_one_theta([first, late], 1)


def countersigners(worker: WorkerProcess) -> set[str]:
    """Peers whose receipts a worker has brought home."""
    start = worker.events("start")[0]
    _, purse = load(worker.folder / "credit.json", bytes.fromhex(start["manifest_hash"]), start["peer_id"])
    assert all(receipt.is_genuine and receipt.tokens > 0 for receipt in purse.receipts)
    return {receipt.signer for receipt in purse.receipts}


def test_nothing_is_left_of_a_worker(tmp_path: Path) -> None:
    """However a worker ends, its children, sockets and temp folder are gone within 5 s, and its run's file too."""
    with ExitStack() as stack:
        runs = {
            number: stack.enter_context(swarm(f"gone-{number.name.lower()}", tmp_path / number.name))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
        }
        for run in runs.values():  # all at once: what takes long is to come up
            run.base.mkdir()
            run.start("a", *SMALL)
        for number, run in runs.items():
            (worker,) = run.workers
            worker.wait_for_round(1)
            assert len(worker.children()) == 2  # the network process and its daemon
            worker.process.send_signal(number)
            worker.wait()
            eventually(lambda base=run.base: not our_processes(base), "a process is left", 5.0)
            eventually(lambda pid=worker.process.pid: not leftovers({pid}), "a socket or folder is left", 5.0)
            assert not list((run.base / "runtime").glob("*.json"))
            if number != signal.SIGKILL:
                assert worker.process.returncode == 0
                assert worker.events("stop")


def test_the_others_go_on_when_a_worker_is_killed(tmp_path: Path) -> None:
    """SIGKILL of one of three costs the other two at most one round timeout, and they hold one theta."""
    with swarm("killed", tmp_path) as run:
        flags = (*SMALL, "--start-workers", "3")
        workers = [run.start(name, *flags) for name in ("a", "b", "c")]
        workers[0].wait_for_round(2)
        workers[2].process.kill()
        after = workers[0].events("round")[-1]["round"] + 3
        rounds = [worker.wait_for_round(after) for worker in workers[:2]]
        assert all(len(event["contributors"]) == 2 for event in rounds)
        slowest = max(event["wait_s"] + event["exchange_s"] for event in workers[0].events("round")[1:])
        manifest = SignedManifest.from_json((tmp_path / "a" / "manifest.json").read_text()).manifest
        assert slowest < manifest.exchange.round_timeout_s
        assert_one_theta(workers[:2], after)


def test_a_dead_network_process_is_replaced(tmp_path: Path) -> None:
    """A killed network process or daemon is noticed, and another one started, within 2 s; it has the same identity, and
    the worker goes on."""
    with swarm("heal", tmp_path) as run:
        workers = [run.start(name, *SMALL, "--start-workers", "2") for name in ("a", "b")]
        workers[0].wait_for_round(2)
        for worker, which in ((workers[0], "dtrain.dht.start"), (workers[1], "p2pd")):
            before = worker.children()
            next(p for p in before if which in " ".join(p.cmdline())).kill()
            killed, peer_id = time.time(), worker.events("start")[0]["peer_id"]
            lost = worker.wait_for("network", lambda event: event["state"] == "lost")
            assert lost["time"] - killed < NOTICED_S
            worker.wait_for("network", lambda event: event["state"] == "back")
            begun = [p.create_time() for p in worker.children() if p not in before]
            assert len(begun) == 2 and min(begun) - killed < NOTICED_S
            done = max(w.events("round")[-1]["round"] for w in workers)
            both = worker.wait_for(
                "round",
                lambda event, done=done: event["round"] > done + 1 and len(event["contributors"]) == 2,
            )
            assert peer_id in both["contributors"]
            for other in workers:
                other.wait_for_round(both["round"])
        assert_one_theta(workers, 2)


def test_a_run_resumes_after_everything_stopped(tmp_path: Path) -> None:
    """The same command in the same folder goes on from the newest checkpoint, with the same theta."""
    with swarm("resume", tmp_path) as run:
        worker = run.start("a", *SMALL, "--rounds", "3")
        assert worker.wait() == 0
        stopped = worker.events("stop")[-1]
        again = run.start("a", "--rounds", "5", "--eval-every", "0")
        assert again.wait() == 0
        joined = again.events("joined")[-1]
        assert joined["source"] == "checkpoint" and joined["round"] == stopped["round"] == 3
        assert again.events("round")[-1]["round"] == 5
        assert again.events("stop")[-1]["tokens"] > stopped["tokens"]


def test_newcomers_find_each_other(tmp_path: Path) -> None:
    """Two workers that joined through a third, on all interfaces, make whole rounds with each other."""
    with swarm("trio", tmp_path) as run:
        everywhere = ("--host", "0.0.0.0")
        first = run.start("a", *SMALL, *everywhere, "--max-tokens-per-s", "200")
        first.wait_for_round(1)
        late = [run.start(name, *everywhere, "--eval-every", "0") for name in ("b", "c")]
        for worker in (first, *late):
            worker.wait_for("round", lambda event: len(event["contributors"]) == 3 and not event["problem"])
        assert_one_theta([first, *late], 1)
