"""How a follower waits for the leader of its group, without a network."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking

from dtrain.dht.matchmaking import AGAIN_S, POLL_S, RoundMatchmaking

PATIENCE_S = 30.0  # a timeout that must not run out


class Follower(RoundMatchmaking):
    """Who asks leaders; its hivemind half does what the test wants."""

    def __init__(self, here: set[str]) -> None:
        self._asked = None
        self.potential_leaders = SimpleNamespace(past_attempts={"b", "c"})
        self._heartbeats = SimpleNamespace(active=lambda: [SimpleNamespace(peer_id=peer) for peer in here])


@pytest.mark.parametrize("redirected", [False, True])
def test_a_leader_whose_power_was_cut_is_left(redirected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs up on nobody: who went on waiting for its word would keep all the others waiting for the whole patience
    of a round. Also if another leader has sent us on to it."""
    here, left = {"a", "b"}, []

    async def ask(self: Any, leader: Any) -> GroupInfo | None:
        try:
            if redirected and leader == "b":
                found: GroupInfo | None = await self._request_join_group("a")
                return found
            await asyncio.sleep(2 * POLL_S)
            here.discard("a")
            await asyncio.sleep(PATIENCE_S)
            return GroupInfo(b"late", (), ())
        finally:
            left.append(leader)

    monkeypatch.setattr(Matchmaking, "_request_join_group", ask)

    async def scenario() -> None:
        asked = Follower(here)._request_join_group("b" if redirected else "a")  # type: ignore[arg-type]
        assert await asyncio.wait_for(asked, PATIENCE_S / 2) is None
        assert left == (["a", "b"] if redirected else ["a"])

    asyncio.run(scenario())


def test_a_leader_that_sent_us_on_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the leader that we wait for now is watched, and one that we have never heard of is waited for."""
    here, group = {"b"}, GroupInfo(b"group", (), ())

    async def ask(self: Any, leader: Any) -> GroupInfo | None:
        if leader == "b":
            found: GroupInfo | None = await self._request_join_group("unheard")
            return found
        await asyncio.sleep(2 * POLL_S)
        here.discard("b")
        await asyncio.sleep(5 * POLL_S)
        return group

    monkeypatch.setattr(Matchmaking, "_request_join_group", ask)
    assert asyncio.run(Follower(here)._request_join_group("b")) is group  # type: ignore[arg-type]


def test_who_turns_us_down_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a leader is gone its followers do not notice all at once, and who still follows it can lead nobody."""

    async def ask(self: Any, leader: Any) -> None: ...

    monkeypatch.setattr(Matchmaking, "_request_join_group", ask)

    async def scenario() -> None:
        follower = Follower({"b"})
        assert await follower._request_join_group("b") is None  # type: ignore[arg-type]
        assert follower.potential_leaders.past_attempts == {"b", "c"}
        await asyncio.sleep(2 * AGAIN_S)
        assert not follower.potential_leaders.past_attempts

    asyncio.run(scenario())
