"""Laws of a reducer's residual: whatever becomes of spans, weights and owners, nothing of it is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from round_tools import CODEC, NUM_ELEMENTS, RUN

from dtrain.compression.residual import Piece, Residual
from dtrain.experiments.memory_round import Contribution, Faults, GroupReducer

EDGES = [*range(0, CODEC.num_chunks, 32), CODEC.num_chunks]


def total(pieces: list[Piece]) -> torch.Tensor:
    """All pieces in their places, [NUM_ELEMENTS]; no two may overlap."""
    flat, times = torch.zeros(NUM_ELEMENTS), torch.zeros(NUM_ELEMENTS)
    for first, count, values in pieces:
        flat[CODEC.layout.elements(first, count)] += values
        times[CODEC.layout.elements(first, count)] += 1
    assert times.max() <= 1
    return flat


@given(
    spans=st.lists(
        st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES), st.floats(0.5, 8.0)), min_size=1, max_size=6
    )
)
@settings(deadline=None)
def test_nothing_is_lost_when_spans_move(spans: list[tuple[int, int, float]]) -> None:
    """What was drawn, settled and released adds up, in units of weight times value, wherever the spans went."""
    residual, expected = Residual(CODEC), torch.zeros(NUM_ELEMENTS)
    generator = torch.Generator().manual_seed(0)
    for number, (a, b, weight) in enumerate(spans):
        first, count = min(a, b), abs(a - b)
        place = CODEC.layout.elements(first, count)
        drawn = residual.draw(first, count, weight)
        torch.testing.assert_close(drawn * weight, expected[place])
        left = torch.randn(len(drawn), generator=generator)
        residual.settle(first, count, weight, left)
        expected[place] = left * weight
        if number % 2:  # the part outside this span is handed on
            handed = residual.release(first, count)
            assert not total(handed)[place].any()
            expected -= total(handed)
    torch.testing.assert_close(total(residual.release()), expected)
    assert residual.release() == []


@pytest.mark.parametrize("exact_up_to", [1, 3])
def test_the_books_close_while_members_come_and_go(exact_up_to: int) -> None:
    """Whoever takes part and reduces: all that was produced is in theta, in an error feedback or in a residual.

    In units of weight times value; members of different weight come and go, so that spans move. Who leaves hands its
    residual over to its own feedback, as a worker does, and some lose sections and spans on the way.
    """
    names, weights = "abcde", dict(zip("abcde", (100.0, 300.0, 50.0, 200.0, 150.0)))
    faults = Faults(sections=frozenset({(4, "a", "b")}), spans=frozenset({(5, "c")}))
    reducer = GroupReducer(CODEC, RUN, exact_up_to, faults)
    kept = {name: CODEC.error_feedback() for name in names}
    produced, delivered = torch.zeros(NUM_ELEMENTS), torch.zeros(NUM_ELEMENTS)

    def take_over(name: str, *, all: bool) -> None:
        for first, count, values in reducer.release_residual(name, all=all):
            weighted = torch.frombuffer(bytearray(values), dtype=torch.float32)
            kept[name][CODEC.layout.elements(first, count)] += weighted / weights[name]

    for round, group in enumerate(("abcde", "abcde", "abce", "ab", "abd", "abcde", "cde")):
        payloads = {}
        for index, name in enumerate(group):
            delta = torch.randn(NUM_ELEMENTS, generator=torch.Generator().manual_seed(10 * round + index))
            produced += weights[name] * delta
            payloads[name] = CODEC.encode([delta], kept[name], decay=1.0, run=RUN, round=round)
        members = [Contribution(name, b"", payloads[name], weights[name]) for name in group]
        reduced = reducer.reduce(round, members)
        for aggregate in reduced.aggregates:
            inside = sum(weight for _, weight in CODEC.contributors(aggregate))
            delivered += inside * CODEC.decode([aggregate])[0]
        for name in group:
            for first, count in reduced.undelivered.get(name, ()):
                CODEC.give_back(kept[name], payloads[name], first, count)
            take_over(name, all=False)
    in_residuals = torch.zeros(NUM_ELEMENTS)
    for name in names:
        for first, count, values in reducer.release_residual(name, all=True):
            place = CODEC.layout.elements(first, count)
            in_residuals[place] += torch.frombuffer(bytearray(values), dtype=torch.float32)
    total_kept = sum(weights[name] * kept[name] for name in names)
    torch.testing.assert_close(delivered + total_kept + in_residuals, produced, rtol=1e-4, atol=0.05)


def test_a_drawn_residual_is_a_copy() -> None:
    """A round that comes to nothing leaves the residual as it was."""
    residual = Residual(CODEC)
    residual.settle(0, CODEC.num_chunks, 2.0, torch.ones(NUM_ELEMENTS))
    residual.draw(0, CODEC.num_chunks, 1.0).zero_()
    assert (total(residual.release()) == 2.0).all()
