"""How far another peer is from here: its clock against ours, and the bandwidth between us. For `dtrain doctor`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from google.protobuf.wrappers_pb2 import BytesValue
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase

MAX_BYTES = 1_000_000  # of one answer: what a stranger can have us send
MAX_AT_ONCE = 2
PINGS = 5
PING_S, TRANSFER_S = 5.0, 20.0


@dataclass(frozen=True)
class Distance:
    """What was measured with one peer. `skew_s` is how far our clock is ahead of its."""

    skew_s: float
    rtt_s: float
    up_mbps: float
    down_mbps: float


class Probe(ServicerBase):  # type: ignore[misc]  # hivemind ships no types
    """Answers with the time and as many bytes as are asked for, within bounds."""

    def __init__(self, p2p: P2P, clock: Callable[[], float] = time.time):
        self._p2p, self._clock = p2p, clock
        self._at_once = asyncio.Semaphore(MAX_AT_ONCE)

    async def open(self) -> None:
        """Begin to answer."""
        await self.add_p2p_handlers(self._p2p)

    async def rpc_probe(self, request: BytesValue, context: P2PContext) -> BytesValue:
        """{"want": bytes of padding in the answer, "pad": any bytes} -> {"time": Unix seconds, "pad": bytes}."""
        want = msgpack.unpackb(request.value)["want"]
        if not isinstance(want, int) or not 0 <= want <= MAX_BYTES:
            raise ValueError(f"at most {MAX_BYTES} bytes")
        async with self._at_once:
            return BytesValue(value=msgpack.packb({"time": self._clock(), "pad": bytes(want)}))


Ask = Callable[[int, int, float], Awaitable[tuple[float, float]]]


def _asking(p2p: P2P, peer: str, clock: Callable[[], float]) -> Ask:
    """A function of (bytes wanted, bytes sent, timeout in seconds): (seconds it took, how far our clock is ahead)."""
    stub = Probe.get_stub(p2p, PeerID.from_base58(peer))

    async def ask(want: int, pad: int, timeout_s: float) -> tuple[float, float]:
        request = BytesValue(value=msgpack.packb({"want": want, "pad": bytes(pad)}))
        began, sent_at = time.monotonic(), clock()
        reply: dict[str, Any] = msgpack.unpackb((await stub.rpc_probe(request, timeout=timeout_s)).value)
        seconds = time.monotonic() - began
        return seconds, sent_at + seconds / 2 - float(reply["time"])

    return ask


async def measure(p2p: P2P, peer: str, clock: Callable[[], float] = time.time) -> Distance:
    """Measure with a peer that we are connected to. Raises whatever the connection does."""
    ask = _asking(p2p, peer, clock)
    pings = [await ask(0, 0, PING_S) for _ in range(PINGS)]
    rtt_s, skew_s = min(pings)  # the quickest answer knows the time best
    down_s, _ = await ask(MAX_BYTES, 0, TRANSFER_S)
    up_s, _ = await ask(0, MAX_BYTES, TRANSFER_S)
    megabits = MAX_BYTES * 8 / 1e6
    return Distance(skew_s, rtt_s, megabits / max(1e-3, up_s - rtt_s), megabits / max(1e-3, down_s - rtt_s))


async def clock_skew(p2p: P2P, peers: Sequence[str], clock: Callable[[], float] = time.time) -> float | None:
    """How many seconds our clock is ahead of these peers', by one ping each: the median of what they say, of two the
    one that is nearer to ours. None if nobody answers."""

    async def ahead_of(peer: str) -> float:
        return (await _asking(p2p, peer, clock)(0, 0, PING_S))[1]

    # Some are gone, or of a version that does not answer.
    answers = await asyncio.gather(*map(ahead_of, peers), return_exceptions=True)
    return middle([answer for answer in answers if isinstance(answer, float)])


def middle(skews: Sequence[float]) -> float | None:
    """See `clock_skew`."""
    if not skews:
        return None
    ordered = sorted(skews)
    lower, upper = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return min(lower, upper, key=abs)


async def measure_any(p2p: P2P, peers: Mapping[str, Sequence[str]]) -> Distance | None:
    """The same with the first of these peers that answers."""
    for peer in peers:
        try:
            return await measure(p2p, peer)
        except Exception:  # gone, or of a version that does not answer
            continue
    return None
