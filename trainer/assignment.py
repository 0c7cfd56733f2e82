"""Which part of the data a worker trains on in a round: a function of the manifest, the round and the peer id.

An epoch is a shuffled order of all units (a unit is a sequence, or a piece of a file). The order is dealt out to lanes
in turn, round after round, and a worker takes what falls to its lane:

    slot = (round * per_round + i) * lanes + lane        epoch = slot // num_units
    unit = shuffle of that epoch [slot mod num_units]

So within an epoch no unit falls to two lanes, nor twice to one. Who needs more than `per_round` units takes those of
rounds that no run reaches, of its own lane too. A worker's lane is the hash of its peer id; if somebody
who is there already has it, the newcomer takes the next free one and says so in its heartbeat (`settle_lane`). Who
checks a worker's data needs the manifest, the round, and the peer id or the announced lane.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.trainer.exchange import ABSENT, PeerView

MAX_SHUFFLED = 1 << 20  # units: an epoch's order of these takes 8 MB


FAR_ROUNDS = 1 << 24


def draw(label: str) -> int:
    """A number from 0 to 2**64 - 1 that depends on nothing but the label."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")


def philox(label: str) -> np.random.Philox:
    """Random bits from a label. Philox's raw output is fixed by its paper; numpy promises no such thing for
    `Generator`."""
    key = np.frombuffer(hashlib.sha256(label.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key)


def lane_of(peer_id: str, lanes: int) -> int:
    """The lane that a peer takes if it is free."""
    return draw(f"lane\n{peer_id}") % lanes


def settle_lane(mine: int, peer_id: str, others: Iterable[PeerView], lanes: int) -> int:
    """The lane to train on: `mine`, or the next free one if it is another's who has the smaller peer id.

    Peers in one of the ABSENT states hold none. With more workers than lanes some share one.
    """
    held = {v.peer_id: v.status.get("lane") for v in others if v.status.get("state") not in ABSENT}
    if all(peer_id < other for other, lane in held.items() if lane == mine):
        return mine
    taken = set(held.values())
    return next((lane % lanes for lane in range(mine + 1, mine + lanes) if lane % lanes not in taken), mine)


@dataclass(frozen=True)
class Deal:
    """Deals `num_units` units to `lanes` lanes, `per_round` to each in every round."""

    label: str
    """Names the run and what is dealt; another label, another order."""
    num_units: int
    lanes: int
    per_round: int

    def unit(self, round: int, lane: int, index: int) -> tuple[int, int]:
        """(epoch, unit) of a lane's `index`-th unit of a round, index below `per_round`."""
        assert 0 <= index < self.per_round and 0 <= lane < self.lanes
        slot = (round * self.per_round + index) * self.lanes + lane
        epoch, place = divmod(slot, self.num_units)
        return epoch, self._shuffled(epoch, place)

    def units(self, round: int, lane: int) -> Iterator[tuple[int, int]]:
        """Endless (epoch, unit) for a lane in a round; the first `per_round` of them are meant to suffice."""
        for far in itertools.count():
            for index in range(self.per_round):
                yield self.unit(round + far * FAR_ROUNDS, lane, index)

    def _shuffled(self, epoch: int, place: int) -> int:
        if self.num_units > MAX_SHUFFLED:
            return _feistel(f"{self.label}\n{epoch}", self.num_units, place)
        return int(_order(f"{self.label}\n{epoch}", self.num_units)[place])


@functools.lru_cache(maxsize=8)
def _order(label: str, count: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to count - 1, shuffled."""
    return np.argsort(philox(label).random_raw(count), kind="stable").astype(np.int64)


def _feistel(label: str, count: int, place: int) -> int:
    """`place` in a shuffle of 0 to count - 1 that is too long to be made: four Feistel rounds, walked until they end
    below `count`."""
    half = (count - 1).bit_length() // 2 + 1
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for step in range(4):
            left, right = right, left ^ (draw(f"{label}\n{step}\n{right}") & mask)
        place = left << half | right
        if place < count:
            return place
