"""What is stuck is ended, with a word on where it stood, even if it does not let itself be cancelled."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from dtrain.dht import watchdog
from dtrain.dht.watchdog import Stuck, end, within


def test_what_ends_in_time_is_handed_on() -> None:
    async def quick() -> int:
        await asyncio.sleep(0)
        return 5

    async def fails() -> int:
        raise ValueError("its own")

    assert asyncio.run(within(5.0, quick())) == 5
    with pytest.raises(ValueError, match="its own"):
        asyncio.run(within(5.0, fails()))


def test_what_is_stuck_is_told_apart_and_its_place_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def stuck_in_a_lock(lock: asyncio.Lock) -> None:
        try:
            await asyncio.Event().wait()
        finally:  # which a cancellation only brings to the next wait
            await asyncio.wait_for(lock.acquire(), 1.0)

    async def run() -> float:
        lock = asyncio.Lock()
        await lock.acquire()
        began = time.monotonic()
        with pytest.raises(Stuck, match="not over"):
            await within(0.05, stuck_in_a_lock(lock))
        return time.monotonic() - began

    assert asyncio.run(run()) < 0.9  # the work itself ends a second later
    assert "stuck_in_a_lock" in caplog.text


def test_a_freeze_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that was closed in the middle of a round: the round goes on when it is opened again."""
    monkeypatch.setattr(watchdog, "STEP_S", 0.05)

    async def frozen() -> str:
        await asyncio.sleep(0.01)
        time.sleep(0.6)  # the whole process stands still
        await asyncio.sleep(0.1)
        return "back"

    assert asyncio.run(within(0.4, frozen())) == "back"


def test_who_waits_no_more_takes_the_work_along() -> None:
    async def run() -> bool:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        waiting = asyncio.create_task(within(5.0, work()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait({waiting})
        await asyncio.wait_for(ended.wait(), 1.0)
        return waiting.cancelled()

    assert asyncio.run(run())


def test_tasks_end_however_they_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loses a cancellation is cancelled again, one that fails is over, one that never ends is left behind."""
    monkeypatch.setattr(watchdog, "AGAIN_S", 0.01)
    monkeypatch.setattr(watchdog, "TRIES", 5)

    async def deaf(times: int) -> None:
        for _ in range(times):
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ValueError

    async def run() -> list[bool]:
        tasks = [asyncio.create_task(work) for work in (deaf(0), deaf(2), fails(), deaf(10))]
        await asyncio.sleep(0)
        await end(*tasks)
        over = [task.done() for task in tasks]
        for _ in range(10):  # so that this loop ends
            tasks[3].cancel()
            await asyncio.sleep(0)
        return over

    assert asyncio.run(run()) == [True, True, True, False]
