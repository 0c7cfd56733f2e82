"""Virtual time: many workers in one thread, each waiting on a clock that jumps from event to event.

Every line of work is an actor, a greenlet that runs until it waits. Then the actor whose wake-up is due first runs on,
of equals the one that asked first: the order of things depends on nothing but the program. Work itself takes no
virtual time; only `sleep` does.

clock = VirtualClock()
clock.spawn("a", worker.run)     # as many as there are
clock.run()                      # until all have ended
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

T = TypeVar("T")


class Actor:
    """One line of work."""

    def __init__(self, name: str, work: Callable[[], object], hub: Any, owner: Actor | None):
        self.name = name
        self.owner = owner
        """The actor that began it, with which it is killed."""
        self.greenlet = greenlet(work, parent=hub)
        self.wake_up = 0
        """Number of the wake-up that it waits for; earlier ones in the queue are void."""
        self.killed = False


class VirtualClock:
    """See `Clock`; also the scheduler of all that waits on it."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._queue: list[tuple[float, int, Actor]] = []
        self._count = 0
        self._hub = getcurrent()
        self._actors: dict[Any, Actor] = {}
        """Actors that have not ended, by their greenlet."""

    # ------------------------------------------------------------------ what actors call

    def monotonic(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now_s

    def time(self) -> float:
        """The same: virtual time begins at zero."""
        return self._now_s

    def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        self._wake(self._current(), self._now_s + max(0.0, seconds))
        self._hub.switch()

    def wait(self, flag: threading.Event, seconds: float) -> None:
        """See `Clock`. A flag that is set meanwhile is noticed at the end of the time."""
        if not flag.is_set():
            self.sleep(seconds)

    def courier(self) -> Executor:
        """See `Clock`."""
        return VirtualCourier(self)

    def park(self) -> None:
        """Wait until somebody calls `unpark` with this actor."""
        self._current().wake_up = -1
        self._hub.switch()

    def unpark(self, actor: Actor) -> None:
        """Let a waiting actor go on, after all that is due now already."""
        self._wake(actor, self._now_s)

    def current(self) -> Actor:
        """The actor that calls."""
        return self._current()

    # ------------------------------------------------------------------ what the simulation calls

    def spawn(self, name: str, work: Callable[[], object], at_s: float = 0.0) -> Actor:
        """Begin a line of work at a time, or now if that is past."""
        actor = Actor(name, work, self._hub, self._actors.get(getcurrent()))
        self._actors[actor.greenlet] = actor
        self._wake(actor, max(at_s, self._now_s))
        return actor

    def kill(self, actor: Actor) -> None:
        """End an actor and what it began where they stand, by GreenletExit, when their turn comes now."""
        for other in [*self._actors.values()]:
            if actor in (other, other.owner):
                other.killed = True
                self._wake(other, self._now_s)

    def run(self) -> None:
        """Run until every actor has ended. What an actor raises comes out here; the others are then ended."""
        try:
            while self._actors:
                self._step()
        finally:
            self._end_all()

    def _step(self) -> None:
        if not self._queue:
            names = ", ".join(actor.name for actor in self._actors.values())
            raise RuntimeError(f"all actors wait for one another: {names}")
        at_s, number, actor = heapq.heappop(self._queue)
        if number != actor.wake_up or actor.greenlet not in self._actors:
            return
        self._now_s = at_s
        try:
            if actor.killed:
                actor.greenlet.throw(GreenletExit)
            else:
                actor.greenlet.switch()
        finally:
            if actor.greenlet.dead:
                del self._actors[actor.greenlet]

    def _end_all(self) -> None:
        for actor in list(self._actors.values()):
            actor.greenlet.throw(GreenletExit)
        self._actors.clear()
        self._queue.clear()

    def _current(self) -> Actor:
        return self._actors[getcurrent()]

    def _wake(self, actor: Actor, at_s: float) -> None:
        self._count += 1
        actor.wake_up = self._count
        heapq.heappush(self._queue, (at_s, self._count, actor))


class VirtualCondition:
    """What `threading.Condition` is to threads. Entering it takes nothing: actors change only where they wait."""

    def __init__(self, clock: VirtualClock):
        self._clock = clock
        self._waiting: list[Actor] = []

    def __enter__(self) -> object:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def wait(self, timeout: float | None = None) -> object:
        """Until the next `notify_all`, or this long."""
        actor = self._clock.current()
        self._waiting.append(actor)
        try:
            if timeout is None:
                self._clock.park()
            else:
                self._clock.sleep(timeout)
        finally:
            if actor in self._waiting:
                self._waiting.remove(actor)
        return None

    def notify_all(self) -> None:
        """Let all who wait go on."""
        waiting, self._waiting = self._waiting, []
        for actor in waiting:
            self._clock.unpark(actor)


class VirtualFuture(Future[T]):
    """A future whose result is waited for on the virtual clock."""

    def __init__(self, clock: VirtualClock):
        super().__init__()
        self._ended = VirtualCondition(clock)

    def result(self, timeout: float | None = None) -> T:
        """The call's result, or what it raised."""
        while not self.done():
            self._ended.wait(timeout)
        return super().result()

    def end(self, work: Callable[[], T]) -> None:
        """Do the work and wake who waits for it."""
        try:
            self.set_result(work())
        except Exception as error:
            self.set_exception(error)
        self._ended.notify_all()


class VirtualCourier(Executor):
    """An executor whose calls are actors, one after another."""

    def __init__(self, clock: VirtualClock):
        self._clock = clock
        self._last: VirtualFuture[Any] | None = None

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See Executor."""
        future: VirtualFuture[T] = VirtualFuture(self._clock)
        before, self._last = self._last, future

        def work() -> None:
            if before is not None and not before.done():
                before.result()
            future.end(lambda: fn(*args, **kwargs))

        self._clock.spawn("courier", work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See Executor."""
        if wait and self._last is not None and not self._last.done():
            self._last.result()
