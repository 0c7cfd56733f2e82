"""Hostile bytes into every parser of what others send, 10,000 each: a named refusal or a harmless result.

A tenth is drawn by hypothesis, which puts hostile values into honest messages and shrinks what it finds (for payloads
in test_fuzz.py); the rest are seeded mutations of their bytes. `make fuzz-atheris` looks further, guided by coverage.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from fuzz_parsers import PARSERS, TOKENS, places, spoiled, with_value
from hypothesis import given, settings
from hypothesis import strategies as st

CASES, DRAWN = 10_000, 1_000
SPARE_BYTES = 300_000

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1, -(2**63), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.text(max_size=1).map(lambda text: text * 3000),
    st.binary(max_size=8),
    st.recursive(
        st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    ),
)
TREES: dict[str, list[tuple[Any, Any, list[tuple[object, ...]]]]] = {
    name: [(tree, encode, list(places(tree))) for tree, encode in parser.trees()]
    for name, parser in PARSERS.items()
}


@pytest.mark.parametrize("name", PARSERS)
def test_honest_messages_are_taken(name: str) -> None:
    """What nobody spoiled is read, from its bytes and from its tree: the fuzzers begin behind the first checks."""
    parser = PARSERS[name]
    assert [parser.read(sample) for sample in parser.samples()] == [""] * len(parser.samples())
    assert {parser.read(encode(tree)) for tree, encode, _ in TREES[name]} <= {""}


@pytest.mark.parametrize("name", [name for name in PARSERS if TREES[name]])
def test_hostile_values_are_refused_or_harmless(name: str) -> None:
    """Any value in any place of an honest message; no exception gets out of the parser."""
    read, trees = PARSERS[name].read, TREES[name]

    @settings(max_examples=DRAWN, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 10**6), st.integers(0, 10**6), HOSTILE)
    def offer(which: int, place: int, value: object) -> None:
        tree, encode, ways = trees[which % len(trees)]
        read(encode(with_value(tree, ways[place % len(ways)], value)))

    offer()


@pytest.mark.parametrize("name", PARSERS)
def test_spoiled_bytes_are_refused_or_harmless(name: str) -> None:
    """9,000 seeded mutations of the bytes; some are refused, and some are still good messages."""
    parser = PARSERS[name]
    reasons = {parser.read(data) for data in spoiled(parser.samples(), CASES - DRAWN)}
    assert reasons >= {"", "refused"} or len(reasons) > 8


@pytest.mark.parametrize("name", PARSERS)
def test_claims_cost_no_memory(name: str) -> None:
    """A message that claims to hold a billion things, or is nested beyond all measure, is refused at little cost."""
    parser = PARSERS[name]
    for sample in parser.samples():
        parser.read(sample)  # what is filled once is filled
        for step, token in enumerate(TOKENS):
            at = (step * 7919) % (len(sample) + 1)
            data = sample[:at] + token + sample[at + 1 :]
            tracemalloc.start()
            try:
                parser.read(data)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 20 * len(data) + SPARE_BYTES, (token, at)
