"""Counts of the network process, which begins at 0 again when another takes its place; the worker's go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class RunningCounts:
    """Counts by name, over all network processes of a worker."""

    def __init__(self) -> None:
        self._past: Counter[str] = Counter()
        self._now: Counter[str] = Counter()

    def hear(self, counts: Mapping[str, int] | None) -> None:
        """What the process now running has counted since its start; None = it says nothing of them."""
        if counts is not None:
            self._now = Counter(counts)

    def begin_anew(self) -> None:
        """Another process takes the place of the last one."""
        self._past, self._now = self.total(), Counter()

    def total(self) -> Counter[str]:
        return self._past + self._now
