"""Where a worker's time comes from, and where its work beside the main line runs.

Workers on real machines have `SYSTEM_CLOCK`. The simulator gives its virtual workers a clock of its own
(`experiments/virtual_time.py`), on which an hour of waiting passes at once.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol


class Clock(Protocol):
    """What the worker loop asks of time."""

    def monotonic(self) -> float:
        """Seconds that only grow; their zero means nothing."""

    def time(self) -> float:
        """Seconds since 1970."""

    def sleep(self, seconds: float) -> None:
        """Let this much time pass."""

    def wait(self, flag: threading.Event, seconds: float) -> None:
        """Let this much time pass, or less once the flag is set."""

    def courier(self) -> Executor:
        """Something that runs calls one after another beside its caller."""


class SystemClock:
    """The machine's own clock and threads."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, flag: threading.Event, seconds: float) -> None:
        flag.wait(seconds)

    def courier(self) -> Executor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="courier")


SYSTEM_CLOCK = SystemClock()
