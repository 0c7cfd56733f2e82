"""What a worker owes to theta as a reducer: delivered with its own payloads, a part each round.

All members' payloads stood behind it, so beside one's own it is as many times too long, and more where it has piled up
for rounds. Whoever sent it at once would be left out by the reducers as one whose update is far longer than the others'
(`dtrain.compression.screen`), and again with the next, until the decay of the error feedback had eaten it. So a round's
part is no longer than what this worker's own inner steps have made in the same place. Who is killed pays again what it
has paid since its newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.compression.residual import Piece, Residual
from dtrain.trainer.exchange import Exchange
from dtrain.trainer.feedback import Feedback


class Owed:
    """What is not paid yet, in units of weight (tokens) times value."""

    def __init__(self, codec: Codec, feedback: Feedback):
        self._codec, self._feedback = codec, feedback
        self._kept = Residual(codec)

    def take_over(self, exchange: Exchange, *, all: bool = False) -> int:
        """What we kept for everybody as a reducer, and will not reduce again (`all`: whatever we keep). Returns the
        number of hand-overs so far."""
        number, released = exchange.release_residual(all=all)
        self._kept.add(
            [
                (first, count, torch.frombuffer(bytearray(values), dtype=torch.float32))
                for first, count, values in released
            ]
        )
        return number

    def pay(self, contribution: Sequence[Tensor], weight: float) -> None:
        """Put a part of it into the feedback, for the payload of `contribution` that weighs `weight` tokens."""
        left: list[Piece] = []
        for first, count, values in self._kept.pieces:
            own = weight * self._length(contribution, first, count)
            owed = values.norm().item()
            share = min(1.0, own / owed) if owed > 0 and math.isfinite(own) else 0.0
            if share > 0:
                self._feedback.take_over(first, count, values * (share / weight))
            if share < 1 and owed > 0:
                left.append((first, count, values * (1.0 - share)))
        self._kept = Residual(self._codec, left)

    def _length(self, tensors: Sequence[Tensor], first_chunk: int, num_chunks: int) -> float:
        """Euclidean norm of that part of the tensors."""
        layout = self._codec.layout
        chunks = range(first_chunk, first_chunk + num_chunks)
        norms = [layout.view(tensors[layout.tensor[chunk]], chunk).norm() for chunk in chunks]
        return float(torch.stack(norms).norm())

    def state_dict(self) -> dict[str, Tensor]:
        """{"FIRST-COUNT": values of these chunks}."""
        return {f"{first}-{count}": values for first, count, values in self._kept.pieces}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        pieces: list[Piece] = []
        for name, values in tensors.items():
            first, _, count = name.partition("-")
            pieces.append((int(first), int(count), values.clone()))
        self._kept = Residual(self._codec, pieces)
