"""How packets fare between hosts with home connections: rate, queue, delay, jitter, loss, cuts and partitions.

Only arithmetic and seeded chance, no clock and no socket: `lab_switch` runs it on real packets, tests on made-up ones.
A packet waits for its sender's uplink, travels, and waits for its receiver's downlink. As in `network`, a round trip
between two hosts is the mean of theirs, and so is the share of packets that is lost on the way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

QUEUE_S = 0.4
"""How much a home router keeps of what does not fit the line yet; more is dropped."""


@dataclass(frozen=True)
class HomeLink:
    """One host's connection; 0 Mbit/s = as fast as the machine is."""

    up_mbps: float = 0.0
    down_mbps: float = 0.0
    rtt_ms: float = 0.0
    """Round trip to another host with such a connection."""
    jitter_ms: float = 0.0
    """Up to so much is added to a packet's way; packets of one pair of hosts do not overtake each other."""
    loss: float = 0.0
    """Share of packets that is lost, in each direction."""


@dataclass
class _Host:
    link: HomeLink
    is_cut: bool = False
    side: int = 0  # of a partition
    up_free: float = 0.0  # when the uplink has sent all that waits
    down_free: float = 0.0
    last_arrival: dict[str, float] = field(default_factory=dict)  # by sender
    counts: dict[str, int] = field(
        default_factory=lambda: {"up_bytes": 0, "down_bytes": 0, "packets": 0, "lost": 0, "overflowed": 0}
    )


class Wire:
    """All hosts. Times are seconds on the caller's clock."""

    def __init__(self, seed: int = 0):
        self._hosts: dict[str, _Host] = {}
        self._chance = random.Random(seed)

    def add(self, name: str, link: HomeLink) -> None:
        self._hosts[name] = _Host(link)

    def change(self, name: str, link: HomeLink) -> None:
        """A connection gets better or worse."""
        self._hosts[name].link = link

    def cut(self, name: str, is_cut: bool) -> None:
        """A cable is pulled, or put back."""
        self._hosts[name].is_cut = is_cut

    def partition(self, sides: Sequence[Sequence[str]]) -> None:
        """Only hosts of one side reach each other; who is in none is on the first. No sides: everybody does."""
        for host in self._hosts.values():
            host.side = 0
        for number, side in enumerate(sides):
            for name in side:
                self._hosts[name].side = number

    def send(self, now: float, source: str, target: str, size: int) -> float | None:
        """When a packet of `size` bytes arrives at the target's line; None if it never does."""
        one, other = self._hosts[source], self._hosts[target]
        one.counts["packets"] += 1
        if one.is_cut or other.is_cut or one.side != other.side:
            one.counts["lost"] += 1
            return None
        sent = self._through(now, one.up_free, one.link.up_mbps, size)
        if sent is None:
            one.counts["overflowed"] += 1
            return None
        one.up_free = sent
        one.counts["up_bytes"] += size
        if self._chance.random() < (one.link.loss + other.link.loss) / 2:
            one.counts["lost"] += 1
            return None
        way_s = (one.link.rtt_ms + other.link.rtt_ms) / 4e3
        way_s += self._chance.random() * (one.link.jitter_ms + other.link.jitter_ms) / 2e3
        arrival = max(sent + way_s, other.last_arrival.get(source, 0.0))
        other.last_arrival[source] = arrival
        return arrival

    def receive(self, now: float, target: str, size: int) -> float | None:
        """When a packet that has arrived at the target's line is through it; None if it is dropped there."""
        host = self._hosts[target]
        received = None if host.is_cut else self._through(now, host.down_free, host.link.down_mbps, size)
        if received is None:
            host.counts["overflowed"] += 1
            return None
        host.down_free = received
        host.counts["down_bytes"] += size
        return received

    def counts(self) -> dict[str, dict[str, int]]:
        """By host: bytes through its line, packets sent, lost on the way, dropped as the line's queue was full."""
        return {name: dict(host.counts) for name, host in self._hosts.items()}

    @staticmethod
    def _through(now: float, free: float, mbps: float, size: int) -> float | None:
        if not mbps:
            return now
        begin = max(now, free)
        return None if begin - now > QUEUE_S else begin + size * 8 / (mbps * 1e6)
