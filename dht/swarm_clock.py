"""The time by which peers date what they tell each other: this machine's clock, put right where it is off.

Records of the DHT and rounds expire by the wall clock, and hivemind has nobody in whose clock is three seconds off.
Clocks of home computers are off by more now and then, by whole hours where two operating systems share one machine.
"""

from __future__ import annotations

import logging
import sys
import time

GOOD_S = 1.0
"""Nothing is put right below: answers are late by half a round trip, give or take."""
MAX_OFF_S = 86_400.0
"""Nor above: that is a clock that was never set, or a liar."""


class SwarmClock:
    """Our clock minus how far it is ahead of the others'. One per process."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        """Unix seconds."""
        return time.time() - self.ahead_s

    def install(self) -> None:
        """Have hivemind, and what is ours above it, go by this clock; every module has its own name for it."""
        for module in list(sys.modules.values()):
            if "get_dht_time" in vars(module):
                vars(module)["get_dht_time"] = self

    def put_right(self, skew_s: float | None) -> None:
        """Ours is `skew_s` ahead of the others' (None: nobody says). Says so where that matters."""
        if skew_s is None or not GOOD_S < abs(skew_s) <= MAX_OFF_S:
            return
        self.ahead_s = skew_s
        logging.warning(
            "this machine's clock is %s the others': going by theirs; set it by the network "
            "(timedatectl set-ntp true on Linux)",
            off_by(skew_s),
        )


def off_by(skew_s: float) -> str:
    """Such as "90 s ahead of"."""
    return f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'}"
