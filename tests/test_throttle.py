"""A peer's traffic keeps to the user's rate."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dtrain.dht import transport
from dtrain.dht.throttle import BURST_S, Throttle
from dtrain.dht.transport import Traffic


class VirtualTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    time = VirtualTime()
    monkeypatch.setattr(asyncio, "sleep", time.sleep)
    return time


def test_a_second_has_no_more_than_its_bytes(virtual: VirtualTime) -> None:
    """In any stretch of time no more passes than the rate allows, plus one burst."""
    throttle = Throttle(virtual)
    throttle.bytes_per_s = 1000.0

    async def send() -> list[tuple[float, int]]:
        passed = []
        for size in [10, 700, 300, 1, 5000, 40] * 5:
            await throttle.take(size)
            passed.append((virtual.now, size))
            virtual.now += 0.01 * (size % 7)
        return passed

    passed = asyncio.run(send())
    for first, (begin, _) in enumerate(passed):
        total = 0
        for end, size in passed[first + 1 :]:
            total += size
            assert total <= 1000.0 * (end - begin + BURST_S) + 1e-6


def test_no_limit_costs_nothing(virtual: VirtualTime) -> None:
    """Without a limit nobody waits."""
    asyncio.run(Throttle(virtual).take(10**12))
    assert virtual.now == 100.0


def test_first_come_first_served() -> None:
    """A small message waits for those before it, not for all that are queued after it."""
    order: list[Any] = []

    async def send(throttle: Throttle, name: str, size: int) -> None:
        await throttle.take(size)
        order.append(name)

    async def all_at_once() -> None:
        throttle = Throttle()
        throttle.bytes_per_s = 1e6
        await asyncio.gather(*(send(throttle, name, 2000) for name in ("a", "heartbeat", "b", "c")))

    asyncio.run(all_at_once())
    assert order == ["a", "heartbeat", "b", "c"]


def test_traffic_is_counted_with_what_it_takes() -> None:
    """Messages' bytes by themselves, and both ways together with headers and all."""
    traffic = Traffic()

    async def carry() -> None:
        for _ in range(10):
            await traffic.sending(1000)
            await traffic.receiving(100)

    asyncio.run(carry())
    assert (traffic.up, traffic.down) == (10_000, 1000)
    wanted = (11_000 + 20 * transport.MESSAGE_OVERHEAD_BYTES) / transport.COUNTED_SHARE
    assert traffic.wire_bytes == round(wanted) > 11_000
