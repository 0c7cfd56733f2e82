"""How much this machine's uplink carries, as seen in its own rounds, and what follows for who reduces how much."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

MIN_MEASURED_BYTES = 256 * 1024  # less is gone before the network has had to show what it can
MAX_MBPS = 1024.0  # more makes no difference
KEPT = 8


class Uplink:
    """The best of the newest measurements: others' traffic and a busy receiver only ever make a link look slower."""

    def __init__(self) -> None:
        self._mbps: deque[float] = deque(maxlen=KEPT)

    def measure(self, sections: Sequence[tuple[int, float]]) -> None:
        """Take in (bytes, seconds that the receiver was busy reading) of everything sent in one round, side by side."""
        total = sum(size for size, _ in sections)
        seconds = median(seconds for _, seconds in sections) if sections else 0.0
        if total >= MIN_MEASURED_BYTES and seconds > 0:
            self._mbps.append(8e-6 * total / seconds)

    @property
    def mbps(self) -> float:
        """In Mbit/s, 0 = not known. Rounded to a power of two: spans that move for every little change cost more than
        they save."""
        if not self._mbps:
            return 0.0
        return float(2.0 ** round(math.log2(min(max(max(self._mbps), 1.0), MAX_MBPS))))


def shares(reduces: Sequence[bool], mbps: Sequence[float]) -> list[float]:
    """Each member's share of what there is to reduce, so that all members' uploads end as early as possible.

    With a share s a member of N sends its payload to the other reducers and its aggregate to N - 1 members: that makes
    1 + s (N - 2) payloads. The same numbers give the same shares on every machine. At least one member must reduce.
    """
    known = [speed for speed in mbps if speed > 0]
    usual = median(known) if known else 1.0
    speeds = [(speed or usual) if does else 0.0 for does, speed in zip(reduces, mbps, strict=True)]
    fastest_first = sorted((speed for speed in speeds if speed > 0), reverse=True)
    to_share = float(len(speeds) - 2)
    if to_share <= 0 or fastest_first[0] == fastest_first[-1]:
        return [float(does) for does in reduces]
    payload_s = 0.0  # how long the uploads take, in the time that one payload takes at 1 Mbit/s
    for num, speed in enumerate(fastest_first, 1):
        with_this_one = (to_share + num) / math.fsum(fastest_first[:num])
        if num > 1 and with_this_one * speed < 1.0:
            break  # sending its own payload keeps it busy for longer than that
        payload_s = with_this_one
    return [max(0.0, payload_s * speed - 1.0) / to_share for speed in speeds]
