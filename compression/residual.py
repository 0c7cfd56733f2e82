"""What a reducer keeps for everybody: the part of its sums that its compressed aggregates left out.

It is owed to theta, so it is kept in units of weight times value: those mean the same whoever is in a later round. A
reducer adds it to its next sum of the same place. When it owns that place no longer, it takes the rest over into its
own error feedback, divided by its own weight, and so delivers it with its next payloads.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtrain.compression.codec import Codec

Piece = tuple[int, int, Tensor]
"""(first chunk, number of chunks, weight * value in chunk order, fp32)"""


class Residual:
    """One reducer's residual. Places are ranges of chunks that begin and end on boundaries of groups."""

    def __init__(self, codec: Codec, pieces: Sequence[Piece] = ()):
        self._codec = codec
        self._pieces: list[Piece] = list(pieces)

    @property
    def pieces(self) -> Sequence[Piece]:
        """All that is kept; no two overlap. Not to be changed."""
        return self._pieces

    def draw(self, first_chunk: int, num_chunks: int, weight: float) -> Tensor:
        """What is kept for a place, as `Codec.reduce` takes it for contributions of that total weight; a copy."""
        values = self._codec.residual(first_chunk, num_chunks)
        for first, count, kept in self._pieces:
            begin, end = max(first, first_chunk), min(first + count, first_chunk + num_chunks)
            if begin < end:
                values[self._within(first_chunk, begin, end)] = kept[self._within(first, begin, end)]
        return values.div_(weight)

    def settle(self, first_chunk: int, num_chunks: int, weight: float, values: Tensor) -> None:
        """`Codec.reduce` has left `values` of a place over, and its aggregate counts."""
        self._pieces = self.settled(first_chunk, num_chunks, weight, values)._pieces

    def settled(self, first_chunk: int, num_chunks: int, weight: float, values: Tensor) -> Residual:
        """What is kept once that aggregate counts, as another residual."""
        elsewhere, _ = self._divide(first_chunk, num_chunks)
        return Residual(self._codec, [*elsewhere, (first_chunk, num_chunks, values * weight)])

    def add(self, pieces: Sequence[Piece]) -> None:
        """Keep these too, wherever they lie."""
        for first_chunk, num_chunks, values in pieces:
            elsewhere, _ = self._divide(first_chunk, num_chunks)
            self._pieces = [
                *elsewhere,
                (first_chunk, num_chunks, self.draw(first_chunk, num_chunks, 1.0) + values),
            ]

    def release(self, first_chunk: int = 0, num_chunks: int = 0) -> list[Piece]:
        """Everything that is kept for other places than this one; it is not kept here any more."""
        elsewhere, self._pieces = self._divide(first_chunk, num_chunks)
        return elsewhere

    def _divide(self, first_chunk: int, num_chunks: int) -> tuple[list[Piece], list[Piece]]:
        """(pieces outside a place, pieces in it)"""
        outside: list[Piece] = []
        inside: list[Piece] = []
        for first, count, kept in self._pieces:
            cuts = [min(max(edge, first), first + count) for edge in (first_chunk, first_chunk + num_chunks)]
            edges = [first, *cuts, first + count]
            for part, begin, end in zip((outside, inside, outside), edges, edges[1:]):
                if begin < end:
                    part.append((begin, end - begin, kept[self._within(first, begin, end)].clone()))
        return outside, inside

    def _within(self, base: int, begin: int, end: int) -> slice:
        """Where chunks begin to end lie in a piece whose first chunk is `base`."""
        place, start = self._codec.layout.elements(begin, end - begin), self._codec.layout.offset[base]
        return slice(place.start - int(start), place.stop - int(start))
