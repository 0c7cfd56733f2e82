"""One simulated run: real workers in virtual time over an in-memory exchange with modelled links."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.compression.codec import Codec
from dtrain.experiments.attacks import Attack
from dtrain.experiments.memory import MemorySwarm
from dtrain.experiments.network import ModelledLinks
from dtrain.experiments.results import Row
from dtrain.experiments.sim_config import AttackConfig
from dtrain.experiments.sim_file import RunSpec
from dtrain.experiments.sim_rounds import RoundLog
from dtrain.experiments.virtual_time import Actor, VirtualClock, VirtualCondition
from dtrain.trainer.data import Corpus
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import evaluate
from dtrain.trainer.model import GPT
from dtrain.trainer.settings import MachineSettings
from dtrain.trainer.worker import Worker

KEPT_ROUNDS = 8
"""Past rounds that can be replayed. Few, as dense aggregates are large; whoever misses more downloads theta."""


class VirtualWorker:
    """A worker, its exchange and its line of work."""

    def __init__(self, name: str, simulation: Simulation, settings: MachineSettings, corpus: Corpus) -> None:
        self.name, self._log, self._clock = name, simulation.log, simulation.clock
        self.exchange = simulation.attack.exchange_of(simulation.swarm, name)
        self.worker = Worker(
            simulation.manifest,
            settings,
            self.exchange,
            self,
            lambda _: None,
            clock=self._clock,
            corpus=corpus,
        )
        self.actor: Actor | None = None
        self._on_end = simulation.ended
        self._log.begins(name)

    def write(self, event: str, **fields: Any) -> None:
        """See `Metrics`."""
        now_s, tokens = self._clock.monotonic(), self.worker.outer.tokens
        if event == "round":
            self._log.round_done(now_s, self.name, fields, tokens)
        elif event == "eval":
            self._log.evaluated(now_s, fields["round"], fields["eval_loss"], tokens)

    def run(self) -> None:
        """Train to the end, then go."""
        self.worker.run()
        self._log.traffic(self.name, *self.exchange.traffic())
        self.exchange.close()
        self._on_end()


class Simulation:
    """A virtual swarm that trains one manifest for a number of rounds."""

    def __init__(self, spec: RunSpec, corpus: Corpus, folder: Path, write: Callable[[Row], None]) -> None:
        self.spec, self.manifest, self._corpus, self._folder = spec, spec.manifest, corpus, folder
        self.clock = VirtualClock()
        shapes = FlatParameters(GPT(self.manifest.model)).shapes
        codec = Codec(self.manifest.codec, shapes)
        self.num_params = codec.num_params
        train = self.manifest.train
        self.log = RoundLog(codec.num_params, train.batch_size * train.seq_len, spec.rounds, write)
        self._links = ModelledLinks(codec.num_params)
        self._names = [worker_name(index) for index in range(spec.simulate.workers)]
        hostile = self._names[spec.simulate.workers - spec.attack.attackers :]
        self.attack = Attack(
            codec,
            self.manifest.run_tag,
            spec.attack.kind,
            hostile,
            spec.seed,
            one_network=spec.attack.one_network,
        )
        self.swarm = MemorySwarm(
            self.manifest,
            codec,
            self.attack.faults,
            clock=self.clock,
            changed=VirtualCondition(self.clock),
            links=self._links,
            kept_rounds=KEPT_ROUNDS,
            observe=self.log.reduced,
            tamper=self.attack.tamper,
            network_of=self.attack.network_of,
            audits=spec.attack.audits and self.manifest.exchange.screens,
        )
        self._present: dict[str, VirtualWorker] = {}
        self._num_born = 0

    def run(self, names: Sequence[str] = ()) -> Row:
        """Train to the last round; the run's row. `names` stand for worker-001 and so on (the data depends on them)."""
        names = names or self._names
        for name in names:
            self._begin(name)
        first = self._present[names[0]]
        self._begin_churn(first)
        self.clock.run()
        self._evaluate_last(first.worker)
        return self._row(self.log.finish())

    def ended(self) -> None:
        """A worker is done: nobody is left for hostile ones that are put out to wait for."""
        honest = [v for name, v in self._present.items() if name not in self.attack.attackers]
        if not any(v.worker.outer.round < self.spec.rounds for v in honest):
            for name in self.attack.attackers & self._present.keys():
                self._present[name].worker.stop("the run is over")

    def _evaluate_last(self, worker: Worker) -> None:
        """A worker that fetched the last round from others has not evaluated it."""
        outer = worker.outer
        if self.log.lacks_evaluation(outer.round):
            worker.local.flat.copy_(outer.state.theta_flat)
            loss = evaluate(worker.model, self._corpus, self.manifest.data, self.manifest.train)
            self.log.evaluated(0.0, outer.round, round(loss, 6), outer.tokens)

    def _begin_churn(self, first: VirtualWorker) -> None:
        if self.spec.churn.joins_per_hour or self.spec.churn.leaves_per_hour:
            self.clock.spawn("churn", lambda: self._churn(first))

    def _begin(self, name: str) -> None:
        index, spec = self._num_born, self.spec
        links, speeds = spec.network.links, spec.machines.speeds
        self._links.add(name, links[index % len(links)])
        step_s = spec.machines.step_time_s / speeds[index % len(speeds)]
        settings = MachineSettings(
            name,
            self._folder,
            device="cpu",
            threads=1,
            precision=spec.machines.precision,
            max_tokens_per_s=self.manifest.train.batch_size * self.manifest.train.seq_len / step_s,
            max_rounds=spec.rounds,
            eval_every=spec.eval_every if index == 0 else 0,  # theta is one: once is enough
            checkpoint_every=0,
        )
        data = self.attack.data_of(name, self._part_of_data(index))
        virtual = VirtualWorker(name, self, settings, data)
        virtual.actor = self.clock.spawn(name, virtual.run, self.clock.monotonic())
        self._present[name] = virtual
        self._num_born += 1

    def _part_of_data(self, index: int) -> Corpus:
        """What a worker trains on."""
        if self.spec.simulate.data == "shared":
            return replace(self._corpus, is_common=True)  # one machine, one text
        parts, length = self.spec.simulate.workers, len(self._corpus.train)
        begin = length * (index % parts) // parts
        return Corpus(self._corpus.train[begin : begin + length // parts], self._corpus.eval, is_common=False)

    def _row(self, outcome: Row) -> Row:
        spec, manifest = self.spec, self.manifest
        return {
            "id": spec.id,
            "label": spec.label,
            "strategy": manifest.strategy.name,
            "workers": spec.simulate.workers,
            "seed": spec.seed,
            "profile": spec.network.profile,
            "overlap": manifest.exchange.overlap,
            "inner_steps": manifest.train.inner_steps,
            "num_params": self.num_params,
            **outcome,
            **(self.log.sentences(self.attack.attackers) if spec.attack != AttackConfig() else {}),
            "settings": dict(spec.settings),
        }

    # ------------------------------------------------------------------ churn

    def _churn(self, first: VirtualWorker) -> None:
        """Let workers come and go, by a schedule that the seed alone decides, until the first worker is done."""
        draws, churn = random.Random(f"churn {self.spec.seed}"), self.spec.churn
        while True:
            leaving = [v for v in self._present.values() if v is not first and not _is_over(v)]
            rate = (churn.joins_per_hour + churn.leaves_per_hour * len(leaving)) / 3600
            self.clock.sleep(draws.expovariate(rate) if rate else 60.0)
            if _is_over(first):
                break
            if draws.random() * rate * 3600 < churn.joins_per_hour:
                self._begin(worker_name(self._num_born))
                continue
            leaving = [v for v in leaving if not _is_over(v)]
            if leaving:
                self._remove(draws.choice(leaving), crash=draws.random() < churn.crash_share)
        for virtual in self._present.values():  # newcomers that found nobody any more
            virtual.worker.stop("the run is over")

    def _remove(self, virtual: VirtualWorker, *, crash: bool) -> None:
        del self._present[virtual.name]
        if not crash:
            virtual.worker.stop("churn")
            return
        self.swarm.kill(virtual.name)
        self.log.traffic(virtual.name, *virtual.exchange.traffic())
        assert virtual.actor is not None
        self.clock.kill(virtual.actor)


def _is_over(virtual: VirtualWorker) -> bool:
    return virtual.actor is not None and virtual.actor.greenlet.dead


def worker_name(index: int) -> str:
    """Names sort in the order of birth."""
    return f"worker-{index + 1:04d}"


def simulate(spec: RunSpec, corpus: Corpus, write: Callable[[Row], None]) -> Row:
    """Simulate one run; `write` gets a line per round. The row has all that summary.json says of it."""
    with tempfile.TemporaryDirectory(prefix="dtrain-sim-") as folder:
        return Simulation(spec, corpus, Path(folder), write).run()
