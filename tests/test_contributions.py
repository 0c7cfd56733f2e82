"""Laws of showing a contribution: it is what its sender has signed, to members only, and two of them are noticed."""

from __future__ import annotations

import asyncio

import pytest
from round_tools import CODEC, IDENTITIES, PEERS, ROUND, Group, make_payload, play, quicken

from dtrain.compression.errors import PayloadError
from dtrain.dht import contributions as contributions_module
from dtrain.dht.contributions import Contributions, TwoPayloads
from dtrain.dht.streams import StreamError

MEMBERS = 5


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def after_a_round(group: Group) -> list[Contributions]:
    """Everybody's, once the round is over."""
    play(group)
    found = [Contributions(CODEC, IDENTITIES[i]) for i in range(MEMBERS)]
    for contributions, runner in zip(found, group.runners, strict=True):
        contributions.note(runner)
    return found


def show(sender: Contributions, asker: int, digest: object) -> tuple[dict[str, bytes], bytes]:
    return asyncio.run(sender.give(PEERS[asker], {"setting": digest}))


@pytest.mark.parametrize("recompress", [True, False])
def test_a_member_shows_what_it_has_sent(recompress: bool) -> None:
    """All of it, to another member of the round."""
    group = Group(MEMBERS, recompress=recompress)
    members = after_a_round(group)
    sent = members[1].find(PEERS[3], ROUND)
    assert sent is not None
    header, payload = show(members[3], 1, sent.setting.digest)
    members[1].check(sent, PEERS[3], header, payload)
    assert payload == group.payloads[3]


def test_only_members_are_answered_and_once() -> None:
    """Nobody can have a stranger upload for it, over and over."""
    group = Group(MEMBERS, recompress=True)
    members = after_a_round(group)
    digest = group.runners[0].setting.digest
    show(members[3], 1, digest)
    for asker, wanted in ((1, digest), (9, digest), (2, bytes(32)), (2, ["no", "digest"])):
        with pytest.raises(StreamError):
            show(members[3], asker, wanted)
    assert members[3].find(PEERS[9], ROUND) is None
    assert members[3].find(PEERS[1], ROUND + 1) is None


def test_who_shows_another_payload_has_signed_two() -> None:
    """Whoever reduced one of its sections sees it."""
    group = Group(MEMBERS, recompress=True)
    members = after_a_round(group)
    group.runners[3].payload = make_payload(99)
    members[3].note(group.runners[3])
    sent = members[1].find(PEERS[3], ROUND)
    assert sent is not None
    header, payload = show(members[3], 1, sent.setting.digest)
    with pytest.raises(TwoPayloads):
        members[1].check(sent, PEERS[3], header, payload)


def test_what_is_not_signed_is_nobodys() -> None:
    """Neither another's signatures, nor too few of them, nor what is no payload of that round."""
    group = Group(MEMBERS, recompress=True)
    members = after_a_round(group)
    sent = members[1].find(PEERS[3], ROUND)
    assert sent is not None
    header, payload = show(members[3], 1, sent.setting.digest)
    others, _ = show(members[4], 1, sent.setting.digest)
    for bad in (others, {"signatures": header["signatures"][:-1]}, {}, {"signatures": 3}):
        with pytest.raises(StreamError):
            members[1].check(sent, PEERS[3], bad, payload)
    for wrong in (payload[:-1], make_payload(3, round=ROUND + 1), b""):
        with pytest.raises(PayloadError):
            members[1].check(sent, PEERS[3], header, wrong)


def test_few_rounds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones, and less than that where they are large."""
    group = Group(MEMBERS, recompress=True)
    [contributions, *_] = after_a_round(group)
    later = Group(MEMBERS, recompress=True, after=group)
    play(later)
    digests = [runner.runners[0].setting.digest for runner in (group, later)]
    contributions.note(later.runners[0])
    for digest in digests:
        show(contributions, 1, digest)
    monkeypatch.setattr(contributions_module, "KEPT_BYTES", 1)
    contributions.note(later.runners[0])
    with pytest.raises(StreamError):
        show(contributions, 2, digests[0])
    show(contributions, 2, digests[1])
