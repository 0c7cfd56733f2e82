"""Keeps this peer's traffic to the user's megabits per second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

BURST_S = 0.25  # what was not used may be made up for, for so long


class Throttle:
    """Lets bytes through at a bounded rate, in the order in which they come. For one event loop."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.bytes_per_s = 0.0  # 0 = no limit
        self._clock = clock
        self._turn = asyncio.Lock()
        self._free_at = 0.0  # when all that was let through so far has had its time

    async def take(self, num_bytes: int) -> None:
        """Wait until `num_bytes` more may pass."""
        if not self.bytes_per_s:
            return
        async with self._turn:  # first come, first served: a heartbeat waits for one piece, not for a payload
            now = self._now()
            self._free_at = max(self._free_at, now - BURST_S) + num_bytes / self.bytes_per_s
            await asyncio.sleep(max(0.0, self._free_at - now))

    def _now(self) -> float:
        return self._clock() if self._clock else asyncio.get_running_loop().time()
