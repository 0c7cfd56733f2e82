"""Virtual time: events in order, waits without waiting, deaths that leave nothing."""

from __future__ import annotations

import threading
import time

import pytest

from dtrain.experiments.virtual_time import VirtualClock, VirtualCondition


def test_actors_run_in_the_order_of_their_times() -> None:
    """Who is due first runs first, of equals who asked first; hours pass at once."""
    clock, seen = VirtualClock(), list[tuple[str, float]]()

    def ticks(name: str, period_s: float) -> None:
        for _ in range(3):
            clock.sleep(period_s)
            seen.append((name, clock.monotonic()))

    began = time.monotonic()
    clock.spawn("slow", lambda: ticks("slow", 7200.0))
    clock.spawn("fast", lambda: ticks("fast", 3600.0))
    clock.run()
    assert time.monotonic() - began < 60
    hours = [(name, at_s / 3600) for name, at_s in seen]
    assert hours == [("fast", 1), ("slow", 2), ("fast", 2), ("fast", 3), ("slow", 4), ("slow", 6)]


def test_a_condition_wakes_all_who_wait_or_times_out() -> None:
    """notify_all ends every wait at that moment; without it a wait ends at its timeout."""
    clock, woken = VirtualClock(), list[tuple[str, float]]()
    condition = VirtualCondition(clock)

    def waits(name: str, timeout: float | None) -> None:
        condition.wait(timeout)
        woken.append((name, clock.monotonic()))

    def notifies() -> None:
        clock.sleep(5.0)
        condition.notify_all()

    for name, timeout in (("short", 2.0), ("long", 9.0), ("endless", None)):
        clock.spawn(name, lambda name=name, timeout=timeout: waits(name, timeout))  # type: ignore[misc]
    clock.spawn("notifier", notifies)
    clock.run()
    assert woken == [("short", 2.0), ("long", 5.0), ("endless", 5.0)]


def test_a_courier_works_beside_its_caller() -> None:
    """Calls run one after another while the caller goes on; result() waits in virtual time and raises what they do."""
    clock, seen = VirtualClock(), list[float]()

    def work(seconds: float) -> float:
        clock.sleep(seconds)
        if seconds > 2:
            raise ValueError("too long")
        return clock.monotonic()

    def caller() -> None:
        courier = clock.courier()
        first, second = courier.submit(work, 2.0), courier.submit(work, 3.0)
        clock.sleep(1.0)
        assert not first.done()
        seen.append(first.result())
        with pytest.raises(ValueError, match="too long"):
            second.result()
        seen.append(clock.monotonic())

    clock.spawn("caller", caller)
    clock.run()
    assert seen == [2.0, 5.0]


def test_the_killed_do_not_go_on() -> None:
    """A planned death ends an actor, and what it began, where they wait; cleaning up still happens."""
    clock, seen = VirtualClock(), list[str]()

    def victim() -> None:
        clock.courier().submit(lambda: (clock.sleep(5.0), seen.append("its courier")))
        try:
            clock.sleep(10.0)
            seen.append("victim")
        finally:
            seen.append("cleaned up")

    actor = clock.spawn("victim", victim)

    def killer() -> None:
        clock.sleep(3.0)
        clock.kill(actor)

    clock.spawn("killer", killer)
    clock.run()
    assert seen == ["cleaned up"] and clock.monotonic() == 3.0


def test_failures_come_out_and_waits_for_nothing_are_found() -> None:
    """What an actor raises ends the run; actors that all wait for one another are an error that names them."""
    clock = VirtualClock()
    clock.spawn("bad", lambda: 1 / 0)
    clock.spawn("other", lambda: clock.sleep(1.0))
    with pytest.raises(ZeroDivisionError):
        clock.run()
    clock = VirtualClock()
    clock.spawn("lonely", lambda: VirtualCondition(clock).wait())
    with pytest.raises(RuntimeError, match="lonely"):
        clock.run()


def test_a_set_flag_ends_a_wait_before_it_begins() -> None:
    """`wait` on a flag that is set lets no time pass."""
    clock, flag = VirtualClock(), threading.Event()
    flag.set()
    clock.spawn("waiter", lambda: clock.wait(flag, 100.0))
    clock.run()
    assert clock.monotonic() == 0.0
