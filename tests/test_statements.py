"""Laws of what members say of each other in their hellos: it arrives, it stays small, and no bytes fail a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression.standing import FIRST_SHARE, PROBATION, Said, Statement
from dtrain.dht import statements
from dtrain.dht.membership import MAX_HELLO_BYTES, Agreed, Contribution, Judging, agree_on_members, pack_hello
from dtrain.dht.reachability import CLIENT, DIRECT
from dtrain.dht.statements import ENTRY_BYTES, MAX_OUT, MAX_PEERS, network_of

ROUND, BASE = 7, bytes(range(32))
PEERS = [f"peer-{i:02}" for i in range(16)]
OLD = Said(PROBATION)
JUDGING = Judging(5, 0.34)


def hello(said: Mapping[str, Said], weight: float = 100.0, reach: str = DIRECT, num_out: int = 0) -> bytes:
    contribution = Contribution(ROUND, BASE, b"", weight)
    return pack_hello(contribution, reach=reach, said=said, num_out=num_out)


def everybody(truth: Mapping[str, Said], number: int = 16) -> dict[str, bytes]:
    """Hellos of members that all say the same, and that others have been there for long where nothing is said."""
    peers = PEERS[:number]
    return {own: hello({peer: truth.get(peer, OLD) for peer in peers if peer != own}) for own in peers}


def agree(hellos: Mapping[str, bytes], judging: Judging = JUDGING) -> Agreed:
    return agree_on_members(list(hellos), list(hellos.values()), ROUND, judging=judging)


def shares(agreed: Agreed) -> dict[str, float]:
    return {member.peer_id: member.share for member in agreed.members}


def test_what_is_said_arrives() -> None:
    """Rounds, accusations, and who is of one network with whom, which is not named."""
    said = {"a": Said(3, b"\x0a\x00\x01", True), "b": Said(0, b"\x0a\x00\x01"), "c": Said(5), "d": Said(1)}
    packed = statements.pack(said, BASE)
    assert len(packed) == ENTRY_BYTES * len(said)
    read = statements.unpack(packed, 2, ["a", "b", "c", "x"], BASE)
    assert read.num_out == 2
    assert read.of.keys() == {"a", "b", "c"}
    assert [(w.rounds, w.accuses, bool(w.network)) for w in read.of.values()] == [
        (3, True, True),
        (0, False, True),
        (5, False, False),
    ]
    assert read.of["a"].network == read.of["b"].network
    assert statements.unpack(packed, 2, ["a", "b", "c"], bytes(32)) == Statement({}, 2)  # of another round


def test_a_newcomer_counts_for_a_quarter_and_who_is_accused_is_out() -> None:
    """As the members of a group of sixteen agree on by their hellos."""
    agreed = agree(everybody({PEERS[3]: Said(), PEERS[4]: Said(PROBATION, accuses=True)}))
    assert agreed.accused == [PEERS[4]]
    found = shares(agreed)
    assert found.pop(PEERS[3]) == FIRST_SHARE
    assert PEERS[4] not in found and set(found.values()) == {1.0}
    [newcomer] = [member for member in agreed.members if member.peer_id == PEERS[3]]
    assert (newcomer.weight, newcomer.counts) == (100.0, 25.0)
    assert agreed.apart(PEERS[0], PEERS) == agreed.apart(PEERS[4], PEERS) == []


def test_a_crowd_of_one_network_or_token_is_limited() -> None:
    """Seven of sixteen; in a run by token the passes say whose they are."""
    crowd = PEERS[9:]
    networks = {p: Said(PROBATION, b"crowd" if p in crowd else p.encode()) for p in PEERS}
    origin = Judging(5, 0.34, lambda peer_id, shown: b"one" if peer_id in crowd else peer_id.encode())
    for agreed in (agree(everybody(networks)), agree(everybody({}), origin)):
        counts = {member.peer_id: member.counts for member in agreed.members}
        assert sum(counts[p] for p in crowd) / sum(counts.values()) == pytest.approx(0.34)
    assert set(shares(agree(everybody(networks), Judging(5, 1.0))).values()) == {1.0}


def test_too_few_or_an_undefended_run_are_not_judged() -> None:
    """Of four nobody is, nor of any where the manifest has no judging."""
    truth = {PEERS[3]: Said(0, b"", True)}
    for agreed in (agree(everybody(truth, 4)), agree(everybody(truth), Judging())):
        assert not agreed.accused
        assert set(shares(agreed).values()) == {1.0}


def test_somebody_is_left_to_reduce() -> None:
    """The only one that can be called is not put out."""
    truth = {PEERS[0]: Said(PROBATION, accuses=True)}
    peers = PEERS[:6]
    hellos = {
        own: hello(
            {p: truth.get(p, OLD) for p in peers if p != own}, reach=DIRECT if own == PEERS[0] else CLIENT
        )
        for own in peers
    }
    assert agree(hellos).accused == []


def test_a_statement_is_bounded() -> None:
    """In a swarm of thousands it is about some hundreds of them."""
    said = {f"peer-{i}": OLD for i in range(5000)}
    packed = statements.pack(said, BASE)
    assert len(packed) == ENTRY_BYTES * MAX_PEERS
    assert len(statements.unpack(packed, 0, said, BASE).of) == MAX_PEERS
    assert statements.unpack(packed + packed[:ENTRY_BYTES], 0, said, BASE) == Statement()
    assert len(hello(said)) < MAX_HELLO_BYTES - 1000  # room for a pass and the rest


def test_the_statements_of_sixteen_take_two_kilobytes() -> None:
    """120 bytes in each hello: what a leader hands to each of the others is 16 times that."""
    with_words = sum(map(len, everybody({}).values()))
    without = sum(len(hello({})) for _ in PEERS)
    assert with_words - without <= 16 * (ENTRY_BYTES * 15 + 14)


entries = st.lists(st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES), max_size=20).map(b"".join)
marks = st.sampled_from([statements.mark(peer, BASE) for peer in PEERS])
pointed = st.lists(
    st.tuples(marks, st.integers(0, 255), st.binary(min_size=3, max_size=3)).map(
        lambda e: e[0] + bytes([e[1]]) + e[2]
    ),
    max_size=40,
).map(b"".join)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=64)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def raw(said: Any, out: Any) -> bytes:
    fields = msgpack.unpackb(hello({}))
    return bytes(msgpack.packb({**fields, "said": said, "out": out}))


@given(said=entries | pointed | anything, out=st.integers(-5, MAX_OUT + 5) | anything)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_hostile_words_of_one_change_nothing_for_the_others(said: Any, out: Any) -> None:
    """Whatever one of sixteen says: it is in the round as the others say it, and so are they."""
    honest = everybody({PEERS[3]: Said(2), PEERS[4]: Said(PROBATION, b"net")})
    agreed = agree({**honest, PEERS[15]: raw(said, out)})
    assert shares(agreed) == shares(agree(honest))
    assert agreed.accused == []


@given(said=entries | pointed | anything, out=anything)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_a_statement_that_is_read_is_one(said: Any, out: Any) -> None:
    """Everything in it is in its range, and of peers that are there."""
    read = statements.unpack(said, out, PEERS, BASE)
    assert set(read.of) <= set(PEERS)
    assert 0 <= read.num_out <= MAX_OUT
    assert all(0 <= words.rounds <= PROBATION and len(words.network) in (0, 3) for words in read.of.values())


def test_two_words_on_one_peer_are_none() -> None:
    """Nobody can say both."""
    twice = statements.pack({"a": OLD}, BASE) + statements.pack({"a": Said(1)}, BASE)
    assert statements.unpack(twice, 0, ["a"], BASE) == Statement()


@pytest.mark.parametrize(
    ("addresses", "network"),
    [
        (["/ip4/203.0.113.7/tcp/31000"], bytes([203, 0, 113])),
        (["/ip4/192.168.1.4/tcp/1", "/ip4/8.8.4.4/tcp/1"], bytes([8, 8, 4])),
        (["/ip6/2001:db8:1:2::3/tcp/1"], bytes.fromhex("20010db80001")),
        (["/ip6/::ffff:203.0.113.7/tcp/1"], bytes([203, 0, 113])),
        (["/ip4/203.0.113.7/tcp/1/p2p/12D3KooW/p2p-circuit"], b""),
        (["/dns4/example.org/tcp/1", "", "/ip4"], b""),
        ([], b""),
    ],
)
def test_the_network_of_a_connection(addresses: list[str], network: bytes) -> None:
    """The most public address counts; of a connection through a relay it is not known."""
    assert network_of(addresses) == network
