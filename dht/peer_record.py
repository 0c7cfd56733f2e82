"""What a peer knows of another worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.compression.belief import stand_of
from dtrain.dht.greetings import NOBODY, Leads
from dtrain.dht.reachability import CLIENT

# States in which a peer takes part in no round; see `dtrain.trainer.exchange.ABSENT` and `ARCHIVING`.
ARCHIVING = "archiving"
LEFT = ("leaving", "stopped")
ABSENT = ("joining", "paused", "finished", *LEFT, ARCHIVING)


@dataclass(frozen=True)
class PeerRecord:
    """What another worker last said of itself. Times are DHT times; `heard` and `expires` are by our clock."""

    peer_id: str
    status: Mapping[str, Any]
    said: float
    heard: float
    expires: float
    is_direct: bool = False  # it told us itself
    leads: Leads = NOBODY

    @property
    def is_active(self) -> bool:
        """Whether this peer takes part in rounds, so that the others wait for it."""
        return self.status["state"] not in ABSENT

    @property
    def has_left(self) -> bool:
        """Whether this peer has said goodbye."""
        return self.status["state"] in LEFT

    @property
    def is_archive(self) -> bool:
        return bool(self.status["state"] == ARCHIVING)

    @property
    def can_be_dialled(self) -> bool:
        """Whether this peer can be asked for anything; one that nobody can dial only asks others."""
        return self.status.get("reach") != CLIENT

    @property
    def can_give(self) -> bool:
        """Whether past rounds and state can be had from this peer, as far as it says."""
        says_so = self.status["state"] != "joining" and self.status.get("gives", True) is True
        return says_so and self.can_be_dialled

    @property
    def work(self) -> float:
        """Tokens in the history of this peer's theta; of two histories the one with more work is the run's."""
        return stand_of(self.status)[0]
