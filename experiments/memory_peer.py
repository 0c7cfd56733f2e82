"""What an in-memory swarm knows of each worker, and how a round ended for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dtrain.compression.belief import stand_of
from dtrain.compression.standing import Observations
from dtrain.experiments.memory_round import Reduced
from dtrain.trainer.exchange import Provider

SENT_ROUNDS = 2  # whose payloads a worker can still show


@dataclass(frozen=True)
class MemoryOutcome:
    """See `Outcome`."""

    verdict: str
    round: int
    base_digest: bytes = b""
    members: Sequence[str] = ()
    contributors: Sequence[str] = ()
    aggregates: Sequence[bytes] = ()
    undelivered: Sequence[tuple[int, int]] = ()
    problem: str = ""
    wait_s: float = 0.0
    exchange_s: float = 0.0


@dataclass
class MemoryPeer:
    """What the swarm knows of one worker."""

    status: Mapping[str, object] = field(default_factory=dict)
    announced: bool = False
    died_at: float | None = None
    """When it died by plan, on the clock; its last heartbeat then grows old."""
    next_round: int = 0
    """The round it stands at by the outcome of its last one, which its next announcement will say."""
    provider: Provider | None = None
    history: OrderedDict[int, MemoryOutcome] = field(default_factory=OrderedDict)
    sent: OrderedDict[int, bytes] = field(default_factory=OrderedDict)
    """Its payloads of the newest rounds that it was in, by round."""
    observations: Observations = field(default_factory=Observations)
    notes: dict[str, bytes] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def state(self) -> str:
        return str(self.status.get("state", "joining"))

    def contributed(self, round: int, payload: bytes) -> None:
        """It has sent this."""
        self.sent[round] = payload
        while len(self.sent) > SENT_ROUNDS:
            self.sent.popitem(last=False)

    @property
    def work(self) -> float:
        """Tokens in the history of its theta."""
        return stand_of(self.status)[0]

    @property
    def position(self) -> int:
        announced = self.status.get("round", 0)
        return max(announced if isinstance(announced, int) else 0, self.next_round)


def fill(outcome: MemoryOutcome, name: str, names: Sequence[str], reduced: Reduced) -> MemoryOutcome:
    """The outcome of member `name` with what the round brought."""
    return replace(
        outcome,
        members=tuple(names),
        contributors=tuple(member for member in names if member in reduced.contributors),
        aggregates=tuple(reduced.aggregates),
        undelivered=tuple(reduced.undelivered.get(name, ())),
        problem="; ".join(reduced.problems.get(name, ())),
        exchange_s=reduced.ends_s.get(name, 0.0),
    )
