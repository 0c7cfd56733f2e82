"""When what many looks at a peer's updates have shown is enough to accuse it.

Each look asks two questions, of the peer's update and in the same way of our own, which is honest:

    How much more does it help the data that its sender was given than other data, in standard errors of the difference?
    Of who has trained on other data, or not at all, this is about 0; of honest ones what it is of our own, on average.

    How nearly does it point where the sender's first inner steps, done again, point?
    Of who makes up updates, or trains on what is no text, less than half as nearly as ours.

One look proves nothing. For each question a sum is kept for each peer (Page's CUSUM): a look adds the logarithm of how
much more likely it is if the peer cheats than if it is honest, and below 0 the sum does not fall. GUILTY accuses. An
honest peer's sum gets there once in exp(GUILTY) looks, about 1,100, at the most (Lorden 1971), and a third of the
members must say so for it to matter.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field

GUILTY = 7.0
OWN_SCORES = 32  # newest ones that say what is to be expected
LEAST_SCORES = 6  # fewer say too little
HONEST = 0.7  # of our own mean score: machines of 2 to 21 steps a round had 0.9 to 1.2 of the mean of all
HALF = 0.5
LEAST_LIKENESS = 0.1  # of our own: below it the question has no answer
FAILED = math.log(
    0.8 / 0.02
)  # 10 of 12 updates made from letters in no order were not half as near, 0 of 130 honest
PASSED = math.log(0.2 / 0.98)
MISSES = 3  # in a row, while others answer

WRONG_DATA = "wrong-data"
WRONG_WORK = "wrong-work"
SHOWS_NOTHING = "shows-nothing"
WORDS = {
    WRONG_DATA: "its updates say nothing of the data it was given",
    WRONG_WORK: "its updates do not come from training on the data it was given",
    SHOWS_NOTHING: "it does not show what it has sent",
}


@dataclass(frozen=True)
class Look:
    """What one look at a peer's update found, and of ours in the same look."""

    score: float
    own_score: float
    """How much more the update helps its sender's data than other data, in standard errors."""
    likeness: float
    own_likeness: float
    """Cosine of the update with its sender's first steps done again."""

    def rounded(self) -> dict[str, float]:
        """For the metrics."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


@dataclass
class _Record:
    data: float = 0.0
    work: float = 0.0
    misses: int = 0


@dataclass
class Suspicions:
    """What one worker holds against the others."""

    _own: deque[float] = field(default_factory=lambda: deque(maxlen=OWN_SCORES))
    _records: dict[str, _Record] = field(default_factory=dict)
    _others_answer: bool = False

    @property
    def expected(self) -> float:
        """Score that honest updates have at least, on average, by our own; 0 while these are few or show nothing."""
        number = len(self._own)
        if number < LEAST_SCORES:
            return 0.0
        return max(0.0, HONEST * math.fsum(self._own) / number - 1 / math.sqrt(number))

    def note(self, peer_id: str, look: Look) -> str:
        """A look at a peer's update; what it is accused of, or ""."""
        record, expected = self._records.setdefault(peer_id, _Record()), self.expected
        record.misses, self._others_answer = 0, True
        record.data = _sum(record.data, expected * (expected / 2 - look.score))
        if look.own_likeness > LEAST_LIKENESS:
            failed = look.likeness < HALF * look.own_likeness
            record.work = _sum(record.work, FAILED if failed else PASSED)
        self._own.append(look.own_score)
        if record.work >= GUILTY:
            return WRONG_WORK
        return WRONG_DATA if record.data >= GUILTY else ""

    def missed(self, peer_id: str) -> str:
        """A peer has not shown what it sent; what it is accused of, or "". Where nobody answers it is our own line."""
        record = self._records.setdefault(peer_id, _Record())
        record.misses += self._others_answer
        self._others_answer = False
        return SHOWS_NOTHING if record.misses >= MISSES else ""

    def doubt(self, peer_id: str) -> float:
        """How near a peer is to being accused, from 0 to 1."""
        record = self._records.get(peer_id, _Record())
        return min(1.0, max(record.data / GUILTY, record.work / GUILTY, record.misses / MISSES))


def _sum(before: float, added: float) -> float:
    """Never below 0, and never so high that a few good looks do not clear the peer."""
    return min(max(0.0, before + added), GUILTY + FAILED)
