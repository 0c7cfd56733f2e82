"""A download of the run's state as its user sees it: bytes, rate and the time that is left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from dtrain.trainer.clock import SYSTEM_CLOCK, Clock
from dtrain.trainer.metrics import Metrics

STAGE = "Downloading the run's weights"
MEGA = 1e6
EVENT_PERIOD_S = 0.5  # between two metrics events
RATE_WINDOW_S = 10.0  # the rate is that of the last so many seconds


class Bar(Protocol):
    """Shows progress to a user; see `voice.Voice`."""

    def progress(
        self,
        stage: str,
        done: float = 0.0,
        total: float = 0.0,
        unit: str = "",
        rate: float = 0.0,
        lines: bool = True,
    ) -> None: ...

    def waiting(self, stage: str, *, lines: bool = True) -> AbstractContextManager[Any]: ...

    def done(self) -> None: ...


class DownloadReport:
    """The `Watch` of a worker's downloads: a bar for the user if there is one, and a `download` event now and then.

    What an interrupted download had already got does not count for the rate.
    """

    def __init__(
        self,
        metrics: Metrics,
        say: Callable[[str], None],
        clock: Clock = SYSTEM_CLOCK,
        begun: Callable[[], None] = lambda: None,
    ):
        """`begun()` is called when a state to get has been found, not while nobody gives one: who says that it
        is joining is no judge of what others claim, and a claim alone must not make all of us say so."""
        self._metrics, self._say, self._clock, self._begun = metrics, say, clock, begun
        self._marks: deque[tuple[float, int]] = deque()  # (time.monotonic(), bytes here) of the last seconds
        self._written = -math.inf  # time.monotonic()
        self.bar: Bar | None = None
        self.trouble_text = ""
        self.have_bytes = 0

    def begin(self) -> None:
        """A download, or another attempt at one, begins."""
        self._marks.clear()
        self.trouble_text = ""

    def progress(self, have: int, total: int) -> None:
        """See `Watch`."""
        now = self._clock.monotonic()
        if not self._marks:
            self._begun()
            self._written = -math.inf
            if 0 < have < total:
                self._say(f"Going on with the download where it stopped: {have / MEGA:.1f} MB are here.")
        self.have_bytes = have
        self._marks.append((now, have))
        while now - self._marks[0][0] > RATE_WINDOW_S and len(self._marks) > 2:
            self._marks.popleft()
        rate = self._rate()
        if self.bar is not None:
            self.bar.progress(STAGE, have / MEGA, total / MEGA, "MB", rate / MEGA)
            if have == total:
                self.bar.done()
        if have == total or now - self._written > EVENT_PERIOD_S:
            self._written = now
            self._metrics.write(
                "download",
                have_bytes=have,
                total_bytes=total,
                bytes_per_s=round(rate),
                eta_s=round((total - have) / rate, 1) if rate else None,
            )

    def _rate(self) -> float:
        """Bytes per second of late; 0 while it is not known."""
        (first, before), (last, have) = self._marks[0], self._marks[-1]
        return (have - before) / (last - first) if last > first else 0.0

    def left(self, donor: str, reason: str) -> None:
        """See `Watch`."""
        self._metrics.write("donor_left", peer_id=donor, reason=reason)
        self._say(f"Worker {donor[-8:]} gave bad data ({reason}); downloading from others only.")

    def trouble(self, reason: str) -> None:
        """See `Watch`."""
        self.trouble_text = reason
