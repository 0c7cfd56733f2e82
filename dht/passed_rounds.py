"""Rounds that pass while a state is being downloaded, kept on the disk until they are replayed on it.

Peers keep a limited number of past rounds. A download that takes longer than those would end with a state that nothing
leads on from, and begin anew, for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgpack

from dtrain.dht.history import RoundRecord, packed, parse_round
from dtrain.dht.streams import StreamError

LOOK_S = 1.0  # between two looks for rounds that have passed
SUFFIX = ".round"


class PassedRounds:
    """`newest()` is the round that the others are at, `fetch(round)` gets a past one from any of them."""

    def __init__(
        self,
        folder: Path,
        newest: Callable[[], int],
        fetch: Callable[[int], Awaitable[RoundRecord | None]],
    ):
        self._folder, self._newest, self._fetch = folder, newest, fetch

    def reached(self, round: int) -> int:
        """The round up to which those that are here lead on from `round`."""
        here = self._numbers()
        while round in here:
            round += 1
        return round

    async def keep_up(self, round: int) -> None:
        """Get the rounds since `round` as they pass, until cancelled."""
        reached = self.reached(round)
        self._drop(lambda number: not round <= number < reached)
        while True:
            while reached < self._newest() and (record := await self._fetch(reached)) is not None:
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self._path(reached).write_bytes(msgpack.packb(packed(record)))
                except OSError as error:  # the download itself goes on
                    logging.warning("cannot keep the rounds that pass in %s: %s", self._folder, error)
                    return
                reached += 1
            await asyncio.sleep(LOOK_S)

    def get(self, round: int) -> RoundRecord | None:
        """One that is here; those before it are not needed any more."""
        self._drop(lambda number: number < round)
        try:
            reply, blob = msgpack.unpackb(self._path(round).read_bytes())
            return parse_round(round, reply, blob)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, StreamError):  # a crash left half of it
            self._drop(lambda number: number >= round)
            return None

    def clear(self) -> None:
        """None is needed any more."""
        self._drop(lambda _: True)

    def _numbers(self) -> set[int]:
        return {int(path.stem) for path in self._folder.glob(f"*{SUFFIX}") if path.stem.isdecimal()}

    def _path(self, round: int) -> Path:
        return self._folder / f"{round}{SUFFIX}"

    def _drop(self, unwanted: Callable[[int], bool]) -> None:
        for number in filter(unwanted, self._numbers()):
            self._path(number).unlink(missing_ok=True)


def no_rounds() -> PassedRounds:
    """For a download after which nothing is replayed: none are kept, anywhere."""

    async def fetch(round: int) -> RoundRecord | None:
        return None

    return PassedRounds(Path(os.devnull), lambda: 0, fetch)
