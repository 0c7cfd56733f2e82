"""Laws of how a group agrees on who takes part: one answer for all, and nobody can spoil it for the others."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression import wire
from dtrain.dht.membership import (
    MIN_WEIGHT,
    PROTOCOL_VERSION,
    Contribution,
    Member,
    agree_on_members,
    pack_hello,
)
from dtrain.dht.reachability import CLIENT, DIRECT, RELAYED

ROUND, MAX_WEIGHT = 7, 1e6
DIGESTS = [bytes([n]) * 32 for n in range(3)]


def hello(digest: int = 0, weight: float = 1.0, round: int = ROUND, reach: str = DIRECT) -> bytes:
    return pack_hello(Contribution(round, DIGESTS[digest], b"", weight), reach=reach)


def raw(**changes: Any) -> bytes:
    """A hello with anything in it."""
    fields = {
        "version": PROTOCOL_VERSION,
        "round": ROUND,
        "digest": DIGESTS[0],
        "weight": 1.0,
        "reach": DIRECT,
        "mbps": 0.0,
    }
    return bytes(msgpack.packb({**fields, **changes}))


def agree(peer_ids: Sequence[object], gathered: Sequence[bytes]) -> list[Member]:
    return agree_on_members(peer_ids, gathered, ROUND, MAX_WEIGHT).members


def ids(members: list[Member]) -> list[str]:
    return [member.peer_id for member in members]


def test_members_are_as_they_said() -> None:
    """Weight and whether a peer reduces come out as the peer said them, in the order of the peer ids."""
    agreed = agree(["b", "a"], [hello(weight=3.0), hello(weight=5.0, reach=CLIENT)])
    assert agreed == [Member("a", 5.0, False), Member("b", 3.0, True)]


def test_through_a_relay_only_if_nobody_else_can() -> None:
    """Who is reached through a relay owns a span only in a group in which nobody can be dialled directly."""
    hidden = [hello(reach=RELAYED), hello(reach=RELAYED), hello(reach=CLIENT)]
    assert [member.reduces for member in agree("abc", hidden)] == [True, True, False]
    assert [member.reduces for member in agree("abcd", [*hidden, hello()])] == [False, False, False, True]


@given(
    hellos=st.lists(
        st.one_of(
            st.builds(
                hello,
                digest=st.integers(0, 2),
                weight=st.floats(MIN_WEIGHT, MAX_WEIGHT),
                round=st.sampled_from([ROUND, ROUND, ROUND, ROUND + 1]),
                reach=st.sampled_from([DIRECT, RELAYED, CLIENT]),
            ),
            st.binary(max_size=40),
        ),
        max_size=9,
    ),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_everybody_comes_to_the_same_answer(hellos: list[bytes], seed: int) -> None:
    """The order in which the leader lists the group does not matter, ties included."""
    group = [(f"peer{i}", blob) for i, blob in enumerate(hellos)]
    shuffled = random.Random(seed).sample(group, len(group))
    agreed = [agree([p for p, _ in order], [h for _, h in order]) for order in (group, shuffled)]
    assert agreed[0] == agreed[1]
    assert ids(agreed[0]) == sorted(ids(agreed[0]))
    assert not agreed[0] or any(member.reduces for member in agreed[0])


def test_the_majority_goes_on() -> None:
    """The larger set wins; of equal ones that with more weight; of equal weights the smaller digest."""
    four = ["a", "b", "c", "d"]
    assert ids(agree(four, [hello(1), hello(0, 9.0), hello(1), hello(1)])) == [
        "a",
        "c",
        "d",
    ]
    assert ids(agree(four, [hello(0), hello(1), hello(0), hello(1, 1.5)])) == ["b", "d"]
    assert ids(agree(four, [hello(1), hello(0), hello(1), hello(0)])) == ["b", "d"]


def test_who_stands_at_another_round_is_left_out() -> None:
    """A stale or premature peer is no member."""
    agreed = agree(["a", "b", "c"], [hello(round=ROUND - 1), hello(), hello(round=ROUND + 1)])
    assert ids(agreed) == ["b"]


def test_somebody_has_to_reduce() -> None:
    """A set in which nobody can be dialled is not chosen, however large; with no other set there is no round."""
    unreachable = [hello(0, reach=CLIENT)] * 3
    assert ids(agree(["a", "b", "c", "d"], [*unreachable, hello(1)])) == ["d"]
    assert agree(["a", "b", "c"], unreachable) == []
    assert agree([], []) == []


@pytest.mark.parametrize(
    "bad",
    [
        raw(weight=math.nan),
        raw(weight=math.inf),
        raw(weight=-math.inf),
        raw(weight=-1.0),
        raw(weight=0.0),
        raw(weight=1e-300),  # the codec's smallest weight is 1e-9: every reducer would fail
        raw(weight=MAX_WEIGHT * 1.001),
        raw(weight=5),
        raw(weight="1.0"),
        raw(version=PROTOCOL_VERSION + 1),
        raw(round=float(ROUND)),
        raw(digest=b"short"),
        raw(digest="x" * 32),
        raw(reach=1),
        raw(reach="everywhere"),
        msgpack.packb({"version": PROTOCOL_VERSION}),
        msgpack.packb([1, 2, 3]),
        msgpack.packb(None),
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        raw(said=bytes(8 * 1024)),
    ],
)
def test_one_peers_garbage_changes_nothing_for_the_others(bad: bytes) -> None:
    """Who says something impossible is left out, and the others' round is as it would have been without it."""
    good = agree(["a", "c"], [hello(), hello(weight=2.0)])
    assert agree(["a", "b", "c"], [hello(), bad, hello(weight=2.0)]) == good
    assert ids(good) == ["a", "c"]


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_garbage_never_raises(blob: bytes) -> None:
    """Arbitrary bytes are left out."""
    assert ids(agree(["a", "b"], [hello(), blob])) == ["a"]


def test_every_weight_that_is_agreed_on_can_be_reduced() -> None:
    """The smallest weight that is agreed on is not below the codec's; the largest is the manifest's."""
    assert wire.MIN_WEIGHT <= MIN_WEIGHT
