"""Laws of past rounds: the newest are kept, within bounds, and come over the network whole or not at all."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_tools import CODEC, ROUND, RUN, make_payload

from dtrain.dht import history
from dtrain.dht.history import RoundHistory, RoundRecord, as_others_have_it, parse_round
from dtrain.dht.streams import MAX_HEADER_BYTES, StreamError, messages

BASE = bytes(range(32))


def record(round: int, sizes: tuple[int, ...] = (3, 5), members: int = 2) -> RoundRecord:
    """A finished round with one aggregate per size."""
    names = [f"12D3KooW{i:044d}" for i in range(members)]
    spans = [[16 * i, 16] for i in range(len(sizes))]
    return RoundRecord(round, BASE, names, names[:1], spans, [bytes([i]) * n for i, n in enumerate(sizes)])


def kept(rounds: RoundHistory) -> list[int]:
    found = []
    for round in range(1000):
        try:
            rounds.reply(round)
        except StreamError:
            continue
        found.append(round)
    return found


def test_a_round_comes_over_as_it_was_kept() -> None:
    """parse_round(reply) has the same members, contributors, spans, aggregates and base."""
    rounds = RoundHistory()
    rounds.keep(record(4))
    reply, blob = rounds.reply(4)
    assert parse_round(4, msgpack.unpackb(msgpack.packb(reply)), blob) == record(4)


def test_spans_that_nobody_had_are_absent_there_too() -> None:
    """A round with a missing span, or with none at all, is handed on as it is."""
    rounds = RoundHistory()
    for sizes in ((7,), ()):
        rounds.keep(record(4, sizes))
        assert parse_round(4, *rounds.reply(4)) == record(4, sizes)


def test_the_newest_rounds_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more rounds or bytes than the limits, except the newest one alone; the oldest go first."""
    monkeypatch.setattr(history, "KEPT_ROUNDS", 5)
    monkeypatch.setattr(history, "KEPT_BYTES", 100)
    rounds = RoundHistory()
    for round in range(9):
        rounds.keep(record(round, (10,)))
    assert kept(rounds) == [4, 5, 6, 7, 8]
    rounds.keep(record(9, (60, 20)))
    assert kept(rounds) == [7, 8, 9]
    rounds.keep(record(10, (500,)))
    assert kept(rounds) == [10]
    rounds.keep(record(11, (10,)))
    assert kept(rounds) == [11]


def test_a_round_kept_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that is kept again replaces the first and its bytes."""
    monkeypatch.setattr(history, "KEPT_BYTES", 100)
    rounds = RoundHistory()
    rounds.keep(record(1, (40,)))
    for _ in range(5):
        rounds.keep(record(2, (50,)))
    assert kept(rounds) == [1, 2]


@pytest.mark.parametrize("round", [5, -1, None, "4", 4.0, b"4", [4], {"a": 1}])
def test_what_is_not_kept_is_refused(round: object) -> None:
    """An unknown round, or something that is no round, is refused with a reason."""
    rounds = RoundHistory()
    rounds.keep(record(4))
    with pytest.raises(StreamError, match="not kept"):
        rounds.reply(round)


def test_a_large_groups_reply_fits_a_header() -> None:
    """With 256 members, each the reducer of a span, the reply's header is within the stream's limit."""
    rounds = RoundHistory()
    rounds.keep(record(4, (100,) * 256, members=256))
    header = next(messages(*rounds.reply(4)))
    assert len(header.value) <= MAX_HEADER_BYTES


def reply(**changes: Any) -> dict[str, Any]:
    return {
        "base": BASE,
        "members": ["a"],
        "contributors": ["a"],
        "spans": [[0, 16, 3], [16, 16, 5]],
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"base": 2**62},  # bytes(2**62) would ask for that much memory
        {"base": b"short"},
        {"base": "x" * 32},
        {"members": 7},
        {"members": None},
        {"contributors": 7},
        {"spans": 7},
        {"spans": None},
        {"spans": [[0, 16]]},
        {"spans": [[0, 16, 8, 1]]},
        {"spans": ["abc"]},
        {"spans": [[0, 16, 9]]},  # more than came
        {"spans": [[0, 16, 3]]},  # less than came
        {"spans": [[0, 16, 3], [16, 16, -5], [32, 16, 10]]},
        {"spans": [[0, 16, 8], [16, 16, 0]]},
        {"spans": [[0, 16, 3], [8, 16, 5]]},  # overlap: decoding both would count chunks twice
        {"spans": [[16, 16, 3], [0, 16, 5]]},
        {"spans": [[-16, 16, 3], [16, 16, 5]]},
        {"spans": [[0, 0, 3], [0, 16, 5]]},
        {"spans": [[0.0, 16, 3], [16, 16, 5]]},
        {"spans": [[0, 16, float("nan")], [16, 16, 5]]},
        {"spans": [[0, 16, float("inf")]]},
        {"spans": [[0, float("inf"), 8]]},
    ],
)
def test_a_malformed_reply_is_a_stream_error(changes: dict[str, Any]) -> None:
    """Lengths, spans and types that cannot be are refused before anything is cut out or allocated."""
    assert parse_round(4, reply(), bytes(8)).spans == [[0, 16], [16, 16]]
    with pytest.raises(StreamError, match="malformed"):
        parse_round(4, reply(**changes), bytes(8))


NUMBERS = (
    st.integers(-3, 40) | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.none() | st.text(max_size=3)
)
ANYTHING = st.recursive(NUMBERS | st.binary(max_size=40), lambda s: st.lists(s, max_size=4), max_leaves=12)


@given(
    fields=st.dictionaries(st.sampled_from(["base", "members", "contributors", "spans"]), ANYTHING),
    spans=st.lists(st.lists(NUMBERS, min_size=3, max_size=3), max_size=4),
    own=st.booleans(),
    blob=st.binary(max_size=60),
)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_garbage_is_a_stream_error_or_well_formed(
    fields: dict[str, Any], spans: list[list[Any]], own: bool, blob: bytes
) -> None:
    """Any reply either raises StreamError or gives disjoint spans, in order, with aggregates that make up the blob."""
    try:
        found = parse_round(4, reply(**fields) if own else reply(spans=spans), blob)
    except StreamError:
        return
    edges = [edge for first, count in found.spans for edge in (first, first + count)]
    assert edges == sorted(edges) and b"".join(found.aggregates) == blob
    assert len(found.spans) == len(found.aggregates) and len(found.base_digest) == 32


def test_a_frozen_member_takes_the_others_word() -> None:
    """It ends up with their aggregates, and keeps what of its own payload is in none of them; from who cannot tell, or
    tells of another group, it takes nothing. With nobody's word it is behind."""
    names = ["a", "b", "c"]
    halves = [(0, CODEC.num_chunks // 2), (CODEC.num_chunks // 2, CODEC.num_chunks // 2)]

    def reduced(half: int, *inside: int) -> bytes:
        place = {"run": RUN, "round": ROUND, "first_chunk": halves[half][0], "num_chunks": halves[half][1]}
        sections = [(i, 1.0, CODEC.cut(make_payload(i), *halves[half])) for i in inside]
        return CODEC.reduce(sections, **place)  # type: ignore[arg-type]

    ours = RoundRecord(ROUND, BASE, names, names, [list(halves[0])], [reduced(0, 0, 1, 2)])
    theirs = replace(ours, contributors=names[:2], spans=[list(h) for h in halves])
    theirs = replace(theirs, aggregates=[reduced(0, 0, 1), reduced(1, 0, 1, 2)])
    words: dict[str, RoundRecord] = {"b": theirs}

    async def fetch(peer_id: str, round: int) -> RoundRecord:
        return words[peer_id]

    def learn() -> RoundRecord:
        return asyncio.run(
            as_others_have_it(ours, "c", CODEC, fetch, lambda record: record.problems != ["forged"])
        )

    assert learn() == replace(theirs, undelivered=[list(halves[0])])
    words = {"b": replace(theirs, members=["b", "c"])}
    assert learn() == replace(ours, stale=True)
    words = {"b": replace(theirs, problems=["forged"])}
    assert learn() == replace(ours, stale=True)
    words = {}
    assert learn().stale
