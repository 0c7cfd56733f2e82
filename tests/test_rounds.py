"""Laws of a round: whatever fails, all members end with the same aggregates, and what each of them produced is either
in these or kept by its sender.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgpack
import pytest
import torch
from round_tools import (
    CODEC,
    PATIENCE_S,
    PEERS,
    ROUND,
    RUN,
    SHORT_S,
    Fault,
    Group,
    closing_midway,
    losing_the_reply,
    make_payload,
    play,
    quicken,
    reduce_all,
    refusing,
    replying,
    saying,
    silent,
)

from dtrain.dht import parts, rounds
from dtrain.dht.streams import messages


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


# ---------------------------------------------------------------------- rounds without faults


@pytest.mark.parametrize("indirect", [(), (1,), (0, 3)])
@pytest.mark.parametrize("num", [2, 4, 5])
def test_all_end_with_everything(num: int, indirect: tuple[int, ...]) -> None:
    """Without faults every member gets the same aggregates of all spans with everybody inside, as one reducer would
    have made them; nobody hangs up too early, and members whom nobody can dial take part all the same.
    """

    async def scenario() -> None:
        group = Group(num, indirect=indirect)
        records = await group.run()
        group.check(records)
        assert records[0].contributors == [member.peer_id for member in group.members]
        for record in records:
            assert (record.undelivered, record.problems) == ([], [])
        sections = [(i, group.members[i].weight, group.payloads[i]) for i in range(num)]
        alone = CODEC.decode([reduce_all(sections)])
        assert torch.equal(CODEC.decode(records[0].aggregates)[0], alone[0])
        assert group.line.num_hung_up_first == 0

    play(scenario)


def test_recompressed_aggregates_keep_the_rest_in_the_residuals() -> None:
    """With recompression, aggregates plus the reducers' residuals are what the members produced."""

    async def scenario() -> None:
        group = Group(5, recompress=True)
        records = await group.run()
        for residual, span in zip(group.residuals, group.spans, strict=True):
            assert residual is not None and residual.draw(*span, 1.0).any()
        group.check(records)

    play(scenario)


# ---------------------------------------------------------------------- a reducer that fails everybody


def of_another_round() -> bytes:
    """An aggregate of span 1 of three, well made but for the round before."""
    first, count = CODEC.spans([1.0] * 3)[1]
    section = CODEC.cut(make_payload(0, round=ROUND - 1), first, count)
    return CODEC.reduce([(0, 100.0, section)], run=RUN, round=ROUND - 1, first_chunk=first, num_chunks=count)


def weighted(index: int, weight: float) -> bytes:
    """An aggregate of span 1 of three that weights a member as the reducer likes."""
    first, count = CODEC.spans([1.0] * 3)[1]
    section = CODEC.cut(make_payload(0), first, count)
    return CODEC.reduce([(index, weight, section)], run=RUN, round=ROUND, first_chunk=first, num_chunks=count)


def compressed() -> bytes:
    """A sum of span 1 of three that does not show whose sections it is of, where unions are agreed on."""
    first, count = CODEC.spans([1.0] * 3)[1]
    sections, residual = [(0, 100.0, CODEC.cut(make_payload(0), first, count))], CODEC.residual(first, count)
    return CODEC.reduce(
        sections, residual=residual, run=RUN, round=ROUND, first_chunk=first, num_chunks=count
    )


REDUCER_FAULTS: dict[str, Callable[[], tuple[Fault | None, str]]] = {
    "gone": lambda: (None, "cannot be reached"),
    "garbage header": lambda: (saying(b"\xc1\xc1"), "not msgpack"),
    "garbage": lambda: (replying(b"garbage" * 100), "bad-magic"),
    "empty": lambda: (replying(b""), "too-short"),
    "too large": lambda: (saying(msgpack.packb({"size": 2**40})), "announces"),
    "refuses": lambda: (refusing, "refused: not today"),
    "closes midway": lambda: (closing_midway, "ended early"),
    "another round": lambda: (replying(of_another_round()), "wrong-round"),
    "wrong weight": lambda: (replying(weighted(0, 1e9)), "wrong-weight"),
    "not sealed": lambda: (replying(weighted(0, 100.0)), "bad-seal"),
    "compressed again": lambda: (replying(compressed()), "bad-kind"),
    "not a member": lambda: (replying(weighted(3, 100.0)), "bad-contributors"),
}


@pytest.mark.parametrize("kind", REDUCER_FAULTS)
def test_a_span_that_nobody_has_is_missing_for_all_alike(kind: str) -> None:
    """A reducer that fails everybody costs its span and nothing else: the others keep what they had for it."""

    async def scenario() -> None:
        fault, reason = REDUCER_FAULTS[kind]()
        group = Group(3, played=[1], sender_timeout_s=PATIENCE_S)
        group.break_reducer(1, fault)
        sending = [asyncio.create_task(group.part(1, j, group.section(1, j))) for j in group.honest]
        records = await group.run()
        await asyncio.gather(*sending)
        group.check(records)
        for record in records:
            assert record.spans == [list(group.spans[0]), list(group.spans[2])]
            assert record.undelivered == [list(group.spans[1])]
            assert record.contributors == [PEERS[0], PEERS[1], PEERS[2]]
            assert any(reason in problem and PEERS[1] in problem for problem in record.problems), (
                record.problems
            )

    play(scenario)


def test_a_reducer_that_never_answers_costs_one_round_timeout() -> None:
    """Silence ends with the round's timeout; everything else of the round stands."""

    async def scenario() -> None:
        group = Group(3, played=[1], round_timeout_s=2 * SHORT_S, sender_timeout_s=SHORT_S)
        group.break_reducer(1, silent)
        records = await group.run()
        group.check(records)
        for record in records:
            assert record.spans == [list(group.spans[0]), list(group.spans[2])]
            assert record.undelivered == [list(group.spans[1])]
            assert record.contributors == [PEERS[0], PEERS[2]]

    play(scenario)


# ---------------------------------------------------------------------- a reducer that fails one of them


@pytest.mark.parametrize("fault", [None, saying(b"\xc1"), refusing, closing_midway])
def test_a_lost_reducer_is_made_up_for_by_the_others(fault: Fault | None) -> None:
    """Who cannot get through to a reducer fetches the span from the others; only its own part of it is kept back."""

    async def scenario() -> None:
        group = Group(3, sender_timeout_s=SHORT_S)
        group.break_reducer(1, fault, 0)
        records = await group.run()
        group.check(records)
        assert [record.undelivered for record in records] == [[list(group.spans[1])], [], []]
        assert len(records[0].spans) == 3
        assert any(f"{PEERS[0]} is not in our span" in problem for problem in records[1].problems)

    play(scenario)


def test_a_member_that_lies_about_a_span_is_not_believed() -> None:
    """What another member says it has is checked as if it came from the reducer itself."""

    async def scenario() -> None:
        group = Group(4)
        group.faults[0, 1, "rpc_aggregate_part"] = losing_the_reply
        group.faults[0, 1, "rpc_fetch_span"] = None
        lies = [of_another_round(), weighted(0, 1e9)]
        for i, lie in zip((2, 3), lies, strict=True):
            header, piece = messages({"status": parts.HAVE}, lie)
            group.faults[0, i, "rpc_fetch_span"] = saying(header.value, piece.value)
        records = await group.run()
        assert records[0].spans == [list(group.spans[j]) for j in (0, 2, 3)]
        assert all(len(record.spans) == 4 for record in records[1:])

    play(scenario)


def test_a_lost_reply_costs_nothing() -> None:
    """When the section arrived and only the reply was lost, the aggregate comes from the others with us inside."""

    async def scenario() -> None:
        group = Group(3)
        group.break_reducer(1, losing_the_reply, 0)
        records = await group.run()
        group.check(records)
        assert [record.undelivered for record in records] == [[], [], []]
        assert len(records[0].problems) == rounds.ATTEMPTS

    play(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_any_pattern_of_faults_leaves_one_result(seed: int) -> None:
    """However the calls between honest members fail, all end with the same aggregates and the accounts close."""

    async def scenario() -> None:
        rng, kinds = random.Random(seed), (None, saying(b"\xc1"), refusing, closing_midway, losing_the_reply)
        group = Group(4, recompress=seed % 2 == 1, sender_timeout_s=0.3)
        for caller in range(4):
            for callee in range(4):
                if rng.random() < 0.4:
                    group.faults[caller, callee, "rpc_aggregate_part"] = rng.choice(kinds)
        group.check(await group.run())

    play(scenario)
