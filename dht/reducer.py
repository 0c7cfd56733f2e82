"""One span's reducer: gathers the members' sections, reduces them once, and knows who got the result."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.screen import REASONS, screen
from dtrain.dht.evidence import ReducedSpan
from dtrain.dht.faults import FaultPlan
from dtrain.dht.identity import Identity
from dtrain.dht.kept_residual import Commitment, KeptResidual
from dtrain.dht.membership import Member
from dtrain.dht.seals import NOTHING, Setting, Stamp, sign_aggregate

RECONNECT_S = 1.5  # how long a sender whose connection broke may take to come back
TAKE_S = 3.0  # how long a member that needs the result may take to come for it


class SpanReducer:
    """Reduces one span of one round.

    With `screens` the sections are judged by each other before they are summed (`compression/screen.py`).
    A sender is out of the span once it is dropped: its section was bad, or did not come in time. From the moment of
    reducing on nobody comes in and nobody is dropped. `report(problem)` gets a line about everybody who is.
    """

    def __init__(
        self,
        codec: Codec,
        span: tuple[int, int],
        members: Sequence[Member],
        *,
        setting: Setting,
        identity: Identity,
        residual: KeptResidual | None,
        screens: bool,
        report: Callable[[str], None],
        faults: FaultPlan,
    ):
        self._codec, self.span, self._members = codec, span, members
        self._setting, self._identity, self._residual = setting, identity, residual
        self._screens, self._report, self._faults = screens, report, faults
        self._own_index = [member.peer_id for member in members].index(identity.peer_id)
        self.refused: dict[
            int, str
        ] = {}  # members that are not in the sum for what or how they sent (wire.REFUSALS)
        self.why_not: dict[int, str] = {}  # in words, of everybody who is not in the sum
        self.kept: ReducedSpan | None = None  # to answer for the sum, if it is a recompressed one
        self.aggregate: asyncio.Future[tuple[Stamp, bytes]] = asyncio.get_running_loop().create_future()
        self._inbox: dict[int, tuple[bytes, bytes]] = {}  # section, its sender's signature
        self._inbox_changed = asyncio.Event()
        self._active = set(range(len(members)))  # senders whose section may still come
        self._connections = [0] * len(members)
        self._takers: set[str] = set()
        self._taken = asyncio.Event()

    # ------------------------------------------------------------------ sections

    def accept(self, sender: int, section: bytes, signature: bytes) -> None:
        """A member's checked section is here."""
        if sender in self._active and sender not in self._inbox:
            self._inbox[sender] = section, signature
            self._inbox_changed.set()

    def drop(self, sender: int, reason: str, verdict: str = "") -> None:
        """A member's section will not come; where that is its own doing, the aggregate says so (wire.REFUSALS)."""
        if sender in self._active and sender not in self._inbox:
            self._active.discard(sender)
            self.why_not[sender] = reason
            if verdict:
                self.refused[sender] = verdict
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
            self.drop(sender, f"nothing within {patience_s:g} s", "late")

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
        arrived = [(i, *self._inbox[i]) for i in sorted(self._active)]
        self._inbox, self._active = {}, set()
        sealed = await asyncio.to_thread(self._sum, arrived)
        self._faults.happen("reduced", self._setting.round)
        if not self.aggregate.done():
            self.aggregate.set_result(sealed)

    def _sum(self, arrived: Sequence[tuple[int, bytes, bytes]]) -> tuple[Stamp, bytes]:
        """The span's aggregate. What it leaves out of the sum is on our disk before anybody has the aggregate."""
        sections = [(i, self._members[i].counts, section) for i, section, _ in arrived]
        if self._screens:
            screened = screen(self._codec, sections, *self.span)
            sections = screened.sections
            self.refused.update(screened.refused)
            for sender, reason in screened.refused.items():
                self.why_not[sender] = REASONS[reason]
                self._report(f"{self._members[sender].peer_id} is not in our sum: {REASONS[reason]}")
        sections = list(self._faults.missum(self._setting.round, sections, self._own_index))
        if self._residual is None:
            aggregate, inside = self._reduce(sections, None), {i for i, _, _ in sections}
            seal = sign_aggregate(self._identity, self._setting, self.span, aggregate)
            return Stamp(seal, tuple(signature for i, _, signature in arrived if i in inside)), aggregate
        weight, previous = math.fsum(weight for _, weight, _ in sections), self._residual.commitment
        before = self._residual.draw(*self.span, 1.0)
        left_over = before / weight
        aggregate = self._reduce(sections, left_over)
        leaves = audit.leaves(self._codec, *self.span, left_over * weight)
        seal = sign_aggregate(
            self._identity,
            self._setting,
            self.span,
            aggregate,
            root=audit.root(leaves),
            previous=NOTHING if previous is None else previous.seal.digest,
        )
        ours = Commitment(seal, leaves)
        self._residual.reduced(self._setting.round, self.span, weight, left_over, aggregate, ours)
        self.kept = ReducedSpan(self._setting, self.span, arrived, aggregate, ours, before, previous)
        return Stamp(seal), aggregate

    def _reduce(self, sections: Sequence[tuple[int, float, bytes]], left_over: Tensor | None) -> bytes:
        first, count = self.span
        return self._codec.reduce(
            sections,
            residual=left_over,
            refused=self.refused if self._screens else {},
            run=self._setting.run,
            round=self._setting.round,
            first_chunk=first,
            num_chunks=count,
        )

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
