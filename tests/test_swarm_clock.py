"""Laws of the clock that peers go by: a machine whose own is off dates its records as the others do."""

from __future__ import annotations

import time

import hivemind.dht.protocol
import hivemind.utils.timed_storage
import pytest

from dtrain.dht import heartbeats, records
from dtrain.dht.distance import middle
from dtrain.dht.swarm_clock import MAX_OFF_S, SwarmClock

PLACES = [hivemind.dht.protocol, hivemind.utils, hivemind.utils.timed_storage, heartbeats, records]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SwarmClock:
    for place in PLACES:
        monkeypatch.setattr(place, "get_dht_time", time.time)
    return SwarmClock()


def test_hivemind_and_ours_go_by_it(clock: SwarmClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever name a module has for the DHT's time, it is this clock's; the machine's own time is left alone."""
    monkeypatch.setattr(time, "time", lambda: 1090.0)
    clock.install()
    clock.put_right(90.0)
    assert {place.get_dht_time() for place in PLACES} == {1000.0}  # type: ignore[attr-defined]
    assert time.time() == 1090.0


@pytest.mark.parametrize("skew_s", [None, 0.0, 0.9, -0.9, MAX_OFF_S + 1, -MAX_OFF_S - 1])
def test_a_good_clock_and_a_mad_one_are_left(skew_s: float | None, clock: SwarmClock) -> None:
    """A late answer is no reason to change anything, and nobody can send us to another year."""
    clock.put_right(skew_s)
    assert clock.ahead_s == 0.0


@pytest.mark.parametrize(
    ("skews", "found"),
    [([], None), ([90.0], 90.0), ([0.1, 90.0], 0.1), ([-90.0, -0.2], -0.2), ([90.1, 7200.0, 90.0], 90.1)],
)
def test_one_of_three_cannot_lie(skews: list[float], found: float | None) -> None:
    """The middle one is taken, of two the one nearer to our own clock."""
    assert middle(skews) == found
