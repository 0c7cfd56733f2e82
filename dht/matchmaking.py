"""hivemind's matchmaking, made to meet once per round.

Five things differ from stock: who would lead is known from what peers tell each other, not from the DHT; the group key
names the round, so that peers at different rounds never meet; the group is complete when every peer that the heartbeats
expect has joined, and may start early or with a majority only; a leader whose power was cut, which no connection tells,
is left when its heartbeat says so; and the leader lingers after its last word, because a leader that hangs up first can
lose that word on the way (`dht/streams.py` tells why), which followers see as "could not find a group".
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import ValueWithExpiration

from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.streams import ACKNOWLEDGE_S, in_background

POLL_S = 0.1
LOOK_PERIOD_S = 0.5
AGAIN_S = 1.0  # who turned us down is asked again after this long


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

    def __init__(self, *args: Any, base_prefix: str, heartbeats: Heartbeats, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._base_prefix, self._heartbeats = base_prefix, heartbeats
        self._ticket_lasts_s = 0.0
        self._asked: PeerID | None = None  # the leader that we wait for

    async def find_round_group(
        self, round: int, ticket: Ticket, expected: Callable[[], int]
    ) -> GroupInfo | None:
        """Look for the group of `round` until the ticket's deadline, or until there is nobody to meet.

        `expected()` is the number of live peers that may come, ourselves included; it is asked again and again, so a
        peer that dies while the others wait is waited for only until its heartbeat runs out. A group that comes after
        the deadline is none: this machine was asleep, and who wanted to meet us then has met without us.
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
                return group if ticket.get_timeout() else None
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

    async def _request_join_group(self, leader: PeerID) -> GroupInfo | None:
        """Ask one leader, and wait until it starts its group, ends it, or is gone.

        A machine whose power was cut hangs up on nobody. Who went on waiting for it would keep all the others waiting.
        Whoever turns us down is asked again in a moment: until it notices as well it follows the one that is gone.
        """
        self._asked = leader
        request = asyncio.create_task(super()._request_join_group(leader))
        watch = asyncio.create_task(self._until_gone(leader))
        try:
            await asyncio.wait({request, watch}, return_when=asyncio.FIRST_COMPLETED)
            group: GroupInfo | None = request.result() if request.done() else None
            if not request.done():
                logging.info("%s, which would lead the group, is gone", leader)
            if group is None:
                asyncio.get_running_loop().call_later(AGAIN_S, self.potential_leaders.past_attempts.clear)
            return group
        finally:
            request.cancel()
            watch.cancel()
            await asyncio.wait({request, watch})

    async def _until_gone(self, leader: PeerID) -> None:
        """Returns when that leader was there and is no more; not if it has sent us on to another, which is watched by
        itself."""
        name, was_here = str(leader), False
        while True:
            is_here = any(record.peer_id == name for record in self._heartbeats.active())
            if was_here and not is_here and self._asked == leader:
                return
            was_here = was_here or is_here
            await asyncio.sleep(POLL_S)

    def get_request_expiration_time(self) -> float:
        """DHT time until which we would wait for a leader to start its group.

        A leader refuses whoever gives up before it starts. A peer that cannot lead may have come before its leader
        did, so it waits for as long as a leader's ticket can last.
        """
        if self.client_mode:
            return float(get_dht_time()) + self._ticket_lasts_s
        return float(super().get_request_expiration_time())

    def _check_reasons_to_reject(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> averaging_pb2.MessageFromLeader | None:
        if self._heartbeats.refuses(str(context.remote_id)):
            return averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
        return super()._check_reasons_to_reject(request, context)

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


class LeaderBoard:
    """What hivemind's matchmaking needs of a DHT object: who would lead which group, as peers tell each other."""

    client_mode = False

    def __init__(self, peer_id: PeerID, heartbeats: Heartbeats):
        self.peer_id, self._heartbeats = peer_id, heartbeats

    async def store(
        self, key: str, subkey: bytes, value: bool, expiration_time: float, return_future: bool = False
    ) -> bool:
        """Say that we would lead that group, or that we would not any more."""
        in_background(self._heartbeats.lead(key if value else "", expiration_time))
        return True

    async def get(
        self, key: str, latest: bool = True, return_future: bool = False
    ) -> ValueWithExpiration[dict[bytes, ValueWithExpiration[bool]]]:
        """Who would lead that group; answers when there is news, or after `LOOK_PERIOD_S` without."""
        await self._heartbeats.changed(LOOK_PERIOD_S)
        leaders = {
            PeerID.from_base58(record.peer_id).to_bytes(): ValueWithExpiration(True, record.leads[1])
            for record in self._heartbeats.others()
            if record.leads[0] == key and record.can_be_dialled
        }
        return ValueWithExpiration(leaders, math.inf)
