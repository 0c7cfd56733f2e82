"""What a worker's network process hands over of what it kept for everybody as a reducer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Piece = tuple[int, int, bytes]
"""See `trainer.exchange.Exchange.release_residual`."""


class HandOvers:
    """Those that have reached the worker's process, and are yet to reach the worker."""

    def __init__(self) -> None:
        self._released: list[Piece] = []
        self.num_handed = 0
        self.num_saved: int | None = None  # in a checkpoint, once the worker has said so

    def hear(self, answer: dict[str, Any]) -> None:
        """Take what came with an answer out of it."""
        self._released += answer.pop("released")
        self.num_handed = answer.pop("num_handed")

    def take(self) -> tuple[int, Sequence[Piece]]:
        """How many there were in all, and those that the worker has not had."""
        released, self._released = self._released, []
        return self.num_handed, [(first, count, values) for first, count, values in released]

    def saved(self, number: int) -> dict[str, int]:
        """So many are in a checkpoint; what the network process is told."""
        if self.num_saved is None:  # the worker begins, with nothing in its memory but its checkpoint
            self.num_handed = number
        self.num_saved = number
        return self.told()

    def told(self) -> dict[str, int]:
        """What a network process is told of it."""
        return {"saved": self.num_saved or 0, "held": self.num_handed}
