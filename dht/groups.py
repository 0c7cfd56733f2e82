"""The groups whose rounds this member takes part in, or did a moment ago."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from dtrain.dht.rounds import RoundRunner
from dtrain.dht.streams import StreamError

KNOWN_S = 5.0  # a groupmate may call us before our leader's word that the group exists has come
KEPT = 4  # slow groupmates may still ask for a span of the last few groups


class Groups:
    """The runners of the newest rounds by group id."""

    def __init__(self) -> None:
        self._runners: OrderedDict[bytes, RoundRunner] = OrderedDict()
        self._changed = asyncio.Condition()

    async def add(self, runner: RoundRunner) -> None:
        """From now on groupmates reach it."""
        async with self._changed:
            self._runners[runner.group_id] = runner
            while len(self._runners) > KEPT:
                self._runners.popitem(last=False)
            self._changed.notify_all()

    async def get(self, group_id: object) -> RoundRunner:
        """The runner that a groupmate asks for, which may come a moment later. Raises StreamError if it does not."""
        if not isinstance(group_id, bytes):
            raise StreamError("no group id")
        async with self._changed:
            known = self._changed.wait_for(lambda: group_id in self._runners)
            try:
                await asyncio.wait_for(known, KNOWN_S)
            except asyncio.TimeoutError:
                raise StreamError("unknown group") from None
            return self._runners[group_id]
