"""What a worker's network processes have carried, one after another."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = (0, 0, 0)


class Carried:
    """Bytes up, bytes down, and what both took on the wire."""

    def __init__(self) -> None:
        self._past = self._now = NOTHING

    def hear(self, carried: Sequence[int]) -> None:
        """What the process that is there now has carried since its start."""
        up, down, wire = carried
        self._now = up, down, wire

    def begin_anew(self) -> None:
        """Another process takes its place."""
        self._past, self._now = self.total(), NOTHING

    def total(self) -> tuple[int, int, int]:
        past, now = self._past, self._now
        return past[0] + now[0], past[1] + now[1], past[2] + now[2]
