"""Laws of spans sized by bandwidth: what is measured, and how a group divides its work by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.dht.uplink import MAX_MBPS, MIN_MEASURED_BYTES, Uplink, shares

SPEEDS = st.sampled_from([0.0, 1.0, 2.0, 8.0, 64.0, 1024.0])


@given(group=st.lists(st.tuples(st.booleans(), SPEEDS), min_size=1, max_size=20))
def test_shares_make_uploads_end_together(group: list[tuple[bool, float]]) -> None:
    """Shares add up; whoever has one finishes with the others, whoever has none would finish later with any."""
    reduces, mbps = [True, *(does for does, _ in group[1:])], [speed for _, speed in group]
    found, num = shares(reduces, mbps), len(group)
    assert all(share >= 0 for share in found) and sum(found) > 0
    assert not any(share for share, does in zip(found, reduces) if not does)
    if num <= 2 or len({speed for speed, does in zip(mbps, reduces) if does}) == 1 or 0.0 in mbps:
        return
    assert sum(found) == pytest.approx(1.0)
    times = [(1 + share * (num - 2)) / speed for share, speed in zip(found, mbps)]
    last = max(time for time, share in zip(times, found) if share)
    for time, share, does in zip(times, found, reduces):
        if does:
            assert time == pytest.approx(last) if share else time >= last * (1 - 1e-9)


def test_equals_share_equally() -> None:
    """With equal or unknown uplinks, every reducer has exactly the same share; an unknown one counts as usual."""
    assert shares([True] * 5, [0.0] * 5) == shares([True] * 5, [8.0] * 5) == [1.0] * 5
    assert shares([True, False, True], [0.0, 8.0, 0.0]) == [1.0, 0.0, 1.0]
    one = shares([True] * 4, [8.0, 8.0, 2.0, 0.0])
    assert one[0] == one[1] == one[3] > one[2]


def test_an_uplink_is_what_it_has_shown() -> None:
    """The best of the last rounds, in powers of two; what is too small to tell tells nothing."""
    uplink = Uplink()
    uplink.measure([])
    uplink.measure([(MIN_MEASURED_BYTES - 1, 0.001)])
    assert uplink.mbps == 0.0
    uplink.measure([(10**6, 1.0), (10**6, 1.1), (10**6, 90.0)])  # one receiver that dawdles, or lies
    assert uplink.mbps == 16.0  # of 21.8
    for _ in range(8):
        uplink.measure([(10**6, 4.0)])
    assert uplink.mbps == 2.0
    uplink.measure([(10**9, 1e-6)])
    assert uplink.mbps == MAX_MBPS
