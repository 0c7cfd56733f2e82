"""The worker loop. It reads as DESIGN.md's picture of the data flow:

manifest -> data stream -> inner steps -> delta -> payload -> exchange -> aggregate -> outer step -> checkpoint
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.audit import AuditedFeedback
from dtrain.trainer.catchup import catch_up
from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.control import Control
from dtrain.trainer.data import Data, open_data
from dtrain.trainer.delivery import Delivery, Training
from dtrain.trainer.download import DownloadReport
from dtrain.trainer.duty import Duty
from dtrain.trainer.exchange import ALONE, DONE, NO_GROUP, Exchange, Outcome
from dtrain.trainer.feed import Feed
from dtrain.trainer.feedback import ErrorFeedback, Feedback
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.gathering import stay_for_the_rest, wait_for_start
from dtrain.trainer.inner import evaluate, make_inner
from dtrain.trainer.journal import Books, Journal
from dtrain.trainer.keeping import Keeper
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.metrics import Metrics
from dtrain.trainer.models import ModelPlace, build_model
from dtrain.trainer.outer_loop import OuterLoop
from dtrain.trainer.pacing import Pacer
from dtrain.trainer.recheck import Recheck
from dtrain.trainer.replicas import make_compute
from dtrain.trainer.reporting import Reporter, Say
from dtrain.trainer.sampling import Sampler, write_sample
from dtrain.trainer.settings import MachineSettings, resolve_devices
from dtrain.trainer.strategies import make_strategy


class Worker:
    """Trains one run on one machine."""

    def __init__(
        self,
        manifest: Manifest,
        settings: MachineSettings,
        exchange: Exchange,
        metrics: Metrics,
        say: Say,
        *,
        clock: Clock = SYSTEM_CLOCK,
        corpus: Data | None = None,
        control: Control | None = None,
        journal: Journal | None = None,
    ):
        """`corpus` stands in for the manifest's data, which is otherwise read from this machine's disk."""
        self.manifest, self.settings, self.exchange, self.clock = manifest, settings, exchange, clock
        self.control = control or Control()
        self.control.stop_worker, self.control.used_bytes = self.stop, exchange.wire_bytes
        self._stop = threading.Event()
        self._stop_reason = "all rounds done"
        device, *others = resolve_devices(settings.device)
        self.duty = Duty(settings, self.control, device, self._stop, clock)
        torch.manual_seed(manifest.train.seed)
        self.model = build_model(manifest, ModelPlace(device, settings.model, settings.trusted))
        self.local = FlatParameters(self.model)
        self.codec = Codec(manifest.codec, self.local.shapes)
        self.strategy = make_strategy(manifest, self.local.shapes)
        self.feedback: Feedback = ErrorFeedback(manifest, self.codec)
        if settings.audit:
            self.feedback = AuditedFeedback(
                self.feedback,
                self.codec,
                manifest.strategy.feedback_decay,
                lambda error, scale: metrics.write("audit", error=error, scale=scale),
            )
        self.outer = OuterLoop(manifest, self.local, self.codec, self.strategy)
        self.books = Books(journal, self.outer, self.codec)
        self.compute = make_compute(
            self.model,
            others,
            precision=settings.precision,
            micro_batch=settings.micro_batch,
            recompute=settings.recompute,
            compile=settings.compile,
            say=say,
        )
        self.inner = make_inner(self.model, manifest.train, self.strategy.collects, self.compute)
        self.corpus = corpus or open_data(manifest, settings.data, settings.tokenizer, say, self._stop)
        self.feed = Feed(manifest, self.corpus, exchange, clock)
        self.pacer = Pacer(manifest, exchange, clock)
        self.report = Reporter(settings.name, str(device), metrics, exchange, self.outer, say, clock)
        self.report.feed = self.feed
        self.keeper = Keeper(
            settings, exchange, self.outer, self.feedback, self.inner, self.report, self.books, self.codec
        )
        self.recheck = Recheck(
            manifest, self.model, self.local, self.outer, self.corpus, self.feed, exchange, self.report, clock
        )
        # Nobody waits for who is joining: a download may take longer than many rounds.
        self.download = DownloadReport(metrics, say, clock, lambda: self.report.state("joining"))
        self._overlaps = manifest.exchange.overlap == "eager"
        self.sampler = Sampler()
        self._courier = clock.courier()
        self._delivery: Delivery | None = None

    def stop(self, reason: str) -> None:
        """Ask the loop to end after the inner step or the exchange that is under way. Safe from any thread."""
        self._stop_reason = reason
        self._stop.set()

    @property
    def stop_asked(self) -> bool:
        return self._stop.is_set()

    def run(self) -> None:
        """Join the run, train round after round, leave."""
        self._join()
        while not self._is_over():
            if self.control.held():
                self._hold()
                continue
            training = self._train()
            # With overlap the exchange of the round before ends here, under this round's steps.
            if not self._settle():
                continue  # this round was begun on a theta that is not the others': its work is set aside already
            if self._stop.is_set():
                self._set_aside()
                break
            self._deliver(self._encode(training), training)
            self.recheck.look()  # while the payload is under way
            if not self._overlaps:
                self._settle()
        self._settle()
        self._leave()

    # ------------------------------------------------------------------ joining

    def _join(self) -> None:
        began, source = self.clock.monotonic(), "fresh"
        self.report.state("joining")
        if self.keeper.restore(self.manifest.hash):
            source = "checkpoint"
        self.report.announce()
        self.exchange.serve_state(self.outer.give)
        if self._catch_up():
            source = "peers"
        self.pacer.came_late = source != "fresh"
        self.keeper.forget_delivered()
        self.local.flat.copy_(self.outer.state.theta_flat)
        self.report.joined(source, began)
        self.report.state("waiting")
        if self.settings.eval_every and source == "fresh":  # the others have told theirs
            self._evaluate()
        wanted = self.manifest.exchange.start_workers
        wait_for_start(wanted, self.outer, self.exchange, self._stop, self.clock, self.report.say)

    def _catch_up(self) -> bool:
        """Stand where the others stand; True if anything had to be fetched."""
        fetched = catch_up(self.outer, self.exchange, self.download, self.clock)
        self.books.note("stands")
        self.keeper.forget_what_others_have()
        return fetched

    def _hold(self) -> None:
        """Stand aside, with nothing under way, until this machine may train again; others still get state from us, but
        where it is our traffic that is used up."""
        self._settle()
        self.keeper.save()
        self.report.state("paused")
        if self.duty.hold(self._is_over, self._say_held):
            self._catch_up()
            self.local.flat.copy_(self.outer.state.theta_flat)
            self.pacer.came_late = True

    def _say_held(self, text: str) -> None:
        """Why we hold now, or that we go on."""
        self.report.gives = not self.control.spent
        self.report.announce()
        self.report.say(text)

    # ------------------------------------------------------------------ one round, stage by stage

    def _train(self) -> Training:
        """Inner steps on this worker's part of the data, until the round is over for it."""
        round = self.outer.round + (self._delivery is not None)
        pace = self.report.begin_round(round)
        losses = []
        for x, y in self.feed.batches(round):
            if self._stop.is_set() or self.pacer.is_over(pace):
                break
            if pace.steps and self.control.held():
                self.duty.sit_out(self.pacer, pace)
                break
            began = self.clock.monotonic()
            losses.append(self.inner.step(x, y, round * self.manifest.train.inner_steps + pace.steps))
            self.duty.rest(pace, y.numel(), began)
            self.report.step(pace, losses[-1].item, y.numel(), self.pacer)
        loss = float(torch.stack(losses).mean()) if losses else 0.0
        self.report.end_training(pace)
        return Training(round, pace.tokens, loss)

    def _encode(self, training: Training) -> bytes:
        """The contribution, the error feedback and a part of what we owe as a reducer become a payload; the feedback
        keeps what it leaves out."""
        made = self.inner.contribution(self.outer.state.theta_flat, self.local)
        self.keeper.pay(made, training.tokens)
        return self.feedback.encode(made, training.round)

    def _deliver(self, payload: bytes, training: Training) -> None:
        """Hand the payload to the courier, which takes it into the exchange."""
        if not self._overlaps:
            self.report.state("exchanging")
        digest = self.outer.digest
        self.keeper.made(payload, training.round)
        self.books.made(payload, training.round, digest, training.tokens)
        outcome = self._courier.submit(self._exchange, payload, training, digest)
        base = self.local.flat.clone() if self._overlaps else self.local.flat  # without, they stay there
        self._delivery = Delivery(payload, training, base, outcome)

    def _exchange(self, payload: bytes, training: Training, digest: bytes) -> Outcome:
        """In the courier's thread: meet the round's group; try again while no group forms."""
        while True:
            outcome = self.exchange.run_round(
                round=training.round, base_digest=digest, payload=payload, weight=float(training.tokens)
            )
            if outcome.verdict != NO_GROUP or self._stop.is_set():
                return outcome
            self.report.say(outcome.problem)

    def _settle(self) -> bool:
        """Wait for the exchange under way and take the outer step; False if we missed it and stand elsewhere now.

        What of our payload is in no aggregate goes back into the error feedback. The local weights move by what the
        outer step changed under them; without overlap that makes them theta exactly.
        """
        if self._delivery is None:
            return True
        delivery, self._delivery = self._delivery, None
        outcome = self.report.waiting_for(delivery.outcome)
        if outcome.verdict in (DONE, ALONE):
            self.feedback.give_back(delivery.payload, outcome.undelivered)
            self.keeper.settled(delivery.training.round, outcome.undelivered, outcome.aggregates)
            self.keeper.take_over_residual()
            all_tokens = self.outer.step(outcome.aggregates)
            self.books.settled(outcome, delivery.payload, outcome.undelivered)
            self._move_local(delivery.base)
            self.pacer.came_late = False
            self.report.round_done(outcome, delivery.training, all_tokens, len(delivery.payload))
            self.recheck.ask(outcome, delivery.training, delivery.payload)
            self._keep()
            return True
        everything = [(0, self.codec.num_chunks)]
        self.feedback.give_back(delivery.payload, everything)
        self.keeper.settled(delivery.training.round, everything)
        self.books.settled(outcome, delivery.payload, everything)
        self._set_aside(delivery.base)
        if outcome.verdict != NO_GROUP:
            self.outer.was_refused(caught_up=self._catch_up())
            self.pacer.came_late = True
            self.report.resync("missed a round; its work is kept for the next")
        self.local.flat.copy_(self.outer.state.theta_flat)
        return False

    def _move_local(self, base: Tensor) -> None:
        """Local weights, at `base` when their payload left, now build on the new theta."""
        theta = self.outer.state.theta_flat.to(base.device)
        if self._overlaps:
            self.local.flat.add_(theta - base)
        else:
            self.local.flat.copy_(theta)

    def _keep(self) -> None:
        """Evaluate and checkpoint when it is time."""
        every, round = self.settings.eval_every, self.outer.round
        if every and (round % every == 0 or round == self.settings.max_rounds):
            self._evaluate()
        self.keeper.save_if_due()

    # ------------------------------------------------------------------ helpers of the stages

    def _set_aside(self, base: Tensor | None = None) -> None:
        """What was trained since `base` (or theta) and is in no payload goes into the error feedback."""
        since = self.outer.state.theta_flat if base is None else base
        self.feedback.absorb(self.inner.contribution(since, self.local))
        self.local.flat.copy_(self.outer.state.theta_flat)

    def _evaluate(self) -> None:
        """Loss of theta; under overlap the local weights make room for it."""
        kept = self.local.flat.clone()
        self.local.flat.copy_(self.outer.state.theta_flat)
        self.report.evaluated(evaluate(self.model, self.corpus, self.manifest.data, self.manifest.train))
        writes = self.settings.sample_text and self.outer.round > 0  # the first weights write noise
        if writes and self.sampler.is_due(self.exchange, self.clock.monotonic()):
            self.report.sampled(
                *write_sample(self.model, self.corpus, self.outer.round, self.manifest.model.seq_len)
            )
        self.local.flat.copy_(kept)

    # ------------------------------------------------------------------ leaving

    def _is_over(self) -> bool:
        rounds = self.outer.round + (self._delivery is not None)
        if self._stop.is_set() or self.control.finishing:
            return True
        return bool(self.settings.max_rounds and rounds >= self.settings.max_rounds)

    def _leave(self) -> None:
        if not self._stop.is_set():
            self.report.state("finished")
            stay_for_the_rest(self.outer, self.exchange, self._stop, self.clock)
        self.report.state("leaving")
        self.keeper.save(leaving=True)
        self.books.note("left")
        asked = self.control.finishing and not self._stop.is_set()
        self.report.stopped("finished, as you asked" if asked else self._stop_reason)
        self._courier.shutdown()
        self.recheck.close()
        self.corpus.close()
        self.keeper.close()
