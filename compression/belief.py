"""Whose word about its own history is believed.

Of two histories the one with more work (tokens) in it is the run's, and peers say themselves how much that is. Who says
more than we have must hand it on: then we have it too. A few that say so all the time, and give nothing that we could
take, would keep everybody from training for ever. So whoever is ahead of us in a small minority, and stays so, is not
believed for a while: it may be in rounds, but it is not waited for, nor followed.

Histories may have equal work, as those of two halves of a network that was split: then the run's is the one where more
peers stand, or else the one with the smaller digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Stand = tuple[float, str]  # tokens in a theta's history, and its digest
MIN_PEERS = 4  # with fewer others nobody can tell who is the minority
PATIENCE_S = 30.0
DOUBT_S = 330.0  # most that is kept in mind
FORGIVENESS = 0.25  # seconds of doubt that are forgotten in a second without cause for it
MAX_STEP_S = 5.0  # of looks that lie further apart no more is counted


def enough(num_peers: int) -> int:
    """How many of so many peers must say the same so that it is no liar's word: more than a third, two at least."""
    return max(2, num_peers // 3 + 1)


def stand_of(status: Mapping[str, object]) -> Stand:
    """Where a peer says in its heartbeat that it stands."""
    work = status.get("work", 0)
    return float(work) if isinstance(work, (int, float)) else 0.0, str(status.get("digest", ""))


def ahead(stands: Mapping[str, Stand], own: Stand, num_active: int) -> set[str]:
    """Of peers that stand there those whose history is the run's rather than ours, if they are to be believed.

    num_active: how many of them take part in rounds, and would know of it.
    """
    here = Counter([own, *(stand for stand in stands.values() if stand[0] == own[0])])
    known = [stand for stand, number in here.items() if not _are_few(number, num_active)]
    best = min(known, key=lambda stand: (-here[stand], stand[1]), default=own)
    return {peer for peer, stand in stands.items() if stand[0] > own[0] or (stand == best and stand != own)}


def _are_few(number: int, num_active: int) -> bool:
    return num_active >= MIN_PEERS and 3 * number <= num_active


class Belief:
    """Of one peer in all others."""

    def __init__(self) -> None:
        self._doubts: dict[str, float] = {}  # seconds
        self._looked = 0.0

    def ahead(self, stands: Mapping[str, Stand], own: Stand, num_active: int, now: float) -> set[str]:
        """As `ahead`, without those that are not believed. now: seconds, of any clock."""
        passed, self._looked = min(max(0.0, now - self._looked), MAX_STEP_S), now
        found = ahead(stands, own, num_active)
        more = {peer for peer in found if stands[peer][0] > own[0]}
        doubtful = more if _are_few(len(more), num_active) else set()
        for peer in self._doubts.keys() | doubtful:
            change = passed if peer in doubtful else -FORGIVENESS * passed
            self._doubts[peer] = min(DOUBT_S, self._doubts.get(peer, 0.0) + change)
        self._doubts = {peer: doubt for peer, doubt in self._doubts.items() if doubt > 0}
        return {peer for peer in found if peer not in doubtful or self._doubts.get(peer, 0.0) <= PATIENCE_S}
