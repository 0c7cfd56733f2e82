"""What a peer's part in a run must know of its manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunTerms:
    """What the averager must know of the run's manifest. Times in seconds."""

    prefix: str
    manifest_hash: bytes
    matchmaking_s: float
    round_timeout_s: float
    sender_timeout_s: float
    exact_up_to: int
    max_weight: float  # tokens that one worker can be credited with per round
    screens: bool = False  # whether reducers judge what they sum

    @property
    def run_tag(self) -> bytes:
        return self.manifest_hash[:8]

    @property
    def longest_round_s(self) -> float:
        """No round takes longer, with a try in vain and every time-out in it."""
        return 2 * (self.matchmaking_s + self.round_timeout_s + self.sender_timeout_s)


def run_prefix(run_id: str, manifest_hash: bytes) -> str:
    """What the run's DHT keys begin with."""
    return f"dtrain-{run_id}-{manifest_hash[:8].hex()}"
