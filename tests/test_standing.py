"""Laws of standing: nobody's word on itself counts, and no third of a group makes, moves or unmakes anybody."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.compression import standing
from dtrain.compression.standing import FIRST_SHARE, PROBATION, Candidate, Observations, Said, Statement
from dtrain.compression.verdicts import OUT_ROUNDS

OLD = Said(rounds=PROBATION)


def names(number: int) -> list[str]:
    return [f"peer-{i:02}" for i in range(number)]


def swarm(
    number: int,
    said: Mapping[str, Said] | None = None,
    *,
    networks: Sequence[bytes] = (),
    weights: Sequence[float] = (),
) -> list[Candidate]:
    """Members that say the same of each other: that all have been there for long, unless `said` is otherwise."""
    peers = names(number)
    truth = {peer: (said or {}).get(peer, OLD) for peer in peers}
    for peer, network in zip(peers, networks):
        truth[peer] = replace(truth[peer], network=network)
    return [
        Candidate(
            peer, weights[i] if weights else 100.0, Statement({p: truth[p] for p in peers if p != peer})
        )
        for i, peer in enumerate(peers)
    ]


def lie(group: list[Candidate], liars: Sequence[str], **words: Mapping[str, object]) -> list[Candidate]:
    """The same group, in which some say other things of some peers: `words` {field of Said: {peer: value}}."""
    told = []
    for member in group:
        of = dict(member.statement.of)
        if member.peer_id in liars:
            for name, values in words.items():
                for peer, value in values.items():
                    of[peer] = replace(of.get(peer, Said()), **{name: value})
        told.append(replace(member, statement=replace(member.statement, of=of)))
    return told


def counted(group: Sequence[Candidate], max_share: float = 0.34) -> dict[str, float]:
    found = standing.shares(group, max_share)
    return {member.peer_id: member.weight * found[member.peer_id] for member in group}


# ---------------------------------------------------------------------- probation


def test_a_newcomer_counts_for_a_quarter_and_rises() -> None:
    """From its first round on up to all of its weight; the others count in full."""
    for rounds in range(PROBATION + 1):
        found = standing.shares(swarm(6, {"peer-05": Said(rounds)}), 0.34)
        assert found.pop("peer-05") == pytest.approx(FIRST_SHARE + (1 - FIRST_SHARE) * rounds / PROBATION)
        assert set(found.values()) == {1.0}


@pytest.mark.parametrize("rounds", range(PROBATION + 1))
def test_where_all_are_alike_nothing_changes(rounds: int) -> None:
    """At the beginning of a run, or after a restart of all: weights count as they are, to the last bit."""
    group = swarm(8, dict.fromkeys(names(8), Said(rounds)), weights=[100.0 + i / 7 for i in range(8)])
    assert set(standing.shares(group, 0.34).values()) == {1.0}


def test_who_has_just_come_says_nothing_against_the_others() -> None:
    """Newcomers have seen nobody yet; those that are most see everybody all the same."""
    group = swarm(9, {"peer-07": Said(), "peer-08": Said()})
    unseen = dict.fromkeys(names(9), 0)
    found = standing.shares(lie(group, ["peer-07", "peer-08"], rounds=unseen), 0.34)
    assert [found[peer] for peer in names(9)] == [1.0] * 7 + [FIRST_SHARE] * 2


@pytest.mark.parametrize("number", range(5, 20))
def test_liars_in_the_minority_cannot_lift_themselves_or_push_others_down(number: int) -> None:
    """Each third of a group, newcomers that praise each other and deny everybody else."""
    liars = names(number)[: (number - 1) // 3]
    group = swarm(number, dict.fromkeys(liars, Said()))
    praise = {peer: PROBATION if peer in liars else 0 for peer in names(number)}
    found = standing.shares(lie(group, liars, rounds=praise), 0.34)
    assert {peer for peer, share in found.items() if share < 1.0} == set(liars)
    assert all(found[peer] == FIRST_SHARE for peer in liars)


# ---------------------------------------------------------------------- accusations


def test_more_than_a_third_of_the_members_put_out() -> None:
    """Of sixteen, six; and what somebody says of itself is not heard."""
    group = swarm(16)
    for number in (5, 6):
        accusing = lie(group, names(16)[:number], accuses={"peer-15": True})
        assert standing.accused(accusing) == (["peer-15"] if number == 6 else [])
    itself = lie(group, [*names(16)[:5], "peer-15"], accuses={"peer-15": True})
    assert standing.accused(itself) == []


@pytest.mark.parametrize("number", range(5, 20))
def test_a_third_that_accuses_everybody_puts_out_nobody(number: int) -> None:
    """As many liars as the rest of the judging stands."""
    liars = names(number)[: number // 3 if number > 5 else 1]
    assert standing.accused(lie(swarm(number), liars, accuses=dict.fromkeys(names(number), True))) == []


def test_never_more_than_a_third_are_out() -> None:
    """Those with the most accusers first; whoever is out already counts among them."""
    everybody = names(9)
    group = lie(swarm(9), everybody, accuses=dict.fromkeys(everybody[3:], True))
    group = lie(group, ["peer-00"], accuses={"peer-03": False})
    assert standing.accused(group) == ["peer-04", "peer-05", "peer-06"]
    two_out = [replace(m, statement=replace(m.statement, num_out=3)) for m in group]
    assert standing.accused(two_out) == ["peer-04"]  # of twelve, four
    boasting = [replace(m, statement=replace(m.statement, num_out=99)) for m in group[:3]]
    assert standing.accused([*boasting, *group[3:]]) == ["peer-04", "peer-05", "peer-06"]


def test_four_are_not_judged() -> None:
    """Too few to say much about each other."""
    group = lie(swarm(4, {"peer-03": Said()}), names(4), accuses={"peer-03": True})
    assert standing.accused(group) == []
    assert set(standing.shares(group, 0.1).values()) == {1.0}


# ---------------------------------------------------------------------- one origin


def share_of(peers: Sequence[str], group: Sequence[Candidate], max_share: float = 0.34) -> float:
    found = counted(group, max_share)
    return math.fsum(found[peer] for peer in peers) / math.fsum(found.values())


def many(number: int, crowd: int) -> list[bytes]:
    """Networks of a group in which the last ones have one and all others have their own."""
    return [b"%d" % i for i in range(number - crowd)] + [b"crowd"] * crowd


def test_a_crowd_of_one_network_counts_for_a_third() -> None:
    """Seven of sixteen; the others, and a crowd that is smaller than that, as they are."""
    group = swarm(16, networks=many(16, 7))
    assert share_of(names(16)[9:], group) == pytest.approx(0.34)
    assert {standing.shares(group, 0.34)[peer] for peer in names(16)[:9]} == {1.0}
    assert set(standing.shares(swarm(16, networks=many(16, 5)), 0.34).values()) == {1.0}


def test_one_token_is_one_crowd_whatever_its_networks() -> None:
    """The invite is proven, so no word of others is needed, and there is no other limit."""
    group = swarm(16, networks=[b"%d" % i for i in range(16)])
    tokened = [replace(m, origin=b"t" if i < 7 else b"own %d" % i) for i, m in enumerate(group)]
    assert share_of(names(16)[:7], tokened) == pytest.approx(0.34)
    same_place = [replace(m, origin=b"own %d" % i) for i, m in enumerate(swarm(16, networks=many(16, 7)))]
    assert set(standing.shares(same_place, 0.34).values()) == {1.0}


@pytest.mark.parametrize(
    "networks",
    [
        [b"lan"] * 8,
        [b""] * 8,
        [b"lan"] * 6 + [b"a", b"b"],  # a house with two guests
        [b"lan"] * 4 + [b"other"] * 4,
        [b"%d" % i for i in range(8)],
        [b"a", b"a", b"b", b"b", b"c", b"c", b"d", b"d"],
    ],
)
def test_honest_swarms_are_unaffected(networks: Sequence[bytes]) -> None:
    """All in one house, all unknown, mostly one house, two houses, everybody somewhere else."""
    weights = [100.0 * (1 + i % 3) for i in range(8)]
    assert set(standing.shares(swarm(8, networks=networks, weights=weights), 0.34).values()) == {1.0}


def test_the_organizer_sets_the_limit() -> None:
    """1 turns it off; where it is below an equal share for each, that is what each gets."""
    group = swarm(16, networks=many(16, 7))
    assert set(standing.shares(group, 1.0).values()) == {1.0}
    assert share_of(names(16)[9:], group, 0.2) == pytest.approx(0.2)
    thirds = swarm(9, networks=[b"a"] * 3 + [b"b"] * 3 + [b"c"] * 3, weights=[100.0] * 6 + [50.0] * 3)
    assert list(counted(thirds, 0.01).values()) == pytest.approx([50.0] * 9)


@pytest.mark.parametrize("number", range(5, 20))
def test_liars_in_the_minority_move_nobody(number: int) -> None:
    """A third cannot put others into its network, to have them limited, nor itself out of it."""
    liars = names(number)[: number // 3]
    truth = [b"liars" if peer in liars else b"%d" % i for i, peer in enumerate(names(number))]
    group = swarm(number, networks=truth)
    moved = {peer: b"alone" + peer.encode() if peer in liars else b"liars" for peer in names(number)}
    assert standing.shares(lie(group, liars, network=moved), 0.2) == standing.shares(group, 0.2)


def test_claims_of_tokens_do_not_widen_the_limit() -> None:
    """A crowd beside one that claims a million times its tokens, or with such a one in it."""
    for liar in (0, 15):
        weights = [1e8 if i == liar else 100.0 for i in range(16)]
        group = swarm(16, networks=many(16, 7), weights=weights)
        found = counted(group)
        assert found["peer-00"] <= 400.0
        assert share_of(names(16)[9:], group) == pytest.approx(0.34, rel=1e-6)


@given(
    weights=st.lists(st.floats(1e-6, 1e9), min_size=5, max_size=24),
    places=st.lists(st.integers(0, 6), min_size=24, max_size=24),
    rounds=st.lists(st.integers(0, PROBATION), min_size=24, max_size=24),
    max_share=st.floats(0.01, 1.0),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_crowd_has_more_than_its_share(
    weights: list[float], places: list[int], rounds: list[int], max_share: float
) -> None:
    """Of any weights, places and standings, where there are three places; and nobody ever gains weight."""
    number = len(weights)
    said = {peer: Said(count) for peer, count in zip(names(number), rounds)}
    group = swarm(number, said, networks=[b"%d" % place for place in places], weights=weights)
    found = standing.shares(group, max_share)
    assert all(0 < share <= 1 for share in found.values())
    crowds = {place: [p for p, q in zip(names(number), places) if q == place] for place in places[:number]}
    if len(crowds) < standing.MIN_GROUPS:
        return
    for crowd in crowds.values():
        if 1 < len(crowd) <= number / 2:
            limit = max(max_share, 1 / len(crowds))
            assert share_of(crowd, group, max_share) <= limit * (1 + 1e-6)


# ---------------------------------------------------------------------- what one member has seen


def test_a_member_says_what_it_has_seen() -> None:
    """Rounds up to the length of the probation, of the last thirty; networks that it knows; accusations for a time."""
    seen = Observations()
    for round in range(PROBATION + 2):
        seen.note(round, ["a", "b"] if round < 2 else ["a"])
    assert seen.of(["a", "b", "c"], 7, {"c": b"net"}) == {
        "a": Said(PROBATION),
        "b": Said(2),
        "c": Said(network=b"net"),
    }
    assert seen.of(["a", "b"], 7 + standing.REMEMBERED, {}) == {}
    seen.accuse("b", 7)
    assert seen.of(["b"], 7 + OUT_ROUNDS, {}) == {"b": Said(accuses=True)}
    assert seen.of(["b"], 8 + OUT_ROUNDS, {}) == {}
