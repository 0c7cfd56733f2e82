"""What a worker owes to theta as a reducer: delivered with its own payloads, a part each round.

All members' payloads stood behind it, so in units of one's own it is as many times too long; whoever sent it at once
would be left out by the reducers as one whose update is far longer than the others' (`dtrain.compression.screen`), and
again with the next, until the decay of the error feedback had eaten it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.exchange import Exchange
from dtrain.trainer.feedback import Feedback

LEAST_SHARE = 1 / 16
"""Of what is still owed, so much goes into the feedback each round even where there is little or nothing in it."""


class Owed:
    """Pieces in units of this worker's own payloads, [elements of its chunks], by (first chunk, number of chunks)."""

    def __init__(self, codec: Codec, feedback: Feedback):
        self._codec, self._feedback = codec, feedback
        self._pieces: dict[tuple[int, int], Tensor] = {}

    def take_over(self, exchange: Exchange, weight: float, *, all: bool = False) -> int:
        """What we kept for everybody as a reducer, and will not reduce again (`all`: whatever we keep). Our payloads
        weigh `weight` tokens. Returns the number of hand-overs so far."""
        number, released = exchange.release_residual(all=all)
        for first, count, weighted in released:
            values = torch.frombuffer(bytearray(weighted), dtype=torch.float32) / weight
            before = self._pieces.get((first, count))
            self._pieces[first, count] = values if before is None else before + values
        return number

    def pay(self) -> None:
        """Put so much of each piece into the feedback that it at most doubles what is there, or LEAST_SHARE of it."""
        kept = self._feedback.state_dict()["feedback"]
        for place, values in list(self._pieces.items()):
            own, owed = kept[self._codec.layout.elements(*place)].norm().item(), values.norm().item()
            share = 1.0 if owed <= own else max(LEAST_SHARE, own / owed)
            self._feedback.take_over(*place, values * share)
            if share == 1.0:
                del self._pieces[place]
            else:
                values *= 1.0 - share

    def state_dict(self) -> dict[str, Tensor]:
        """{"FIRST-COUNT": values}."""
        return {f"{first}-{count}": values for (first, count), values in self._pieces.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._pieces = {}
        for name, values in tensors.items():
            first, _, count = name.partition("-")
            self._pieces[int(first), int(count)] = values.clone()
