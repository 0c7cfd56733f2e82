"""What a worker does that nobody can dial: it waits for one that can be, and never leaves the run by going on alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.averaging.group_info import GroupInfo
from hivemind.utils import get_dht_time

from dtrain.dht.history import RoundRecord
from dtrain.dht.matchmaking import RoundMatchmaking, Ticket
from dtrain.dht.meeting import NO_LEADER, NOBODY, Rounds
from dtrain.dht.membership import Contribution
from dtrain.dht.outcome import PeerView
from dtrain.dht.peer_record import PeerRecord
from dtrain.trainer.exchange import can_give

CONTRIBUTION = Contribution(3, bytes(32), b"payload", 10.0)


def record(name: str, state: str = "training", **status: object) -> PeerRecord:
    return PeerRecord(name, {"state": state, "round": 3, "work": 0.0, "digest": "", **status}, 0.0, 0.0, 1e12)


class Others:
    """Heartbeats that say what the test wants."""

    def __init__(self, *records: PeerRecord):
        self.records = list(records)

    def active(self) -> list[PeerRecord]:
        return [record for record in self.records if record.is_active]

    def ahead(self) -> list[PeerRecord]:
        return []

    def sees_an_archive(self) -> bool:
        return any(record.is_archive for record in self.records)

    async def refresh(self) -> None: ...


class Averager:
    """Every group meets at once."""

    terms = SimpleNamespace(matchmaking_s=0.6)

    def __init__(self) -> None:
        self.expected = -1

    async def judge_residual(self, round: int, fetch: Any) -> None: ...

    async def run_alone(self, contribution: Contribution) -> RoundRecord:
        return RoundRecord(contribution.round, contribution.base_digest, ["me"], aggregates=[b"mine"])

    async def run_round(self, contribution: Contribution, expected: Any) -> RoundRecord:
        self.expected = expected()
        return RoundRecord(contribution.round, contribution.base_digest, ["me", "you"], aggregates=[b"ours"])


class MayBeAhead(Others):
    are_ahead = False

    def ahead(self) -> list[PeerRecord]:
        return self.records if self.are_ahead else []

    def donors(self) -> list[PeerRecord]:
        return self.records


class Remembers(Averager):
    """Gets nothing of any round, but knows a past one, of which our part is in the first of two spans."""

    peer_id = "me"
    terms = SimpleNamespace(matchmaking_s=0.6, run_tag=b"")
    codec = SimpleNamespace(
        num_chunks=8, contributors=lambda aggregate: [(0, 1.0)] if aggregate == b"a" else []
    )

    def __init__(self, past: RoundRecord) -> None:
        super().__init__()
        self.past = past

    async def run_round(self, contribution: Contribution, expected: Any) -> RoundRecord:
        return RoundRecord(contribution.round, contribution.base_digest, ["me", "you"])

    async def fetch_round(self, peer_id: str, round: int) -> RoundRecord:
        return self.past


def behind(past: RoundRecord) -> tuple[Rounds, MayBeAhead]:
    averager: Any = Remembers(past)
    others: Any = MayBeAhead(record("you"))
    rounds = Rounds(
        averager, others, is_client=False, may_be_cut_off=lambda: False, passed_folder=Path("nowhere")
    )
    return rounds, others


def meeting(others: Others, is_client: bool, is_cut_off: bool = False) -> Rounds:
    averager: Any = Averager()
    cut_off = is_client or is_cut_off
    return Rounds(
        averager,
        others,  # type: ignore[arg-type]
        is_client=is_client,
        may_be_cut_off=lambda: cut_off,
        passed_folder=Path("nowhere"),
    )


def verdict(others: Others, *, is_client: bool, is_cut_off: bool = False) -> dict[str, Any]:
    rounds = meeting(others, is_client, is_cut_off)
    return asyncio.run(rounds.run(CONTRIBUTION))


@pytest.mark.parametrize("others", [(), ("client",), ("client", "client")])
def test_who_cannot_be_dialled_waits_for_one_that_can(others: tuple[str, ...]) -> None:
    """With nobody, or only with its like, such a worker has nobody to meet; it says so, and goes on waiting."""
    there = Others(*(record(str(n), reach=reach) for n, reach in enumerate(others)))
    reply = verdict(there, is_client=True)
    assert reply["verdict"] == "no-group"
    assert reply["problem"] == f"no group within 1 s: {NO_LEADER if others else NOBODY}"


@pytest.mark.parametrize("others", [(), ("direct",)])
def test_who_sees_nobody_because_it_is_offline_waits(others: tuple[str, ...]) -> None:
    """It says so, and does not train a run of its own meanwhile; where others are seen nobody asks."""
    there = Others(*(record(str(n), reach=reach) for n, reach in enumerate(others)))
    reply = verdict(there, is_client=False, is_cut_off=True)
    assert reply["verdict"] == ("done" if others else "no-group")
    assert others or "0 other workers of this run are visible" in reply["problem"]


def test_who_can_be_dialled_goes_on_alone() -> None:
    assert verdict(Others(), is_client=False)["verdict"] == "alone"
    gone = Others(record("a", "leaving"), record("b", "finished", reach="client"))
    assert verdict(gone, is_client=False)["verdict"] == "alone"


@pytest.mark.parametrize(
    ("was_sent", "contributors", "base", "expected"),
    [
        (True, ["me", "you"], bytes(32), "done"),
        (True, ["you"], bytes(32), "stale"),  # nothing of ours arrived
        (True, ["me", "you"], bytes(31) + b"x", "stale"),  # that round was on another theta
        (False, ["me", "you"], bytes(32), "stale"),
    ],
)
def test_what_was_sent_before_the_network_process_died_goes_once(
    was_sent: bool, contributors: list[str], base: bytes, expected: str
) -> None:
    """The others have ended the round meanwhile: what they have of our payload is delivered, the rest comes back."""
    members, spans = ["me", "you"], [[0, 4], [4, 4]]
    rounds, others = behind(RoundRecord(3, base, members, contributors, spans, [b"a", b"b"]))
    others.are_ahead = True
    reply = asyncio.run(rounds.run(replace(CONTRIBUTION, was_sent=was_sent)))
    assert reply["verdict"] == expected
    assert expected == "stale" or (reply["undelivered"], reply["aggregates"]) == ([[4, 4]], [b"a", b"b"])


def test_what_was_sent_before_a_freeze_goes_once() -> None:
    """Frozen when its sections were out: it comes to, gets nothing of the round any more, and asks the others first."""
    past = RoundRecord(3, bytes(32), ["me", "you"], ["me", "you"], [[0, 4], [4, 4]], [b"a", b"b"])
    rounds, others = behind(past)
    reply = asyncio.run(rounds.run(CONTRIBUTION))
    assert reply["verdict"] == "no-group" and "no span reached anybody" in reply["problem"]
    others.are_ahead = True
    reply = asyncio.run(rounds.run(CONTRIBUTION))
    assert (reply["verdict"], reply["undelivered"]) == ("done", [[4, 4]])
    assert asyncio.run(rounds.run(replace(CONTRIBUTION, payload=b"another")))["verdict"] == "stale"


def test_a_leader_that_comes_ends_the_wait() -> None:
    """The worker meets it in the very round that it has waited with."""

    async def scenario() -> dict[str, Any]:
        there = Others(record("a", reach="client"))
        rounds = meeting(there, is_client=True)
        asyncio.get_running_loop().call_later(0.1, there.records.append, record("b", reach="direct"))
        return await rounds.run(CONTRIBUTION)

    assert asyncio.run(scenario())["verdict"] == "done"


@pytest.mark.parametrize("reach", ["client", "direct"])
def test_who_cannot_be_dialled_is_asked_for_nothing(reach: str) -> None:
    """Its theta may be ahead, but nobody can have it."""
    peer = record("a", reach=reach)
    view = PeerView("a", peer.status, 0.0)
    assert peer.can_be_dialled == peer.can_give == can_give(view) == (reach == "direct")
    for said in ({"state": "joining"}, {"state": "paused", "gives": False}):
        silent = record("a", **said, reach=reach)  # type: ignore[arg-type]
        assert not can_give(PeerView("a", silent.status, 0.0)) and not silent.can_give


def test_who_cannot_lead_waits_for_any_leader() -> None:
    """A leader turns away whoever gives up before its group starts, and may have begun its search after us: each
    request lasts as long as the ticket of a leader that begins just now."""
    ours = SimpleNamespace(client_mode=True, _ticket_lasts_s=23.0)
    until = RoundMatchmaking.get_request_expiration_time(ours)  # type: ignore[arg-type]
    assert until == pytest.approx(get_dht_time() + 23.0, abs=5.0)


@pytest.mark.parametrize(("asleep_s", "met"), [(0.0, True), (30.0, False)])
def test_a_group_that_forms_after_a_sleep_is_none(
    asleep_s: float, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leader that is frozen with followers in its group starts it when it thaws; they have met without it by then."""
    group, asleep = GroupInfo(b"group", (), ()), [0.0]
    monkeypatch.setattr("dtrain.dht.matchmaking.get_dht_time", lambda: get_dht_time() + asleep[0])

    async def search(ticket: Ticket) -> GroupInfo:
        asleep[0] = asleep_s
        return group

    ours = SimpleNamespace(
        group_key_manager=SimpleNamespace(prefix=""),
        _base_prefix="run",
        _set_sizes=lambda count: None,
        _start_when_complete=lambda expected: asyncio.sleep(60),
        look_for_group=search,
        assembled_group=SimpleNamespace(done=lambda: True),
    )

    async def scenario() -> GroupInfo | None:
        ticket = Ticket(b"", scheduled_time=get_dht_time() + 15, deadline=get_dht_time() + 23)
        return await RoundMatchmaking.find_round_group(ours, 3, ticket, lambda: 2)  # type: ignore[arg-type]

    assert asyncio.run(scenario()) is (group if met else None)
