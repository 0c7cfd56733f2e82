"""One span's reducer: gathers the members' sections, reduces them once, and knows who got the result."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from dtrain.compression.codec import Codec
from dtrain.compression.screen import REASONS, screen
from dtrain.dht.kept_residual import KeptResidual
from dtrain.dht.membership import Member

RECONNECT_S = 1.5  # how long a sender whose connection broke may take to come back
TAKE_S = 3.0  # how long a member that needs the result may take to come for it


class SpanReducer:
    """Reduces one span of one round.

    With `screens` the sections are judged by each other before they are summed (`compression/screen.py`).
    A sender is out of the span once it is dropped: its section was bad, or did not come in time. From the moment of
    reducing on nobody comes in and nobody is dropped. `report(problem)` gets a line about everybody who is;
    `reduced()` is called when the sum is there, before anybody can have it.
    """

    def __init__(
        self,
        codec: Codec,
        span: tuple[int, int],
        members: Sequence[Member],
        *,
        run: bytes,
        round: int,
        residual: KeptResidual | None,
        screens: bool,
        report: Callable[[str], None],
        reduced: Callable[[], object],
    ):
        self._codec, self.span, self._members = codec, span, members
        self._run, self._round, self._residual = run, round, residual
        self._screens, self._report, self._reduced = screens, report, reduced
        self.refused: dict[int, str] = {}  # members that are not in the sum for what they sent, and why
        self.aggregate: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._inbox: dict[int, bytes] = {}
        self._inbox_changed = asyncio.Event()
        self._active = set(range(len(members)))  # senders whose section may still come
        self._connections = [0] * len(members)
        self._takers: set[str] = set()
        self._taken = asyncio.Event()

    # ------------------------------------------------------------------ sections

    def accept(self, sender: int, section: bytes) -> None:
        """A member's checked section is here."""
        if sender in self._active and sender not in self._inbox:
            self._inbox[sender] = section
            self._inbox_changed.set()

    def drop(self, sender: int, reason: str) -> None:
        """A member's section will not come."""
        if sender in self._active and sender not in self._inbox:
            self._active.discard(sender)
            self._report(f"{self._members[sender].peer_id} is not in our span: {reason}")
            self._inbox_changed.set()

    def connected(self, sender: int) -> int:
        """A member begins to send; returns a number for this attempt of it."""
        self._connections[sender] += 1
        return self._connections[sender]

    def disconnected(self, sender: int, connection: int) -> None:
        """Its connection broke; it may come back, but not at leisure."""
        asyncio.get_running_loop().call_later(RECONNECT_S, self._drop_the_gone, sender, connection)

    def _drop_the_gone(self, sender: int, connection: int) -> None:
        if self._connections[sender] == connection:
            self.drop(sender, "disconnected")

    def _drop_the_slow(self, patience_s: float) -> None:
        for sender in list(self._active):
            self.drop(sender, f"nothing within {patience_s:g} s")

    # ------------------------------------------------------------------ reducing

    async def reduce(self, patience_s: float) -> None:
        """Wait for the sections, at most so long for silent senders; the sum is in `aggregate` then."""
        timeout = asyncio.get_running_loop().call_later(patience_s, self._drop_the_slow, patience_s)
        try:
            while not self._active <= self._inbox.keys():
                self._inbox_changed.clear()
                await self._inbox_changed.wait()
        finally:
            timeout.cancel()
        sections = [(i, self._members[i].weight, self._inbox[i]) for i in sorted(self._active)]
        self._inbox, self._active = {}, set()
        aggregate = await asyncio.to_thread(self._sum, sections)
        self._reduced()
        if not self.aggregate.done():
            self.aggregate.set_result(aggregate)

    def _sum(self, sections: Sequence[tuple[int, float, bytes]]) -> bytes:
        """The span's aggregate. What it leaves out of the sum is on our disk before anybody has the aggregate."""
        first, count = self.span
        if self._screens:
            screened = screen(self._codec, sections, first, count)
            sections, self.refused = screened.sections, screened.refused
            for sender, reason in self.refused.items():
                self._report(f"{self._members[sender].peer_id} is not in our sum: {REASONS[reason]}")
        weight = math.fsum(weight for _, weight, _ in sections)
        left_over = None if self._residual is None else self._residual.draw(first, count, weight)
        aggregate = self._codec.reduce(
            sections,
            residual=left_over,
            run=self._run,
            round=self._round,
            first_chunk=first,
            num_chunks=count,
        )
        if self._residual is not None and left_over is not None:
            self._residual.reduced(self._round, self.span, weight, left_over, aggregate)
        return aggregate

    # ------------------------------------------------------------------ who has the result

    def took(self, member_id: str) -> None:
        """A member has the aggregate from us."""
        self._takers.add(member_id)
        self._taken.set()

    async def is_taken(self) -> bool:
        """Whether anybody else has the aggregate; waits for the first one that does."""
        if not self._taken.is_set():
            waiting = asyncio.ensure_future(self._taken.wait())
            await asyncio.wait({waiting}, timeout=TAKE_S)
            waiting.cancel()
        return self._taken.is_set()
