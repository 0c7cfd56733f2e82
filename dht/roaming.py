"""Notices that this machine has moved to another network, or has slept: its connections are dead then.

Nobody tells a TCP connection that the address it was made from is gone; left alone, it looks alive for minutes.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable

import psutil

LOOK_PERIOD_S = 2.0
PATIENCE = 3  # looks; longer than that without a way out, what is there must do
JUMP_S = 5.0  # the clock on the wall may be slewed by less while we run
SOMEWHERE = (
    "198.51.100.1"  # an address of nobody (RFC 5737): what leaves for it takes the way to the internet
)
_PORT = 9  # any: nothing is sent


class MachineWatch:
    """Compares where this machine is with where it was. `peers` are the IP addresses of the peers it speaks with."""

    def __init__(
        self,
        host: str,
        peers: Iterable[str],
        *,
        addresses: Callable[[], set[str]] | None = None,
        route: Callable[[str], str] | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self._host, self._targets = host, [*peers, SOMEWHERE]
        self._addresses, self._route = addresses or own_addresses, route or source_address
        self._clock = clock or (lambda: time.time() - time.monotonic())
        self._began_with_addresses = bool(self._here())
        self._offset = self._clock()  # grows by the time slept: the monotonic clock stands still meanwhile
        self._start_over(self._here())

    def look(self) -> str:
        """What happened, in one line for the user, if connections must be made anew; else ""."""
        jump, self._offset = self._clock() - self._offset, self._clock()
        if abs(jump) > JUMP_S:
            return f"this machine was asleep for {jump:.0f} s, or its clock was set"
        here = self._here()
        leaving_from, lost = self._leaving_from(here), self._used - here
        if not here or (lost and self._had_a_way_out and not leaving_from and self._patience > 0):
            self._patience -= 1
            return ""  # between two networks
        came = leaving_from - self._used if not self._had_a_way_out else set()
        if not lost and not came:
            self._used |= leaving_from
            return ""
        now = ", ".join(sorted(leaving_from or here))
        self._start_over(here)
        return f"this machine's address changed from {', '.join(sorted(lost)) or 'none'} to {now}"

    def is_offline(self) -> bool:
        """Whether this machine has lost its last address: whoever else there is cannot be seen from here."""
        return self._began_with_addresses and not self._here()

    def _start_over(self, here: set[str]) -> None:
        leaving_from = self._leaving_from(here)
        self._used, self._had_a_way_out = leaving_from or here, bool(leaving_from)
        self._patience = PATIENCE

    def _here(self) -> set[str]:
        """Addresses at which others could reach us, or through which we could reach them."""
        here = {address for address in self._addresses() if not ipaddress.IPv4Address(address).is_loopback}
        return here if ipaddress.IPv4Address(self._host).is_unspecified else here & {self._host}

    def _leaving_from(self, here: set[str]) -> set[str]:
        """Those that our connections come from: some virtual machine's bridge may come and go unnoticed."""
        return {self._route(target) for target in self._targets} & here


def own_addresses() -> set[str]:
    """The IPv4 addresses of this machine's network interfaces that are up."""
    stats = psutil.net_if_stats()
    return {
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in stats and stats[name].isup
    }


def source_address(target: str) -> str:
    """The address from which this machine would send to `target`, or "". Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _PORT))
        except OSError:  # no way there
            return ""
        return str(probe.getsockname()[0])
