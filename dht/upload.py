"""How fast a donor uploads its state: rounds come first, and a mass join never takes the whole line."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.5  # of the measured upload, unless the user has set a limit
MEASURED_PIECES = 16  # the fastest of so many newest pieces tells what the line can do
HOLD_S = 10.0  # while an exchange is under way one piece goes out per this time, so that downloads live on
QUEUE_S = 20.0  # who would have to wait longer is sent to another donor
LEASE_S = 60.0  # a newcomer that reads a piece more slowly stops counting as served
SERVED_AT_ONCE = 4


class Busy(Exception):
    """The queue is too long; `wait_s` is a good time to come back."""


class UploadBudget:
    """Admits pieces one after another at a bounded rate; for one event loop.

    A piece leaves at the line's own speed, so the time until its last byte is acknowledged measures the line even when
    pieces are spaced apart.
    """

    def __init__(self, limit_bytes_per_s: float = 0.0):
        """`limit_bytes_per_s` 0 = SHARE of the measured upload."""
        self._limit = limit_bytes_per_s
        self._rates: deque[float] = deque(maxlen=MEASURED_PIECES)  # bytes per second of the newest pieces
        self._turn, self._places = asyncio.Lock(), asyncio.Semaphore(SERVED_AT_ONCE)
        self._queued_bytes = 0
        self._free_at = 0.0  # time.monotonic() when all that was admitted has had its time
        self._rounds_under_way = 0
        self._no_round = asyncio.Event()
        self._no_round.set()

    @property
    def bytes_per_s(self) -> float:
        """The rate that pieces are admitted at; 0 = no bound is known yet."""
        return self._limit or SHARE * max(self._rates, default=0.0)

    @contextmanager
    def round_under_way(self) -> Iterator[None]:
        """While this lasts the line belongs to the exchange."""
        self._rounds_under_way += 1
        self._no_round.clear()
        try:
            yield
        finally:
            self._rounds_under_way -= 1
            if not self._rounds_under_way:
                self._no_round.set()

    async def admit(self, num_bytes: int) -> Lease:
        """Wait until a piece may leave. Raises Busy at once when that would take too long."""
        rate = self.bytes_per_s
        if rate and self._queued_bytes / rate > QUEUE_S:
            raise Busy
        self._queued_bytes += num_bytes
        try:
            async with self._turn:  # first come, first served
                await self._places.acquire()
                try:
                    await self._wait(num_bytes)
                except asyncio.CancelledError:
                    self._places.release()
                    raise
        finally:
            self._queued_bytes -= num_bytes
        return Lease(self, num_bytes)

    async def _wait(self, num_bytes: int) -> None:
        if not self._no_round.is_set():
            try:
                await asyncio.wait_for(self._no_round.wait(), HOLD_S)
            except asyncio.TimeoutError:
                pass
        if not (rate := self.bytes_per_s):
            return
        now = time.monotonic()
        begin = max(now, self._free_at)
        self._free_at = begin + num_bytes / rate
        await asyncio.sleep(begin - now)

    def delivered(self, num_bytes: int, seconds: float) -> None:
        """Note how long a piece took from its first byte to the acknowledgement."""
        self._rates.append(num_bytes / max(1e-3, seconds))

    def free_place(self) -> None:
        """A lease is over."""
        self._places.release()


class Lease:
    """A piece on its way. `close` it however it ended; it closes itself after LEASE_S."""

    def __init__(self, budget: UploadBudget, num_bytes: int):
        self._budget, self._num_bytes, self._began = budget, num_bytes, time.monotonic()
        self._timer: asyncio.TimerHandle | None = asyncio.get_running_loop().call_later(LEASE_S, self.close)

    def close(self, *, delivered: bool = False) -> None:
        """Free the place; `delivered` if the whole piece was acknowledged."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        self._budget.free_place()
        if delivered:
            self._budget.delivered(self._num_bytes, time.monotonic() - self._began)
