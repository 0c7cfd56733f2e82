"""When a round's inner steps end: after a fixed number, or when the swarm together has trained enough.

With a token target, fast machines do more inner steps and slow ones fewer, and nobody waits for the slowest: the round
ends for everybody when the sum of all workers' tokens reaches the target, or at the deadline.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.compression.belief import MIN_PEERS
from dtrain.compression.screen import WEIGHT_LIMIT
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
        there = [view for view in self._exchange.swarm() if view.status["state"] not in ABSENT]
        if _enough(sum(_has_ended(view, pace.round) for view in there), len(there)):
            return 0.0
        tokens, rates = [float(pace.tokens)], [pace.tokens_per_s]
        for view in there:
            if _number(view, "training_round") == pace.round:
                # A heartbeat is a little old: its worker has trained on since.
                rates.append(_number(view, "tokens_per_s"))
                tokens.append(_number(view, "round_tokens") + rates[-1] * view.age_s)
        missing, rate = self._target_tokens - _believable(tokens), _believable(rates)
        if missing <= 0 or until_deadline <= 0:
            return 0.0
        return min(until_deadline, missing / rate) if rate else until_deadline

    def _others_wait(self, round: int) -> bool:
        """Whether somebody has ended this round's steps, and waits or is in the next one's already."""
        there = [view for view in self._exchange.swarm() if view.status["state"] not in ABSENT]
        waiting = (
            _number(view, "training_round") > round
            or (view.status["state"] == "exchanging" and _number(view, "round") == round)
            for view in there
        )
        return _enough(sum(waiting), len(there))


def _has_ended(view: PeerView, round: int) -> bool:
    position = _number(view, "training_round")
    return position > round or (position == round and view.status["state"] == "exchanging")


def _enough(num: int, num_others: int) -> bool:
    """Whether so many of the others can be believed that the round is over: one lies, more than a third do not."""
    return num > 0 and (num_others < MIN_PEERS or 3 * num > num_others)


def _believable(figures: Sequence[float]) -> float:
    """The sum of what each says of itself; in a sum of tokens one counts no more than a reducer lets it."""
    if len(figures) <= MIN_PEERS:
        return sum(figures)
    limit = WEIGHT_LIMIT * statistics.median(figures)
    return sum(min(figure, limit) for figure in figures)


def _number(view: PeerView, key: str) -> float:
    value = view.status.get(key, 0)
    return max(0.0, float(value)) if isinstance(value, (int, float)) else 0.0
