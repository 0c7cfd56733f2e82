"""Whom a member has nothing to do with any more, for a while: until which round, and why."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MAX_OUTCASTS = 4096


class Outcasts:
    """`round()` is the round that this member is at."""

    def __init__(self, round: Callable[[], int]):
        self._round = round
        self._out: OrderedDict[str, tuple[int, str]] = OrderedDict()

    def put_out(self, peer_id: str, until: int, why: str) -> None:
        """Up to and including that round."""
        self._out[peer_id] = until, why
        while len(self._out) > MAX_OUTCASTS:
            self._out.popitem(last=False)

    @property
    def num_out(self) -> int:
        """How many are out now."""
        return sum(self._round() <= until for until, _ in self._out.values())

    def why(self, peer_id: str) -> str:
        """Why a peer is out, or ""."""
        until, why = self._out.get(peer_id, (-1, ""))
        return why if self._round() <= until else ""
