"""The screen within a round: who is refused is told, keeps its work, and theta stays one."""

from __future__ import annotations

import pytest
import torch
from round_tools import CODEC, NUM_ELEMENTS, ROUND, RUN, Group, play, quicken

from dtrain.compression.screen import REASONS
from dtrain.experiments.memory_round import Contribution, Faults, GroupReducer

MEMBERS = 6


def payloads() -> list[bytes]:
    """Updates with a direction in common; member 0's points the other way."""
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(NUM_ELEMENTS, generator=draw)
    made = []
    for i in range(MEMBERS):
        update = (0.8 * direction + torch.randn(NUM_ELEMENTS, generator=draw)) * (-1 if i == 0 else 1)
        made.append(CODEC.encode([update], CODEC.error_feedback(), decay=1.0, run=RUN, round=ROUND))
    return made


def test_a_member_that_works_against_the_others_is_in_no_honest_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """All members, it too, end with the same aggregates; it gets all of its work back; every reducer says why."""
    quicken(monkeypatch)

    async def scenario() -> None:
        group = Group(MEMBERS, recompress=True, payloads=payloads(), screens=True)
        records = await group.run()
        group.check(records)
        assert records[0].contributors == [member.peer_id for member in group.members[1:]]
        assert sum(count for _, count in records[0].undelivered) == CODEC.num_chunks
        assert not any(record.undelivered for record in records[1:])
        for runner, record in zip(group.runners[1:], records[1:]):
            assert runner.refused == {0: "against"}
            assert any(REASONS["against"] in problem for problem in record.problems)

    play(scenario)


def test_in_memory_it_is_the_same() -> None:
    """The simulator's reducers judge as the real ones do; switched off they sum everything."""
    members = [Contribution(f"peer{i}", bytes(32), payload, 1.0) for i, payload in enumerate(payloads())]
    screened = GroupReducer(CODEC, RUN, 4, Faults(), screens=True).reduce(ROUND, members)
    assert screened.contributors == {f"peer{i}" for i in range(1, MEMBERS)}
    assert screened.refused == {("peer0", "against"): MEMBERS}
    assert sum(count for _, count in screened.undelivered["peer0"]) == CODEC.num_chunks
    assert len(GroupReducer(CODEC, RUN, 4, Faults()).reduce(ROUND, members).contributors) == MEMBERS
