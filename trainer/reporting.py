"""What a worker tells others about itself: its metrics file, its heartbeat, and the lines its user reads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from dtrain.trainer.bulletin import SAMPLE_TOPIC, TOPIC, Bulletin, EvalLine, RoundLine, Sample
from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.compute import device_peak_bytes
from dtrain.trainer.download import Bar
from dtrain.trainer.exchange import Exchange, Outcome, is_archive
from dtrain.trainer.feed import Feed
from dtrain.trainer.metrics import Metrics
from dtrain.trainer.outer_loop import OuterLoop
from dtrain.trainer.pacing import Pace, Pacer

STEP_PERIOD_S = 0.5  # at most one step event per this time
ANNOUNCE_PERIOD_S = 1.0  # and one heartbeat on top of the regular ones
POST_PERIOD_S = 2.0  # and one bulletin; it holds the last few rounds

Say = Callable[[str], None]


class Trained(Protocol):
    """What the report of a round says of its inner steps."""

    @property
    def tokens(self) -> int: ...

    @property
    def loss(self) -> float: ...


@dataclass
class Reporter:
    """One worker's voice. Counts what it did; `started` is the moment its command was typed (Unix time)."""

    name: str
    device: str
    metrics: Metrics
    exchange: Exchange
    outer: OuterLoop
    say: Say
    clock: Clock = SYSTEM_CLOCK
    feed: Feed | None = None
    bar: Bar | None = None  # for the user at a terminal
    started: float = field(init=False)
    tokens: int = 0  # trained by this worker, all its life
    gives: bool = True  # whether others may ask us for state and past rounds
    accuses: str = ""  # peer id of whom we have found to cheat last, for others to look too
    _state: str = "starting"
    _pace: Pace = field(init=False)
    _trained_s: float = 0.0  # in the last round's inner steps
    _outcome_came: float = 0.0  # by clock.monotonic(), as the other moments here
    _last_posted: float = 0.0
    _first_round_began: float | None = None
    _compute_s: float = 0.0
    _remaining_s: float = 0.0
    _loss: float = 0.0
    _last_step: float = 0.0
    _last_announced: float = 0.0
    _first_step_done: bool = False
    _first_contribution_done: bool = False
    _rounds_contributed: int = 0
    _last_share_percent: float = 0.0
    _inner_steps: int = 0
    _refusals: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.clock.time()
        self._pace = Pace(0, self.clock.monotonic(), clock=self.clock)
        self.bulletin = Bulletin()

    def state(self, state: str) -> None:
        """Enter a state: starting, joining, waiting, training, exchanging, finished, leaving or stopped."""
        if state != self._state:
            self.metrics.write("state", state=state)
        self._state = state
        self.announce()

    def announce(self) -> None:
        """Put where we stand into the heartbeat."""
        self._note_refusals()
        self.exchange.announce(
            {
                "round": self.outer.round,
                "digest": self.outer.digest.hex(),
                "work": float(self.outer.tokens),
                "state": self._state,
                **({} if self.gives else {"gives": False}),
                "name": self.name,
                "device": self.device,
                "tokens": self.tokens,
                "tokens_per_s": round(self._pace.tokens_per_s, 1),
                "training_round": self._pace.round,
                "round_tokens": self._pace.tokens,
                "round_ends_in_s": round(self._remaining_s, 1),
                "compute_share": round(self.compute_share, 4),
                "loss": round(self._loss, 4),
                **({"lane": self.feed.lane} if self.feed else {}),
                **({"accuses": self.accuses} if self.accuses else {}),
            }
        )

    def _note_refusals(self) -> None:
        counts = dict(self.exchange.refusals())
        if counts != self._refusals:
            self._refusals = self.bulletin.refused = counts
            self.metrics.write("refused", counts=counts)

    def snapshot(self) -> dict[str, Any]:
        """Where we stand, for the user's own eyes; the fields of `control.proto`'s Status that the loop knows."""
        up, down = self.exchange.traffic()
        is_training = self._state == "training"
        return {
            "peer_id": self.exchange.peer_id,
            "device": self.device,
            "state": self._state,
            "round": self.outer.round,
            "rounds_contributed": self._rounds_contributed,
            "step": self._pace.steps if is_training else 0,
            "inner_steps": self._inner_steps,
            "tokens": self.tokens,
            "tokens_per_s": self._pace.tokens_per_s if is_training else 0.0,
            "loss": self._loss,
            "round_ends_in_s": self._remaining_s if is_training else 0.0,
            "compute_share": self.compute_share,
            "workers": 1 + sum(not is_archive(view) for view in self.exchange.swarm()),
            "bytes_up": up,
            "bytes_down": down,
            "last_share_percent": self._last_share_percent,
        }

    def joined(self, source: str, began: float) -> None:
        seconds = self.clock.monotonic() - began
        stands = {"round": self.outer.round, "digest": self.outer.digest.hex()}
        self.metrics.write("joined", **stands, source=source, seconds=round(seconds, 3))
        origin = {
            "fresh": "from the run's first weights",
            "checkpoint": "from this folder's checkpoint",
            "peers": f"with the weights of the others ({seconds:.1f} s)",
        }
        self.say(f"In at round {self.outer.round + 1}, {origin[source]}.")

    def accused(self, peer_id: str, of: str) -> None:
        """We have found that a peer cheats."""
        self.bulletin.event(self.clock.time(), "problem", f"{peer_id} is accused: {of}")
        self._post()
        self.say(f"{peer_id} is accused: {of}.")

    def resync(self, reason: str) -> None:
        self.metrics.write("resync", round=self.outer.round, reason=reason)
        self.bulletin.event(self.clock.time(), "resync", reason)
        self._post()
        self.say(f"Back with the others: {reason}.")

    def alarm(self, what: str, detail: str) -> None:
        """Something that the user must see to; others are told what, and only the user the detail, such as a path."""
        self.metrics.write("alarm", round=self.outer.round, what=what, detail=detail)
        self.bulletin.event(self.clock.time(), "problem", what)
        self._post()
        self.say(f"{detail}; {what}.")

    def begin_round(self, number: int) -> Pace:
        """A round's inner steps begin."""
        self._pace = Pace(number, self.clock.monotonic(), clock=self.clock)
        if self._first_round_began is None:
            self._first_round_began = self._pace.began
        self.state("training")
        return self._pace

    def step(self, pace: Pace, loss: Callable[[], float], new_tokens: int, pacer: Pacer) -> None:
        """One inner step is done; `loss()` is asked only when something is written, as it waits for the device."""
        pace.steps += 1
        self._inner_steps = pacer.inner_steps if pacer.is_fixed else 0
        pace.tokens += new_tokens
        self.tokens += new_tokens
        if not self._first_step_done:
            self._first_step_done = True
            seconds = self.clock.time() - self.started
            self.metrics.write("first_step", seconds=round(seconds, 3))
            self.say(f"Training: first step {seconds:.1f} s after the command.")
        now = self.clock.monotonic()
        if now - self._last_step < STEP_PERIOD_S and pace.steps > 1:
            return
        self._last_step = now
        self._loss = loss()
        self._remaining_s = pacer.remaining_s(pace)
        if self.bar is not None:
            self.bar.progress(
                f"Round {pace.round + 1}: training", pace.steps, self._inner_steps, "steps", lines=False
            )
        self.metrics.write(
            "step",
            round=pace.round,
            step=pace.steps,
            inner_steps=pacer.inner_steps,
            loss=round(self._loss, 4),
            tokens_per_s=round(pace.tokens_per_s, 1),
            tokens=self.tokens,
            round_ends_in_s=round(self._remaining_s, 1),
        )
        if not pacer.is_fixed:
            self._announce_now_and_then(now)  # the others' rounds end by what we say

    def _announce_now_and_then(self, now: float) -> None:
        if now - self._last_announced > ANNOUNCE_PERIOD_S:
            self._last_announced = now
            self.announce()

    def end_training(self, pace: Pace) -> None:
        """A round's inner steps are done."""
        self._trained_s = self.clock.monotonic() - pace.began
        self._compute_s += self._trained_s

    @property
    def compute_share(self) -> float:
        """Share of the time since the first round's beginning that went into inner steps."""
        if self._first_round_began is None:
            return 0.0
        return min(1.0, self._compute_s / max(1e-9, self.clock.monotonic() - self._first_round_began))

    def waiting_for(self, outcome: Future[Outcome]) -> Outcome:
        """Wait for the exchange; if it makes us wait, that is a state of its own."""
        if not outcome.done():
            self.state("exchanging")
        stage = f"Round {self.outer.round + 1}: exchanging with the others"
        with self.bar.waiting(stage, lines=False) if self.bar is not None else nullcontext():
            result = outcome.result()
        self._outcome_came = self.clock.monotonic()
        return result

    def round_done(self, outcome: Outcome, training: Trained, all_tokens: int, payload_bytes: int) -> None:
        """A round is applied; `outer` is the new one."""
        loss, own_tokens = training.loss, training.tokens
        self.announce()
        included = self.exchange.peer_id in outcome.contributors
        up, down = self.exchange.traffic()
        self.metrics.write(
            "round",
            round=self.outer.round,
            contributors=list(outcome.contributors),
            own_included=included,
            loss=round(loss, 4),
            tokens=self.tokens,
            round_tokens=own_tokens,
            payload_bytes=payload_bytes,
            bytes_up=up,
            bytes_down=down,
            wait_s=round(outcome.wait_s, 3),
            exchange_s=round(outcome.exchange_s, 3),
            compute_share=round(self.compute_share, 4),
            data_wait_s=round(self.feed.waited_s, 3) if self.feed else 0.0,
            train_s=round(self._compute_s, 3),
            digest=self.outer.digest.hex(),
            problem=outcome.problem,
        )
        self._enter_round(outcome, loss, own_tokens, included)
        share = 100.0 * own_tokens / all_tokens if included and all_tokens else 0.0
        who = "alone" if len(outcome.contributors) == 1 else f"{len(outcome.contributors)} workers"
        self.say(
            f"Round {self.outer.round}: loss {loss:.3f}, {who}, yours {own_tokens:,} tokens ({share:.1f} %), "
            f"{up / 1e6:.2f} MB up, {down / 1e6:.2f} MB down so far."
        )
        if included:
            self._rounds_contributed += 1
            self._last_share_percent = share
        if included and not self._first_contribution_done:
            self._first_contribution_done = True
            seconds = self.clock.time() - self.started
            self.metrics.write("first_contribution", round=self.outer.round, seconds=round(seconds, 3))
            self.say(f"Your machine has contributed, {seconds:.1f} s after the command. Thank you!")

    def _enter_round(self, outcome: Outcome, loss: float, tokens: int, included: bool) -> None:
        """Tell observers of a round."""
        self.bulletin.contributions += included
        self.bulletin.rounds.append(
            RoundLine(
                round=self.outer.round,
                compute_s=self._trained_s,
                wait_s=outcome.wait_s,
                exchange_s=outcome.exchange_s,
                apply_s=self.clock.monotonic() - self._outcome_came,
                group=len(outcome.contributors),
                included=included,
                loss=loss,
                tokens=tokens,
            )
        )
        if outcome.problem:
            self.bulletin.event(self.clock.time(), "problem", outcome.problem)
        if self.clock.monotonic() - self._last_posted > POST_PERIOD_S:
            self._post()

    def _post(self) -> None:
        self._last_posted = self.clock.monotonic()
        self.exchange.post(TOPIC, self.bulletin.pack(self.started, self.exchange.traffic()))

    def sampled(self, prompt: str, text: str) -> None:
        """Theta has written something."""
        self.exchange.post(SAMPLE_TOPIC, Sample(self.outer.round, prompt, text).pack())

    def evaluated(self, eval_loss: float) -> None:
        self.metrics.write("eval", round=self.outer.round, eval_loss=round(eval_loss, 6))
        self.bulletin.evals.append(EvalLine(self.outer.round, eval_loss))
        self._post()
        self.say(f"Round {self.outer.round}: evaluation loss {eval_loss:.4f}.")

    def stopped(self, reason: str) -> None:
        self._post()
        up, down = self.exchange.traffic()
        self.metrics.write(
            "stop",
            reason=reason,
            round=self.outer.round,
            tokens=self.tokens,
            digest=self.outer.digest.hex(),
            bytes_up=up,
            bytes_down=down,
            device_peak_bytes=device_peak_bytes(self.device),
        )
        self.say(
            f"Stopped ({reason}) after {self.outer.round} rounds; {self.tokens:,} tokens of yours are in the run."
        )
