"""Makes batches ahead of the training, in a thread of its own, so that the device never waits for data."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
DEPTH = 6
POLL_S = 0.1
EXIT_S = 5.0


class Ahead(Generic[T]):
    """What `make()` gives, made up to `DEPTH` items ahead. An error in the thread is raised where it is waited for."""

    def __init__(self, make: Callable[[], Iterator[T]], stop: threading.Event) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(DEPTH)
        self._stop, self._closed = stop, threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(make,), name="prefetch", daemon=True)
        _running.add(self)
        self._thread.start()

    def _fill(self, make: Callable[[], Iterator[T]]) -> None:
        try:
            for item in make():
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)
        finally:
            _running.discard(self)

    def _put(self, item: T | BaseException) -> bool:
        while not (self._closed.is_set() or self._stop.is_set()):
            try:
                self._queue.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        """Endless; ends early when the stop is set."""
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Make no more."""
        self._closed.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the item that is being made; a source that does not answer may take longer."""
        self._thread.join(timeout_s)


_running: set[Ahead[Any]] = set()


@atexit.register
def _end_all() -> None:
    """However the process ends: a thread that is in torch when the interpreter goes would abort it."""
    running, deadline = list(_running), time.monotonic() + EXIT_S
    for ahead in running:
        ahead.close()
    for ahead in running:
        ahead.join(max(0.0, deadline - time.monotonic()))


class RoundsAhead(Generic[T]):
    """Rounds' items, the next round's begun while the one before is exchanged."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._next: tuple[object, Ahead[T]] | None = None
        self._closed = False

    def round(
        self,
        key: object,
        make: Callable[[], Iterator[T]],
        next_key: object,
        make_next: Callable[[], Iterator[T]],
    ) -> Iterator[T]:
        """The items of the round that `key` names, begun already if it was named as the next one before."""
        ahead = self._take(key) or Ahead(make, self._stop)
        try:
            yield from ahead
        finally:
            ahead.close()
            self._drop()
            if not (self._stop.is_set() or self._closed):
                self._next = (next_key, Ahead(make_next, self._stop))

    def _take(self, key: object) -> Ahead[T] | None:
        kept, self._next = self._next, None
        if kept is None or kept[0] == key:
            return kept[1] if kept else None
        kept[1].close()
        return None

    def close(self) -> None:
        """Make nothing ahead any more."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._next is not None:
            self._next[1].close()
            self._next = None
