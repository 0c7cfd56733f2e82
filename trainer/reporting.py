"""What a worker tells others about itself: its metrics file, its heartbeat, and the lines its user reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dtrain.trainer.exchange import Exchange, Outcome
from dtrain.trainer.metrics import MetricsLog
from dtrain.trainer.outer import OuterState

STEP_PERIOD_S = 0.5  # at most one step event and one heartbeat per this time

Say = Callable[[str], None]


@dataclass
class Reporter:
    """One worker's voice. Counts what it did; `started` is the moment its command was typed (time.time())."""

    name: str
    device: str
    metrics: MetricsLog
    exchange: Exchange
    outer: OuterState
    say: Say
    started: float = field(default_factory=time.time)
    tokens: int = 0  # trained by this worker, all its life
    digest: bytes = b""
    _state: str = "starting"
    _rate: float = 0.0
    _loss: float = 0.0
    _last_step: float = 0.0
    _first_step_done: bool = False
    _first_contribution_done: bool = False

    def state(self, state: str) -> None:
        """Enter a state: starting, joining, waiting, training, exchanging, finished, leaving or stopped."""
        if state != self._state:
            self.metrics.write("state", state=state)
        self._state = state
        self.announce()

    def announce(self) -> None:
        """Put where we stand into the heartbeat."""
        self.exchange.announce(
            {
                "round": self.outer.round,
                "digest": self.digest.hex(),
                "work": float(self.outer.tokens),
                "state": self._state,
                "name": self.name,
                "device": self.device,
                "tokens": self.tokens,
                "tokens_per_s": round(self._rate, 1),
                "loss": round(self._loss, 4),
            }
        )

    def joined(self, source: str, began: float) -> None:
        seconds = time.monotonic() - began
        self.metrics.write("joined", round=self.outer.round, source=source, seconds=round(seconds, 3))
        origin = {
            "fresh": "from the run's first weights",
            "checkpoint": "from this folder's checkpoint",
            "peers": f"with the weights of the others ({seconds:.1f} s)",
        }
        self.say(f"In at round {self.outer.round + 1}, {origin[source]}.")

    def resync(self, reason: str) -> None:
        self.metrics.write("resync", round=self.outer.round, reason=reason)
        self.say(f"Back with the others: {reason}.")

    def step(
        self, step: int, inner_steps: int, loss: Callable[[], float], new_tokens: int, rate: float
    ) -> None:
        """One inner step is done; `loss()` is asked only when something is written, as it waits for the device."""
        self.tokens += new_tokens
        self._rate = rate
        if not self._first_step_done:
            self._first_step_done = True
            seconds = time.time() - self.started
            self.metrics.write("first_step", seconds=round(seconds, 3))
            self.say(f"Training: first step {seconds:.1f} s after the command.")
        now = time.monotonic()
        if now - self._last_step < STEP_PERIOD_S and step < inner_steps:
            return
        self._last_step = now
        self._loss = loss()
        self.metrics.write(
            "step",
            round=self.outer.round,
            step=step,
            inner_steps=inner_steps,
            loss=round(self._loss, 4),
            tokens_per_s=round(rate, 1),
            tokens=self.tokens,
        )

    def round_done(
        self, outcome: Outcome, *, loss: float, own_tokens: int, all_tokens: int, payload_bytes: int
    ) -> None:
        """A round is applied; `outer` and `digest` are the new ones."""
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
            digest=self.digest.hex(),
            problem=outcome.problem,
        )
        share = 100.0 * own_tokens / all_tokens if included and all_tokens else 0.0
        who = "alone" if len(outcome.contributors) == 1 else f"{len(outcome.contributors)} workers"
        self.say(
            f"Round {self.outer.round}: loss {loss:.3f}, {who}, yours {own_tokens:,} tokens ({share:.1f} %), "
            f"{up / 1e6:.2f} MB up, {down / 1e6:.2f} MB down so far."
        )
        if included and not self._first_contribution_done:
            self._first_contribution_done = True
            seconds = time.time() - self.started
            self.metrics.write("first_contribution", round=self.outer.round, seconds=round(seconds, 3))
            self.say(f"Your machine has contributed, {seconds:.1f} s after the command. Thank you!")

    def evaluated(self, eval_loss: float) -> None:
        self.metrics.write("eval", round=self.outer.round, eval_loss=round(eval_loss, 6))
        self.say(f"Round {self.outer.round}: evaluation loss {eval_loss:.4f}.")

    def stopped(self, reason: str) -> None:
        self.metrics.write(
            "stop", reason=reason, round=self.outer.round, tokens=self.tokens, digest=self.digest.hex()
        )
        self.say(
            f"Stopped ({reason}) after {self.outer.round} rounds; {self.tokens:,} tokens of yours are in the run."
        )
