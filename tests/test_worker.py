"""The worker loop over an in-memory exchange: pacing, overlap, faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.compression.codec import Codec
from dtrain.compression.layout import Shapes
from dtrain.experiments.memory import Faults, MemoryExchange, MemorySwarm
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.journal import Journal
from dtrain.trainer.manifest import Manifest, preset_manifest
from dtrain.trainer.metrics import MetricsLog, read_metrics
from dtrain.trainer.model import GPT
from dtrain.trainer.settings import MachineSettings
from dtrain.trainer.worker import Worker

MODEL = {"model.dim": 64, "model.num_layers": 1, "model.num_heads": 2, "model.hidden_dim": 128}
QUICK = {**MODEL, "train.batch_size": 2, "train.seq_len": 32, "train.inner_steps": 3, "data.eval_tokens": 512}


def quick_manifest(**overrides: object) -> Manifest:
    """A model that trains in no time; double underscores stand for dots."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return preset_manifest("quick", "tiny", {**QUICK, "exchange.heartbeat_s": 0.05, **dotted})


class Threads:
    """Workers of one in-memory swarm, each in a thread of its own."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        stack: ExitStack,
        faults: Faults | None = None,
        shapes: Shapes | None = None,
    ):
        self.manifest, self.folder, self._stack = manifest, folder, stack
        codec = Codec(manifest.codec, shapes or FlatParameters(GPT(manifest.model)).shapes)
        self.swarm = MemorySwarm(manifest, codec, faults)
        self.workers: dict[str, Worker] = {}
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def start(self, name: str, journal: Journal | None = None, **settings: Any) -> Worker:
        worker = self.prepare(name, journal, **settings)
        self.begin(name)
        return worker

    def prepare(self, name: str, journal: Journal | None = None, **settings: Any) -> Worker:
        """A worker that does not train yet."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        machine = MachineSettings(
            name, folder, "cpu", 1, **{"eval_every": 0, "checkpoint_every": 100, **settings}
        )
        metrics = self._stack.enter_context(MetricsLog(folder / "metrics.jsonl"))
        worker = Worker(
            self.manifest,
            machine,
            MemoryExchange(self.swarm, name),
            metrics,
            lambda _: None,
            journal=journal,
        )
        self.workers[name] = worker
        return worker

    def begin(self, name: str) -> None:
        self.threads.append(threading.Thread(target=self._run, args=(self.workers[name],), name=name))
        self.threads[-1].start()

    def _run(self, worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as error:
            self.failures.append(error)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive(), f"{thread.name} hangs"
        assert not self.failures, self.failures

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_metrics(self.folder / name / "metrics.jsonl") if e["event"] == kind]


@contextmanager
def swarm_of(
    manifest: Manifest, folder: Path, faults: Faults | None = None, shapes: Shapes | None = None
) -> Iterator[Threads]:
    """Threads that are told to stop and joined at the end."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        threads = Threads(manifest, folder, stack, faults, shapes)
        try:
            yield threads
        finally:
            for worker in threads.workers.values():
                worker.stop("the test is over")
            threads.join()


def assert_one_theta(threads: Threads, rounds: int) -> None:
    digests = {
        name: {e["round"]: e["digest"] for e in threads.events(name, "round")} for name in threads.workers
    }
    for number in range(1, rounds + 1):
        assert len({d[number] for d in digests.values()}) == 1, f"round {number}"


DENSE = {"codec__kind": "dense", "codec__dense_bits": 8, "exchange__exact_up_to": 0}


@pytest.mark.parametrize(
    "changes", [{}, {"exchange__overlap": "eager"}, DENSE], ids=["topk", "eager", "dense"]
)
def test_every_round_holds_one_theta_and_everybody(changes: dict[str, Any], tmp_path: Path) -> None:
    """Without faults every worker's contribution is in every round, theta is one, and the loss falls."""
    manifest = quick_manifest(exchange__start_workers=3, **changes)
    with swarm_of(manifest, tmp_path) as threads:
        for name in ("a", "b", "c"):
            threads.start(name, max_rounds=12)
        threads.join()
        assert_one_theta(threads, 12)
        for name in threads.workers:
            rounds = threads.events(name, "round")
            assert [e["contributors"] for e in rounds] == [["a", "b", "c"]] * 12
            assert rounds[-1]["loss"] < rounds[0]["loss"] - 0.3
            assert rounds[-1]["tokens"] == 12 * 3 * 2 * 32


def test_nobody_waits_for_who_downloads(tmp_path: Path) -> None:
    """A worker that stands on another theta says that it is joining while it gets the others', who go on."""
    manifest = quick_manifest(exchange__start_workers=3)
    with swarm_of(manifest, tmp_path) as threads:
        for name in ("a", "b"):
            threads.start(name, max_rounds=12, max_tokens_per_s=2000)
        other = threads.prepare("c", max_rounds=12, max_tokens_per_s=2000)
        run_round, fetch_state, states = other.exchange.run_round, other.exchange.fetch_state, []

        def diverge(**contribution: Any) -> Any:
            outcome: Any = run_round(**contribution)
            return (
                outcome if contribution["round"] != 2 else replace(outcome, aggregates=outcome.aggregates[:1])
            )

        def fetch(watch: Any) -> Any:
            states.append(threads.swarm.peer("c").state)  # nothing is found to get yet
            watch.progress(1, 100)
            states.append(threads.swarm.peer("c").state)
            until = time.monotonic() + 60
            while threads.workers["a"].outer.round < 6 and time.monotonic() < until:
                time.sleep(0.01)
            states.append(threads.workers["a"].outer.round)
            return fetch_state(watch)

        other.exchange.run_round = diverge  # type: ignore[method-assign]
        other.exchange.fetch_state = fetch  # type: ignore[method-assign]
        threads.begin("c")
        threads.join()
        assert states[0] != "joining" and states[1] == "joining" and states[2] >= 6
        assert len({worker.outer.digest for worker in threads.workers.values()}) == 1


def test_who_missed_a_round_is_in_again_soon(tmp_path: Path) -> None:
    """A worker that was away while the others completed rounds misses the one under way, and that one alone: with
    overlap it does not go on one round behind for ever."""
    changes = {
        "exchange__matchmaking_s": 2.0,
        "train__inner_steps": 16,
    }  # long rounds: it has the time to come in
    manifest = quick_manifest(exchange__overlap="eager", exchange__start_workers=3, **changes)
    with swarm_of(manifest, tmp_path) as threads:
        for name in ("a", "b"):
            threads.start(name, max_rounds=12, max_tokens_per_s=1000)
        away = threads.start("c", max_rounds=12, max_tokens_per_s=1000)
        run_round = away.exchange.run_round

        def frozen(**contribution: Any) -> Any:
            if contribution["round"] == 3:
                until = time.monotonic() + 60
                while threads.workers["a"].outer.round < 7 and time.monotonic() < until:
                    time.sleep(0.01)
            return run_round(**contribution)

        away.exchange.run_round = frozen  # type: ignore[method-assign]
        threads.join()
        assert_one_theta(threads, 1)
        missed = threads.events("c", "resync")
        mine = [e["round"] for e in threads.events("c", "round") if e["own_included"]]
        assert 1 <= len(missed) <= 2, missed
        back = min(number for number in mine if number > 4)
        assert back <= missed[-1]["round"] + 2, (mine, missed)
        assert len([number for number in mine if number > back]) >= 12 - back - 2


def test_nobody_waits_for_who_comes_back_in_the_middle_of_a_round(tmp_path: Path) -> None:
    """A worker that is started again from its checkpoint, behind which nobody is, ends its first round with the others:
    with all of its inner steps it would keep them waiting, or come too late and be a round behind for the next too."""
    manifest = quick_manifest(exchange__start_workers=3, train__inner_steps=16)
    pace: dict[str, Any] = {"max_rounds": 5, "max_tokens_per_s": 400}
    with swarm_of(manifest, tmp_path) as threads:
        for name in ("a", "b"):
            threads.start(name, **pace)
        threads.start("c", **{**pace, "max_rounds": 2})
        threads.threads[-1].join(60)
        again = threads.prepare("c", **pace)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            step = threads.events("a", "step")[-1]
            if step["round"] == 2 and step["step"] >= 8:
                break
            time.sleep(0.01)
        threads.begin("c")
        threads.join()
        assert again.outer.round == 5 and not threads.events("c", "resync")
        assert [e["source"] for e in threads.events("c", "joined")] == ["fresh", "checkpoint"]
        rounds = {e["round"]: e for e in threads.events("c", "round")}
        assert rounds[3]["own_included"] and rounds[3]["round_tokens"] < 16 * 64
        assert rounds[4]["round_tokens"] == rounds[5]["round_tokens"] == 16 * 64
        assert_one_theta(threads, 5)


def test_overlap_is_deterministic(tmp_path: Path) -> None:
    """With overlap the average is swapped in at a fixed point, so two equal runs end with the same theta."""
    manifest = quick_manifest(exchange__overlap="eager", exchange__start_workers=2)
    ends = []
    for attempt in ("first", "second"):
        (tmp_path / attempt).mkdir()
        with swarm_of(manifest, tmp_path / attempt) as threads:
            for name in ("a", "b"):
                threads.start(name, max_rounds=5)
            threads.join()
            ends.append(threads.events("a", "stop")[0]["digest"])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("overlap", ["none", "eager"])
def test_a_round_ends_when_the_swarm_has_its_tokens(overlap: str, tmp_path: Path) -> None:
    """With a token target a slow worker does fewer inner steps, its weight is smaller, and nobody waits for it."""
    manifest = quick_manifest(
        exchange__overlap=overlap, exchange__start_workers=2, exchange__round_tokens=64 * 25
    )
    with swarm_of(manifest, tmp_path) as threads:
        threads.start("fast", max_rounds=4, max_tokens_per_s=64 * 16)
        threads.start("slow", max_rounds=4, max_tokens_per_s=64 * 4)
        threads.join()
        assert_one_theta(threads, 4)
        fast, slow = threads.events("fast", "round"), threads.events("slow", "round")
        assert all(len(e["contributors"]) == 2 for e in fast)
        assert all(e["round_tokens"] >= 64 for e in slow)
        assert sum(e["round_tokens"] for e in fast) > 2 * sum(e["round_tokens"] for e in slow)
        for mine, other in zip(fast, slow):
            assert mine["round_tokens"] + other["round_tokens"] >= 64 * 25 * 0.8
            assert mine["round_tokens"] + other["round_tokens"] <= 64 * 25 * 1.5


@pytest.mark.parametrize("overlap", ["none", "eager"])
def test_what_was_not_delivered_is_in_the_error_feedback(overlap: str, tmp_path: Path) -> None:
    """A lost section goes back to its sender's feedback: what was produced = what was delivered + what is kept."""
    manifest = quick_manifest(
        exchange__overlap=overlap, exchange__start_workers=2, strategy__feedback_decay=1.0
    )
    lost = Faults(sections=frozenset({(1, "a", "b")}), spans=frozenset({(2, "a")}))
    with swarm_of(manifest, tmp_path, lost) as threads:
        produced: dict[str, torch.Tensor] = {}
        for name in ("a", "b"):
            record_deltas(threads.start(name, max_rounds=4), produced)
        threads.join()
        assert_one_theta(threads, 4)
        start = GPT(manifest.model, seed=manifest.train.seed)
        moved = FlatParameters(start).flat - threads.workers["a"].outer.state.theta_flat
        # Theta moved by the weighted means. Where every section arrived both weights were one half; what a lost
        # section would have moved is still in the feedback, whole, so the sums agree only where nothing was lost
        # in a span with one contributor. Rounds 1 and 2 lost a's part of b's span and all of a's span.
        kept = sum((dense_feedback(worker) for worker in threads.workers.values()), torch.zeros_like(moved))
        total = sum(produced.values(), torch.zeros_like(moved))
        difference = (total - kept) - 2 * moved
        alone = delivered_alone(threads)
        torch.testing.assert_close(difference, -alone, atol=2e-5, rtol=0)


def record_deltas(worker: Worker, produced: dict[str, torch.Tensor]) -> None:
    """Sum up every delta that a worker puts into its error feedback."""
    encode = worker.feedback.encode

    def recording(contribution: Any, round: int) -> bytes:
        delta = torch.cat([tensor.flatten() for tensor in contribution])
        produced[worker.report.name] = produced.get(worker.report.name, torch.zeros_like(delta)) + delta
        return encode(contribution, round)

    worker.feedback.encode = recording  # type: ignore[method-assign]


def dense_feedback(worker: Worker) -> torch.Tensor:
    """The error feedback in the parameters' own order."""
    codec = worker.codec
    whole = Codec(replace(codec.spec, k=codec.spec.chunk, value_bits=16, dense_bits=32), codec.shapes)
    payload = whole.encode(
        [torch.zeros(shape) for _, shape in codec.shapes],
        worker.feedback.state_dict()["feedback"].clone(),
        decay=1.0,
        run=bytes(8),
        round=0,
    )
    aggregate = whole.reduce(
        [(0, 1.0, payload)], run=bytes(8), round=0, first_chunk=0, num_chunks=whole.num_chunks
    )
    return torch.cat([tensor.flatten() for tensor in whole.decode([aggregate])])


def delivered_alone(threads: Threads) -> torch.Tensor:
    """What moved theta with full weight because the other contribution of its span was lost (b's part in round 1)."""
    worker = threads.workers["a"]
    past = MemoryExchange(threads.swarm, "observer").fetch_round(1)
    assert past is not None
    total = torch.zeros_like(worker.outer.state.theta_flat)
    for aggregate in past.aggregates:
        if len(worker.codec.contributors(aggregate)) == 1:
            total += torch.cat([tensor.flatten() for tensor in worker.codec.decode([aggregate])])
    assert total.abs().sum() > 0
    return total
