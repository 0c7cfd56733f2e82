"""The worker loop. It reads as DESIGN.md's picture of the data flow:

manifest -> data stream -> inner steps -> delta -> payload -> exchange -> aggregate -> outer step -> checkpoint
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtrain.compression.codec import Codec
from dtrain.trainer.catchup import catch_up
from dtrain.trainer.checkpoint import Checkpoint, CheckpointStore, pack
from dtrain.trainer.data import open_corpus
from dtrain.trainer.errors import RunError
from dtrain.trainer.exchange import ABSENT, ALONE, DONE, NO_GROUP, Exchange, Outcome
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.inner import InnerLoop, evaluate
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.metrics import MetricsLog
from dtrain.trainer.model import GPT
from dtrain.trainer.outer import OuterState
from dtrain.trainer.reporting import Reporter, Say
from dtrain.trainer.settings import MachineSettings, resolve_device
from dtrain.trainer.strategies import make_strategy

POLL_S = 0.1
FINISH_S = 20.0  # longest stay after our last round for workers that still need it from us


@dataclass(frozen=True)
class Training:
    """What one round's inner steps gave."""

    tokens: int
    loss: float


@dataclass(frozen=True)
class SharedState:
    """What newcomers get from us; see `exchange.State`."""

    round: int
    work: float
    digest: bytes
    blob: bytes


class Worker:
    """Trains one run on one machine. `prepare` first, then `run` once the exchange has opened the run."""

    def __init__(
        self, manifest: Manifest, settings: MachineSettings, exchange: Exchange, metrics: MetricsLog, say: Say
    ):
        self.manifest, self.settings, self.exchange = manifest, settings, exchange
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) - 1))
        device = resolve_device(settings.device)
        torch.manual_seed(manifest.train.seed)
        self.model = GPT(manifest.model, seed=manifest.train.seed).to(device)
        self.local = FlatParameters(self.model)
        self.outer = OuterState(self.local.flat.detach().cpu().clone())
        self.theta = self.local.views(self.outer.theta_flat)
        self.codec = Codec(manifest.codec, self.local.shapes)
        self.strategy = make_strategy(manifest, self.codec)
        self.inner = InnerLoop(self.model, manifest.train)
        self.corpus = open_corpus(manifest.data, settings.data)
        self.store = CheckpointStore(settings.folder / "checkpoints", settings.keep_checkpoints)
        self.report = Reporter(settings.name, str(device), metrics, exchange, self.outer, say)
        self._stop_asked = threading.Event()
        self._stop_reason = "all rounds done"
        self._state_lock = threading.Lock()  # theta and its round change together

    def stop(self, reason: str) -> None:
        """Ask the loop to end after the inner step or the exchange that is under way. Safe from any thread."""
        self._stop_reason = reason
        self._stop_asked.set()

    @property
    def stop_asked(self) -> bool:
        return self._stop_asked.is_set()

    def run(self) -> None:
        """Join the run, train round after round, leave."""
        self._join()
        while not self._is_over():
            training = self._train()
            if not training.tokens:
                break
            payload = self._encode()
            outcome = self._exchange(payload, training)
            self._apply(outcome, payload, training)
            self._keep(outcome)
        self._leave()

    # ------------------------------------------------------------------ joining

    def _join(self) -> None:
        began, source = time.monotonic(), "fresh"
        self.report.state("joining")
        checkpoint = self.store.newest(self.manifest.hash)
        if checkpoint is not None:
            self._restore(checkpoint)
            source = "checkpoint"
        self._stands_at(self.outer.round, self.outer.tokens)
        self.exchange.serve_state(self._shared_state)
        if catch_up(self, self.report.say):
            source = "peers"
        self.local.flat.copy_(self.outer.theta_flat)
        self.report.joined(source, began)
        self.report.state("waiting")
        if self.settings.eval_every:
            self._evaluate()
        self._wait_for_start()

    def _wait_for_start(self) -> None:
        """Round 0 begins when the manifest's number of workers is there."""
        wanted, said = self.manifest.exchange.start_workers, -1
        while self.outer.round == 0 and not self._stop_asked.is_set():
            here = 1 + sum(view.status["state"] not in ABSENT for view in self.exchange.swarm())
            if here >= wanted or any(int(str(view.status["round"])) > 0 for view in self.exchange.swarm()):
                return
            if here != said:
                self.report.say(f"Waiting for workers: {here} of {wanted} are here.")
                said = here
            time.sleep(POLL_S)

    # ------------------------------------------------------------------ one round, stage by stage

    def _train(self) -> Training:
        """Inner steps on this worker's part of the data, from theta."""
        self.report.state("training")
        config = self.manifest.train
        batches = self.corpus.batches(
            seed=config.seed,
            run_id=self.manifest.run_id,
            round=self.outer.round,
            peer_id=self.exchange.peer_id,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
        )
        began, tokens, losses = time.monotonic(), 0, []
        for step in range(config.inner_steps):
            if self._stop_asked.is_set():
                break
            x, y = next(batches)
            loss = self.inner.step(x, y, self.outer.round * config.inner_steps + step)
            losses.append(loss)
            tokens += y.numel()
            rate = tokens / (time.monotonic() - began)
            self.report.step(step + 1, config.inner_steps, loss.item, y.numel(), rate)
        mean_loss = float(torch.stack(losses).mean()) if losses else 0.0
        if self._stop_asked.is_set() and losses:
            self._set_aside()
            return Training(0, mean_loss)
        return Training(tokens, mean_loss)

    def _encode(self) -> bytes:
        """The delta and the error feedback become a payload; what the payload leaves out stays in the feedback."""
        return self.strategy.encode(self.theta, self.local.views(self.local.flat.cpu()), self.outer.round)

    def _exchange(self, payload: bytes, training: Training) -> Outcome:
        """Give the payload to the round's group and get the aggregates; try again while no group forms."""
        self.report.state("exchanging")
        while True:
            outcome = self.exchange.run_round(
                round=self.outer.round,
                base_digest=self.report.digest,
                payload=payload,
                weight=float(training.tokens),
            )
            if outcome.verdict != NO_GROUP or self._stop_asked.is_set():
                return outcome
            self.report.say(outcome.problem)

    def _apply(self, outcome: Outcome, payload: bytes, training: Training) -> None:
        """The outer step. What of our payload is in no aggregate goes back into the error feedback."""
        if outcome.verdict not in (DONE, ALONE):
            self.strategy.give_back(payload, [(0, self.codec.num_chunks)])
            if outcome.verdict != NO_GROUP:
                catch_up(self, self.report.say)
                self.report.resync("missed a round; its work is kept for the next")
        else:
            self.strategy.give_back(payload, outcome.undelivered)
            all_tokens = self.outer_step(outcome.aggregates)
            self.report.round_done(
                outcome,
                loss=training.loss,
                own_tokens=training.tokens,
                all_tokens=all_tokens,
                payload_bytes=len(payload),
            )
        self.local.flat.copy_(self.outer.theta_flat)

    def _keep(self, outcome: Outcome) -> None:
        """Evaluate and checkpoint when it is time."""
        if outcome.verdict not in (DONE, ALONE):
            return
        self.report.announce()
        if self.settings.eval_every and self.outer.round % self.settings.eval_every == 0:
            self._evaluate()
        if self.outer.round % self.settings.checkpoint_every == 0:
            self._checkpoint()

    # ------------------------------------------------------------------ the outer state

    def outer_step(self, aggregates: Sequence[bytes]) -> int:
        """Theta of this round becomes theta of the next; returns the tokens that went into it."""
        with self._state_lock:
            self.strategy.apply(self.theta, aggregates)
            weights = [sum(w for _, w in self.codec.contributors(a)) for a in aggregates]
            tokens = int(max(weights, default=0.0))
            self._stands_at(self.outer.round + 1, self.outer.tokens + tokens)
        return tokens

    def replace_state(self, state: Checkpoint) -> None:
        """Take over what a donor gave: theta, its round, and what the strategy shares."""
        theta = state.tensors["theta"]
        if theta.shape != self.outer.theta_flat.shape or state.manifest_hash != self.manifest.hash:
            raise RunError("a donor sent the weights of another run")
        with self._state_lock:
            self.outer.theta_flat.copy_(theta)
            self.strategy.load_shared_state(_part(state, "shared"))
            self._stands_at(state.round, state.tokens)

    def _stands_at(self, round: int, tokens: int) -> None:
        self.outer.round, self.outer.tokens = round, tokens
        self.report.digest = self.outer.digest()

    def _shared_state(self) -> SharedState:
        """Called from the exchange's thread when a newcomer asks."""
        with self._state_lock:
            outer, digest = self.outer, self.report.digest
            tensors = {"theta": outer.theta_flat, **_named("shared", self.strategy.shared_state())}
            blob = pack(Checkpoint(outer.round, outer.tokens, digest, self.manifest.hash, tensors))
            return SharedState(outer.round, float(outer.tokens), digest, blob)

    def _checkpoint(self) -> None:
        tensors = {
            "theta": self.outer.theta_flat,
            **_named("shared", self.strategy.shared_state()),
            **_named("strategy", self.strategy.state_dict()),
            **_named("inner", self.inner.state_dict()),
        }
        outer, digest = self.outer, self.report.digest
        extra = {"own_tokens": self.report.tokens}
        checkpoint = Checkpoint(outer.round, outer.tokens, digest, self.manifest.hash, tensors, extra)
        try:
            self.store.save(checkpoint)
        except RunError as error:  # a full disk must not end the training
            self.report.say(f"{error}; training goes on, the previous checkpoint is intact")

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.replace_state(checkpoint)
        self.strategy.load_state_dict(_part(checkpoint, "strategy"))
        self.inner.load_state_dict(_part(checkpoint, "inner"))
        self.report.tokens = int(checkpoint.extra.get("own_tokens", 0))

    def _evaluate(self) -> None:
        self.report.evaluated(evaluate(self.model, self.corpus, self.manifest.data, self.manifest.train))

    # ------------------------------------------------------------------ leaving

    def _set_aside(self) -> None:
        """Stopped between two exchanges: what was trained goes into the error feedback, hence into the checkpoint."""
        local = self.local.views(self.local.flat.cpu())
        self.strategy.absorb([theta - mine for theta, mine in zip(self.theta, local)])
        self.local.flat.copy_(self.outer.theta_flat)

    def _is_over(self) -> bool:
        done = self.settings.max_rounds and self.outer.round >= self.settings.max_rounds
        return self._stop_asked.is_set() or bool(done)

    def _leave(self) -> None:
        if not self._stop_asked.is_set():
            self._finish()
        self.report.state("leaving")
        self._checkpoint()
        self.report.stopped(self._stop_reason)

    def _finish(self) -> None:
        """Stay a moment for those that missed our last round and need it, or our state, to catch up."""
        self.report.state("finished")
        until = time.monotonic() + FINISH_S
        while time.monotonic() < until and not self._stop_asked.is_set():
            behind = [
                view
                for view in self.exchange.swarm()
                if view.status["state"] not in ABSENT and float(str(view.status["work"])) < self.outer.tokens
            ]
            if not behind:
                return
            time.sleep(POLL_S)


def _named(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in checkpoint.tensors.items() if name.startswith(start)}
