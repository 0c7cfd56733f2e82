"""When a round's inner steps end: after a fixed number, or when the swarm together has trained enough.

With a token target, fast machines do more inner steps and slow ones fewer, and nobody waits for the slowest: the round
ends for everybody when the sum of all workers' tokens reaches the target, or at the deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.exchange import ABSENT, Exchange, PeerView
from dtrain.trainer.manifest import Manifest


@dataclass
class Pace:
    """One round's progress, own and the swarm's. Tokens are of this round only."""

    round: int
    began: float  # on the clock
    tokens: int = 0
    steps: int = 0
    clock: Clock = SYSTEM_CLOCK

    @property
    def tokens_per_s(self) -> float:
        passed = self.clock.monotonic() - self.began
        return self.tokens / passed if passed > 0 else 0.0


class Pacer:
    """Decides after each inner step whether the round is over for this worker."""

    def __init__(self, manifest: Manifest, exchange: Exchange, clock: Clock = SYSTEM_CLOCK):
        self.inner_steps = manifest.train.inner_steps
        self._target_tokens = manifest.exchange.round_tokens
        self._deadline_s = manifest.exchange.round_deadline_s
        self._exchange, self._clock = exchange, clock
        self.came_late = False  # set while this worker's first round after joining or resyncing is under way

    @property
    def is_fixed(self) -> bool:
        return self._target_tokens == 0

    def is_over(self, pace: Pace) -> bool:
        """At least one inner step is always done."""
        if self.is_fixed and not self.came_late:
            return pace.steps >= self.inner_steps
        if pace.steps == 0:
            return False
        if self.is_fixed:  # who came in the middle of a round does not keep the others waiting
            return pace.steps >= self.inner_steps or self._others_wait(pace.round)
        return self.remaining_s(pace) <= 0.0

    def remaining_s(self, pace: Pace) -> float:
        """Predicted seconds until the round's end, as far as is known here; 0 when it is over."""
        until_deadline = pace.began + self._deadline_s - self._clock.monotonic()
        if self.is_fixed:
            rate = pace.steps / max(1e-9, self._clock.monotonic() - pace.began)
            return (self.inner_steps - pace.steps) / rate if rate else until_deadline
        tokens, rate = float(pace.tokens), pace.tokens_per_s
        for view in self._exchange.swarm():
            if view.status["state"] in ABSENT:
                continue
            position = _number(view, "training_round")
            if position > pace.round or (position == pace.round and view.status["state"] == "exchanging"):
                return 0.0  # others have ended it already
            if position == pace.round:
                # A heartbeat is a little old: its worker has trained on since.
                peer_rate = _number(view, "tokens_per_s")
                tokens += _number(view, "round_tokens") + peer_rate * view.age_s
                rate += peer_rate
        missing = self._target_tokens - tokens
        if missing <= 0 or until_deadline <= 0:
            return 0.0
        return min(until_deadline, missing / rate) if rate else until_deadline

    def _others_wait(self, round: int) -> bool:
        """Whether somebody has ended this round's steps, and waits or is in the next one's already."""
        return any(
            _number(view, "training_round") > round
            or (view.status["state"] == "exchanging" and _number(view, "round") == round)
            for view in self._exchange.swarm()
            if view.status["state"] not in ABSENT
        )


def _number(view: PeerView, key: str) -> float:
    value = view.status.get(key, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0
