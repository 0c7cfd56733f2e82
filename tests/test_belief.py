"""Laws of whose word is taken: few that boast hold nobody up for long, and no past round of a liar's making is used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from round_tools import Group, play, quicken

from dtrain.compression.belief import DOUBT_S, FORGIVENESS, PATIENCE_S, Belief, ahead, enough
from dtrain.dht.history import RoundRecord, prove, signers
from dtrain.dht.identity import Identity
from dtrain.dht.meeting import Rounds
from dtrain.dht.peer_record import PeerRecord
from dtrain.dht.seals import Setting, sign_aggregate
from dtrain.trainer.clock import SYSTEM_CLOCK
from dtrain.trainer.manifest import preset_manifest
from dtrain.trainer.pacing import Pace, Pacer

RUN, ROUND, BASE = b"run-tag!", 5, bytes(range(32))
IDENTITIES = [Identity(Path(), Ed25519PrivateKey.from_private_bytes(bytes([i + 1] * 32))) for i in range(7)]
IDS = [identity.peer_id for identity in IDENTITIES]

# ---------------------------------------------------------------------- who says that it is ahead


def watch(
    belief: Belief, works: dict[str, float], begin: float, seconds: float, num_active: int = 0
) -> set[str]:
    found: set[str] = set()
    for second in range(int(seconds) + 1):
        stands = {peer: (work, str(work)) for peer, work in works.items()}
        found = belief.ahead(stands, (10.0, "10.0"), num_active or len(works), begin + second)
    return found


def test_few_that_boast_are_believed_for_half_a_minute() -> None:
    """Two of six: followed at first, as they may be just ahead; then not any more, for minutes after they stop too."""
    belief = Belief()
    works = {"liar": 1e9, "other liar": 11.0, "a": 10.0, "b": 10.0, "c": 9.0, "d": 10.0}
    assert watch(belief, works, 0.0, PATIENCE_S - 1) == {"liar", "other liar"}
    assert watch(belief, works, PATIENCE_S, 1000) == set()
    humble = {**works, "liar": 10.0, "other liar": 10.0}
    assert watch(belief, humble, 2000.0, 60.0) == set()
    assert watch(belief, works, 2061.0, 1.0) == set()
    long = (DOUBT_S - PATIENCE_S) / FORGIVENESS
    assert watch(belief, humble, 3000.0, long) == set()
    assert watch(belief, works, 3000.0 + long + 1, 1.0) == {"liar", "other liar"}


def test_most_are_believed_for_as_long_as_it_takes() -> None:
    """A newcomer that downloads for an hour, and a swarm too small to tell who lies."""
    assert watch(Belief(), dict.fromkeys("abc", 50.0) | dict.fromkeys("de", 1.0), 0.0, 3600) == set("abc")
    assert watch(Belief(), {"a": 50.0, "b": 10.0, "c": 10.0}, 0.0, 3600) == {"a"}
    paused = dict.fromkeys("abcdefg", 10.0)  # who trains nothing cannot know
    assert watch(Belief(), {**paused, "x": 50.0, "y": 50.0}, 0.0, 3600, num_active=2) == {"x", "y"}


def test_who_is_ahead_for_a_moment_each_round_stays_believed() -> None:
    """Somebody is always first, for a second or two of each ten."""
    belief, works = Belief(), dict.fromkeys("abcdef", 10.0)
    for number in range(0, 3600, 10):
        assert watch(belief, {**works, "a": 20.0}, float(number), 1.0) == {"a"}
        assert watch(belief, works, number + 2.0, 8.0) == set()


@pytest.mark.parametrize(
    ("ours", "theirs", "follows"),
    [
        ((3, "b"), (4, "a"), True),  # halves of a split network: the smaller digest
        ((3, "a"), (4, "b"), False),
        ((2, "a"), (4, "b"), True),  # unequal ones: where more are
        ((4, "b"), (3, "a"), False),
        ((0, "b"), (1, "a"), True),  # in a swarm of two nobody can tell who lies
        ((0, "a"), (1, "b"), False),
        ((0, "a"), (6, "b"), True),  # one that diverged alone
        ((6, "b"), (1, "a"), False),
    ],
)
def test_of_equal_histories_one_is_the_runs(
    ours: tuple[int, str], theirs: tuple[int, str], follows: bool
) -> None:
    """`ours` and `theirs` are how many others stand with us and elsewhere, and at which digest. At once and for as long
    as it takes, and never do both sides follow each other."""
    own, other = (10.0, ours[1]), (10.0, theirs[1])
    stands = {f"with us {i}": own for i in range(ours[0])} | {f"other {i}": other for i in range(theirs[0])}
    expected = {peer for peer in stands if "other" in peer} if follows else set()
    belief = Belief()
    for now in (0.0, 100.0, 1000.0):
        assert belief.ahead(stands, own, len(stands), now) == expected


def test_a_tie_that_few_boast_of_stops_nobody() -> None:
    """Who is first at the end of a round stands there alone with a liar, for a moment."""
    stands = {"liar": (10.0, "0"), **{f"peer {i}": (9.0, "x") for i in range(5)}}
    assert ahead(stands, (10.0, "a"), len(stands)) == set()


# ---------------------------------------------------------------------- past rounds


def setting(members: int = 5) -> Setting:
    return Setting(RUN, ROUND, BASE, b"group", tuple((peer, 10.0) for peer in IDS[:members]))


def past(signed_by: tuple[int, ...] = (0, 1, 2), **changed: Any) -> RoundRecord:
    """A round of five, whose spans three of them reduced."""
    aggregates, place = [b"one", b"two", b"three"], setting()
    spans = [(16 * i, 16) for i in range(3)]
    made = zip(signed_by, spans, aggregates)
    seals = [sign_aggregate(IDENTITIES[i], place, span, aggregate) for i, span, aggregate in made]
    record = RoundRecord(ROUND, BASE, IDS[:5], IDS[:5], [list(span) for span in spans], aggregates)
    return replace(record, proof=prove(place, seals), **changed)


def test_a_past_round_is_borne_out_by_who_signed_it() -> None:
    """Not with another aggregate, span, theta, round, run or group in it, nor with one seal missing."""
    assert signers(past(), RUN) == IDS[:3]
    assert signers(past(), b"another!") == []
    for changed in (
        {"aggregates": [b"one", b"two", b"four"]},
        {"spans": [[0, 16], [16, 16], [48, 16]]},
        {"base_digest": bytes(32)},
        {"round": ROUND + 1},
        {"members": IDS[:4]},
    ):
        assert signers(replace(past(), **changed), RUN) == []  # type: ignore[arg-type]
    assert signers(past((0, 1)), RUN) == []
    assert signers(past((0, 1, 6)), RUN) == []  # one of no member
    assert signers(replace(past(), proof=b""), RUN) == signers(replace(past(), proof=b"x"), RUN) == []


class Peers:
    """Heartbeats and averager in one: who is there, and what each has of a past round."""

    terms = SimpleNamespace(run_tag=RUN)

    def __init__(self, has: dict[str, RoundRecord], reach: str = "direct"):
        self.has, self.reach = has, reach

    def donors(self) -> list[PeerRecord]:
        return [
            PeerRecord(peer, {"state": "training", "reach": self.reach}, 0.0, 0.0, 1e12) for peer in self.has
        ]

    active = donors

    async def fetch_round(self, peer_id: str, round: int) -> RoundRecord:
        return self.has[peer_id]


def fetched(has: dict[str, RoundRecord], unlike: Sequence[bytes] = ()) -> RoundRecord | None:
    peers: Any = Peers(has)
    rounds = Rounds(
        peers, peers, is_client=False, may_be_cut_off=lambda: False, passed_folder=Path("nowhere")
    )
    return asyncio.run(rounds._past(ROUND, unlike))


FORGED = replace(past(), aggregates=[b"mine", b"too", b"all"], proof=b"")


def test_a_forged_past_round_is_not_taken() -> None:
    """Whoever offers it first; the honest one is, from anybody, if most that we see have signed it."""
    liar, honest = IDS[5], IDS[:5]
    assert fetched({liar: FORGED, **dict.fromkeys(honest, past())}) == past()
    own_key = replace(past((5, 5, 5)), members=IDS[:6])
    assert fetched({liar: own_key, honest[0]: past(), honest[1]: past(), honest[2]: past()}) == past()
    assert fetched({liar: FORGED, **dict.fromkeys(honest, replace(past(), proof=b"", members=[]))}) != FORGED


def test_old_rounds_whose_reducers_are_gone_need_several_words() -> None:
    """More than a third of those that could have it; in a swarm of three nobody can tell."""
    gone = replace(past(), members=["x"], proof=b"")
    there = {f"peer {i}": gone for i in range(3)}
    assert fetched({"liar": FORGED, **there, "other": replace(FORGED, aggregates=[])}) == gone
    few = {"liar": FORGED, **{f"peer {i}": replace(gone, spans=[[i, 1]]) for i in range(4)}}
    assert fetched(few) is None
    assert fetched({"a": gone, "b": FORGED}) == gone


def test_a_round_with_two_ends_is_had_as_the_others_have_it() -> None:
    """Each half of a split network has ended it by itself: neither end is signed by most."""
    ours, theirs = (replace(past(), aggregates=[b"a", b"b", end], proof=b"") for end in (b"c", b"d"))
    has = {f"peer {i}": ours if i < 3 else theirs for i in range(7)}
    assert fetched(has, ours.aggregates) == theirs and fetched(has, theirs.aggregates) == ours
    assert fetched(dict.fromkeys(has, ours), ours.aggregates) is None
    assert fetched({**dict.fromkeys(list(has)[:5], ours), "liar": theirs}, ours.aggregates) is None


def test_a_state_needs_the_words_of_more_than_a_third() -> None:
    assert [enough(number) for number in (1, 3, 5, 6, 15, 16)] == [2, 2, 2, 3, 6, 6]


# ---------------------------------------------------------------------- when a round is over


def remaining(*statuses: dict[str, object], tokens: int = 100) -> float:
    """Seconds left of a round of 1,000 tokens for a worker that has trained 100, at 10 a second."""
    manifest = preset_manifest("pace", "tiny", {"exchange.round_tokens": 1000})
    base = {"state": "training", "training_round": 3, "round": 3, "tokens_per_s": 10.0, "round_tokens": 100}
    views = [SimpleNamespace(status={**base, **status}, age_s=0.0) for status in statuses]
    exchange: Any = SimpleNamespace(swarm=lambda: views)
    pace = Pace(3, SYSTEM_CLOCK.monotonic() - 10.0, tokens, 5)
    return Pacer(manifest, exchange).remaining_s(pace)


def test_few_liars_end_no_round() -> None:
    """Tokens that were never trained count four times the others' at most; of the end more than a third must say so."""
    honest: list[dict[str, object]] = [{}] * 5
    assert remaining(*honest) == pytest.approx(400 / 60, rel=0.05)
    assert remaining(*honest[1:], {"round_tokens": 1e12}) == pytest.approx(100 / 60, rel=0.05)
    assert remaining(*honest, {"training_round": 4}) > 4.0
    assert remaining(*honest, {"state": "exchanging"}) > 4.0
    assert remaining(*honest[:4], *[{"training_round": 4}] * 3) == 0.0
    assert remaining({}, {"state": "exchanging"}) == 0.0  # of two others one is enough


def test_a_frozen_member_believes_the_reducers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another member says of our round must be signed by each span's own reducer."""
    quicken(monkeypatch)

    async def scenario() -> None:
        group = Group(3, recompress=True)
        records = await group.run()
        ours, theirs = group.runners[0], records[1]
        assert ours.bears_out(theirs)
        assert not ours.bears_out(replace(theirs, aggregates=theirs.aggregates[::-1]))
        assert not ours.bears_out(replace(theirs, proof=b""))
        setting, identity = ours.setting, group.runners[1]._identity
        spans = [(first, count) for first, count in theirs.spans]
        seals = [sign_aggregate(identity, setting, s, a) for s, a in zip(spans, theirs.aggregates)]
        assert not ours.bears_out(replace(theirs, proof=prove(setting, seals)))  # all by one

    play(scenario)
