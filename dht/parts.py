"""The parts of a round that all members must end up with, and how a member gets the ones it lacks.

A part has one source: the reducer of its span, or the worker whose payload it is. Any other member that got it hands it
on, so a lost connection costs nobody a part; one that no reachable member has is missing for all of them alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

from google.protobuf.wrappers_pb2 import BytesValue

from dtrain.dht.membership import Member
from dtrain.dht.streams import Header, StreamError, ask

RETRY_PAUSE_S = 0.2
HAVE, TRYING, WITHOUT = "have", "trying", "without"  # what a member says of a part

CallPeer = Callable[[int, str], Callable[[AsyncIterator[BytesValue]], Awaitable[AsyncIterator[BytesValue]]]]


class Parts:
    """What one member holds. A part has the index of the member that is its source.

    `check(j, header, blob)` raises unless `blob` can be part j, which has `max_bytes(j)` at most, and gives the fields
    of the header that go on with it to others.
    """

    def __init__(
        self,
        sources: Iterable[int],
        members: Sequence[Member],
        own_index: int,
        *,
        call: CallPeer,
        header: Header,
        check: Callable[[int, Header, bytes], Header],
        max_bytes: Callable[[int], int],
        timeout_s: float,
        deadline: float,
    ):
        self.members, self.own_index, self.deadline = members, own_index, deadline
        self._call, self._header, self._check, self._max_bytes = call, header, check, max_bytes
        self._timeout_s = timeout_s
        self.held: dict[int, bytes] = {}
        self._headers: dict[int, Header] = {}
        self.status = dict.fromkeys(sources, TRYING)

    @property
    def left_s(self) -> float:
        """Seconds until the round's deadline."""
        return max(0.05, self.deadline - time.monotonic())

    def keep(self, j: int, header: Header, blob: bytes) -> None:
        """Part j is here, and checked; `header` is what the check gave."""
        self.held[j], self._headers[j] = blob, header
        self.status[j] = HAVE

    def lose(self, j: int) -> None:
        """Part j will not come from its source, or is not to be had after all."""
        self.held.pop(j, None)
        self.status[j] = WITHOUT

    async def from_others(self, j: int) -> None:
        """Ask the other members for part j until one has it, or all that can be reached are without it for good."""
        self.lose(j)
        while j not in self.held and time.monotonic() < self.deadline:
            others = [i for i, m in enumerate(self.members) if m.reduces and i != self.own_index]
            answers = await asyncio.gather(*(self._ask(i, j) for i in others))
            if j in self.held or TRYING not in answers:
                return
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _ask(self, i: int, j: int) -> str:
        try:
            reply, blob = await ask(
                self._call(i, "rpc_fetch_span"),
                {**self._header, "span": j},
                max_bytes=self._max_bytes(j),
                timeout_s=min(self._timeout_s, self.left_s),
            )
            if reply.get("status") != HAVE:
                return TRYING if reply.get("status") == TRYING else WITHOUT
            header = self._check(j, reply, blob)
        except asyncio.CancelledError:
            raise
        except Exception:  # an unreachable or lying member counts as one without
            return WITHOUT
        self.keep(j, header, blob)
        return HAVE

    def serve(self, asker_id: str, part: object) -> tuple[Header, bytes]:
        """What we can say of a part to a member that lacks it. Raises StreamError to refuse."""
        self.index_of(asker_id)
        if not isinstance(part, int) or not 0 <= part < len(self.members):
            raise StreamError("no such span")
        blob = self.held.get(part)
        if blob is not None:
            return {**self._headers[part], "status": HAVE}, blob
        return {"status": self.status.get(part, WITHOUT)}, b""

    def index_of(self, peer_id: str) -> int:
        """Which other member this is. Raises StreamError if it is none."""
        for index, member in enumerate(self.members):
            if member.peer_id == peer_id and index != self.own_index:
                return index
        raise StreamError("not a member of this group")
