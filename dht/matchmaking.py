"""hivemind's matchmaking, made to meet once per round.

Three things differ from stock: the group key names the round, so that peers at different rounds never meet; the group
is complete when every peer that the heartbeats expect has joined, and may start early or with a majority only; and the
leader lingers after its last word, because a leader that hangs up first can lose that word on the way
(`dht/streams.py` tells why), which followers see as "could not find a group".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time

from dtrain.dht.streams import ACKNOWLEDGE_S

POLL_S = 0.1
LOOK_PERIOD_S = 0.2


@dataclass(frozen=True)
class Ticket:
    """One search for a group; has what hivemind's Matchmaking reads from its StepControl."""

    data_for_gather: bytes
    scheduled_time: float  # DHT time at which an incomplete group starts
    deadline: float  # DHT time at which the search is given up

    def get_timeout(self) -> float:
        return max(0.0, self.deadline - float(get_dht_time()))


class RoundMatchmaking(Matchmaking):  # type: ignore[misc]  # hivemind ships no types
    """Finds the one group of a round."""

    def __init__(self, *args: Any, base_prefix: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._base_prefix = base_prefix
        self._ticket_lasts_s = 0.0

    async def find_round_group(
        self, round: int, ticket: Ticket, expected: Callable[[], int]
    ) -> GroupInfo | None:
        """Look for the group of `round` until the ticket's deadline, or until there is nobody to meet.

        `expected()` is the number of live peers that may come, ourselves included; it is asked again and again, so a
        peer that dies while the others wait is waited for only until its heartbeat runs out.
        """
        self.group_key_manager.prefix = f"{self._base_prefix}-{round}"
        self._ticket_lasts_s = ticket.get_timeout()
        self._set_sizes(expected())
        search = asyncio.create_task(self.look_for_group(ticket))
        watcher = asyncio.create_task(self._start_when_complete(expected))
        try:
            await asyncio.wait({search, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if search.done() or self.assembled_group.done():
                group: GroupInfo | None = await search
                return group
            return None
        finally:
            watcher.cancel()
            search.cancel()
            await asyncio.wait({search, watcher})

    def _set_sizes(self, expected: int) -> None:
        self.target_group_size = max(2, expected)
        # Only a majority of the live peers may start a round without the rest: two halves can never both go on.
        self.min_group_size = max(2, expected // 2 + 1)

    async def _start_when_complete(self, expected: Callable[[], int]) -> None:
        """Start the group as soon as everybody is in; return when there is nobody left to meet."""
        while (count := expected()) > 1:
            self._set_sizes(count)
            if self._is_complete():
                async with self.lock_request_join_group:
                    if self._is_complete():
                        await self.leader_assemble_group()
            await asyncio.sleep(POLL_S)

    def _is_complete(self) -> bool:
        return (
            self.is_looking_for_group
            and self.current_leader is None
            and not self.assembled_group.done()
            and len(self.current_followers) + 1 >= self.target_group_size
        )

    def get_request_expiration_time(self) -> float:
        """DHT time until which we would wait for a leader to start its group.

        A leader refuses whoever gives up before it starts. A peer that cannot lead may have come before its leader
        did, so it waits for as long as a leader's ticket can last.
        """
        if self.client_mode:
            return float(get_dht_time()) + self._ticket_lasts_s
        return float(super().get_request_expiration_time())

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        last_word = None
        async for message in super().rpc_join_group(request, context):
            yield message
            last_word = message.code
        # The follower's hang-up cancels this handler. If it did so already, hivemind has swallowed it: then the last
        # word was never said.
        if last_word not in (None, averaging_pb2.ACCEPTED):
            await asyncio.sleep(ACKNOWLEDGE_S)


class LocalDht:
    """What hivemind's matchmaking needs of a DHT object, answered by the node in this very process."""

    client_mode = False

    def __init__(self, node: DHTNode):
        self._node = node
        self.peer_id = node.peer_id
        self._next_look = 0.0

    def store(self, *args: Any, return_future: bool = False, **kwargs: Any) -> Awaitable[bool]:
        stored: Awaitable[bool] = self._node.store(*args, **kwargs)
        return stored

    async def get(self, *args: Any, return_future: bool = False, **kwargs: Any) -> Any:
        """Looks at most every `LOOK_PERIOD_S`: while it waits hivemind looks for leaders without a pause, and every
        look asks every near node."""
        now = asyncio.get_running_loop().time()
        self._next_look = max(now, self._next_look + LOOK_PERIOD_S)
        await asyncio.sleep(self._next_look - now)
        return await self._node.get(*args, **kwargs)
