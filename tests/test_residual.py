"""Laws of a reducer's residual: whatever becomes of spans, weights and owners, nothing of it is lost."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from round_tools import CODEC, NUM_ELEMENTS

from dtrain.compression.residual import Piece, Residual

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


def test_a_drawn_residual_is_a_copy() -> None:
    """A round that comes to nothing leaves the residual as it was."""
    residual = Residual(CODEC)
    residual.settle(0, CODEC.num_chunks, 2.0, torch.ones(NUM_ELEMENTS))
    residual.draw(0, CODEC.num_chunks, 1.0).zero_()
    assert (total(residual.release()) == 2.0).all()
