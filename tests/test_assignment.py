"""Assignment: what a worker trains on follows from the manifest, the round and its peer id, and is nobody else's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from dtrain.trainer import assignment
from dtrain.trainer.assignment import Deal, lane_of, settle_lane


@dataclass
class View:
    """What a worker hears of another."""

    peer_id: str
    lane: int
    state: str = "training"
    age_s: float = 0.0
    status: Mapping[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.status = {"lane": self.lane, "state": self.state}


def settled(peers: list[str], lanes: int) -> dict[str, int]:
    """The peers' lanes when each has joined, one after another, and looked around again."""
    at: dict[str, int] = {}
    for _ in range(2):
        for peer in peers:
            others = [View(other, lane) for other, lane in at.items() if other != peer]
            at[peer] = settle_lane(at.get(peer, lane_of(peer, lanes)), peer, others, lanes)
    return at


@pytest.mark.parametrize("num_units", [1_000, 199_999])
def test_no_two_workers_share_a_unit_within_an_epoch(num_units: int) -> None:
    """50 rounds of 8 peers: every (epoch, unit) falls to one worker, once."""
    lanes = settled([f"peer-{i}" for i in range(8)], 64)
    deal = Deal("run", num_units, 64, per_round=5)
    dealt = [deal.unit(r, lane, i) for r in range(50) for lane in lanes.values() for i in range(5)]
    assert len(set(dealt)) == len(dealt) == 50 * 8 * 5
    assert all(0 <= unit < num_units for _, unit in dealt)


def test_an_epoch_deals_out_every_unit() -> None:
    """If all lanes are taken, each unit is trained on once an epoch, in another order than in the one before."""
    deal = Deal("run", 60, 4, per_round=3)
    orders = [[deal.unit(r, lane, i)[1] for r in range(5 * e, 5 * e + 5) for i in range(3) for lane in range(4)]
              for e in range(2)]  # fmt: skip
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(60))
    assert orders[0] != orders[1]


def test_an_assignment_is_the_same_on_every_machine() -> None:
    """Some places are written here: they must not change with numpy or Python."""
    deal = Deal("run", 1000, 16, per_round=2)
    assert [deal.unit(r, lane_of("peer", 16), 1) for r in (0, 1, 50)] == [(0, 200), (0, 649), (1, 874)]
    assert lane_of("peer", 256) == 120


def test_long_orders_are_shuffled_without_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit places are computed one by one; each place still has a unit of its own."""
    monkeypatch.setattr(assignment, "MAX_SHUFFLED", 10)
    deal = Deal("run", 777, 7, per_round=1)
    units = [deal.unit(r, lane, 0)[1] for r in range(111) for lane in range(7)]
    assert sorted(units) == list(range(777))
    assert units[:20] != sorted(units[:20])


def test_a_lane_that_is_taken_is_left_to_who_has_the_smaller_id() -> None:
    """Of two peers whose ids hash alike one moves on; the absent hold no lane; with too few lanes some are shared."""
    assert settle_lane(3, "b", [View("a", 3), View("c", 4)], 8) == 5
    assert settle_lane(3, "a", [View("b", 3)], 8) == 3
    assert settle_lane(7, "b", [View("a", 7)], 8) == 0
    assert settle_lane(3, "b", [View("a", 3, "paused")], 8) == 3
    assert settle_lane(0, "b", [View("a", 0)], 1) == 0
    lanes = settled([f"peer-{i}" for i in range(16)], 16)
    assert len(set(lanes.values())) == 16
