"""Laws of showing a contribution: it is what its sender has signed, to members only, and two of them are noticed."""

from __future__ import annotations

import pytest
from round_tools import CODEC, IDENTITIES, PEERS, ROUND, Group, make_payload, play, quicken

from dtrain.compression.errors import PayloadError
from dtrain.dht import contributions as contributions_module
from dtrain.dht.contributions import Contributions, Sent, TwoPayloads
from dtrain.dht.streams import StreamError

MEMBERS = 5


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


async def after_a_round(group: Group) -> list[Contributions]:
    """Everybody's, once the round is over."""
    await group.run()
    found = [Contributions(CODEC, IDENTITIES[i]) for i in range(MEMBERS)]
    for contributions, runner in zip(found, group.runners, strict=True):
        contributions.note(runner)
    return found


async def show(sender: Contributions, asker: int, digest: object) -> tuple[dict[str, bytes], bytes]:
    return await sender.give(PEERS[asker], {"setting": digest})


def round_of(contributions: Contributions, sender: int) -> Sent:
    sent = contributions.find(PEERS[sender], ROUND)
    assert sent is not None
    return sent


@pytest.mark.parametrize("recompress", [True, False])
def test_a_member_shows_what_it_has_sent(recompress: bool) -> None:
    """All of it, to another member of the round."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=recompress)
        members = await after_a_round(group)
        sent = round_of(members[1], 3)
        header, payload = await show(members[3], 1, sent.setting.digest)
        members[1].check(sent, PEERS[3], header, payload)
        assert payload == group.payloads[3]
        assert (PEERS[3] in sent.received) == recompress

    play(scenario)


def test_only_members_are_answered_and_once() -> None:
    """Nobody can have a stranger upload for it, over and over."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        members = await after_a_round(group)
        digest = group.runners[0].setting.digest
        await show(members[3], 1, digest)
        for asker, wanted in ((1, digest), (9, digest), (2, bytes(32)), (2, ["no", "digest"])):
            with pytest.raises(StreamError):
                await show(members[3], asker, wanted)
        assert members[3].find(PEERS[9], ROUND) is None
        assert members[3].find(PEERS[1], ROUND + 1) is None

    play(scenario)


def test_who_shows_another_payload_has_signed_two() -> None:
    """Whoever reduced one of its sections sees it."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        members = await after_a_round(group)
        group.runners[3].payload = make_payload(99)
        members[3].note(group.runners[3])
        sent = round_of(members[1], 3)
        header, payload = await show(members[3], 1, sent.setting.digest)
        with pytest.raises(TwoPayloads):
            members[1].check(sent, PEERS[3], header, payload)

    play(scenario)


def test_what_is_not_signed_is_nobodys() -> None:
    """Neither with another's signatures, nor with too few of them, nor what is no payload of that round."""

    async def scenario() -> None:
        members = await after_a_round(Group(MEMBERS, recompress=True))
        sent = round_of(members[1], 3)
        header, payload = await show(members[3], 1, sent.setting.digest)
        others, _ = await show(members[4], 1, sent.setting.digest)
        for bad in (others, {"signatures": header["signatures"][:-1]}, {}, {"signatures": 3}):
            with pytest.raises(StreamError):
                members[1].check(sent, PEERS[3], bad, payload)
        for wrong in (payload[:-1], make_payload(3, round=ROUND + 1), b""):
            with pytest.raises(PayloadError):
                members[1].check(sent, PEERS[3], header, wrong)

    play(scenario)


def test_few_rounds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones, and only the newest where they are large."""

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True)
        [contributions, *_] = await after_a_round(group)
        later = Group(MEMBERS, recompress=True, after=group)
        await later.run()
        digests = [runner.runners[0].setting.digest for runner in (group, later)]
        contributions.note(later.runners[0])
        for digest in digests:
            await show(contributions, 1, digest)
        monkeypatch.setattr(contributions_module, "KEPT_BYTES", 1)
        contributions.note(later.runners[0])
        with pytest.raises(StreamError):
            await show(contributions, 2, digests[0])
        await show(contributions, 2, digests[1])

    play(scenario)
