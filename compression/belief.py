"""Whose word about its own history is believed.

Of two histories the one with more work (tokens) in it is the run's, and peers say themselves how much that is. Who says
more than we have must hand it on: then we have it too. A few that say so all the time, and give nothing that we could
take, would keep everybody from training for ever. So whoever is ahead of us in a small minority, and stays so, is not
believed for a while: it may be in rounds, but it is not waited for, nor followed.
"""

from __future__ import annotations

from collections.abc import Mapping

MIN_PEERS = 4  # with fewer others nobody can tell who is the minority
PATIENCE_S = 30.0
DOUBT_S = 330.0  # most that is kept in mind
FORGIVENESS = 0.25  # seconds of doubt that are forgotten in a second without cause for it
MAX_STEP_S = 5.0  # of looks that lie further apart no more is counted


def enough(num_peers: int) -> int:
    """How many of so many peers must say the same so that it is no liar's word: more than a third, two at least."""
    return max(2, num_peers // 3 + 1)


class Belief:
    """Of one peer in all others."""

    def __init__(self) -> None:
        self._doubts: dict[str, float] = {}  # seconds
        self._looked = 0.0

    def ahead(self, works: Mapping[str, float], own: float, num_active: int, now: float) -> set[str]:
        """Of peers with so many tokens in their history those that have more than `own` and are believed.

        num_active: how many of them take part in rounds, and would know of it. now: seconds, of any clock.
        """
        passed, self._looked = min(max(0.0, now - self._looked), MAX_STEP_S), now
        ahead = {peer for peer, work in works.items() if work > own}
        doubtful = ahead if num_active >= MIN_PEERS and 3 * len(ahead) <= num_active else set()
        for peer in self._doubts.keys() | doubtful:
            change = passed if peer in doubtful else -FORGIVENESS * passed
            self._doubts[peer] = min(DOUBT_S, self._doubts.get(peer, 0.0) + change)
        self._doubts = {peer: doubt for peer, doubt in self._doubts.items() if doubt > 0}
        return {peer for peer in ahead if peer not in doubtful or self._doubts.get(peer, 0.0) <= PATIENCE_S}
