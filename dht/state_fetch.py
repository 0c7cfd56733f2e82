"""The newcomer's side of a state transfer: every piece checked on arrival, from as many donors as have the state.

Which state is decided by what several donors agree on, then by the work in it. Each donor is asked for one piece after
another, in two lanes so that its line never idles; a fast donor so gives more. When no piece is left to ask for, a lane
takes over one that another donor has had for long. Pieces go into a `PartialState`, where a broken download goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import operator
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from dtrain.compression.belief import MIN_PEERS, enough
from dtrain.dht.partial_state import PartialState, Standing, sha256
from dtrain.dht.passed_rounds import PassedRounds
from dtrain.dht.state_donor import BUSY
from dtrain.dht.streams import Call, Refused, StreamError, ask
from dtrain.dht.watchdog import end

MAX_HELD = 4  # states that one donor may name
MAX_ROUNDS = 2**40
OFFER_TIMEOUT_S = 60.0  # the donor's trainer may have to write its state first
HEADER_TIMEOUT_S = 60.0  # how long a donor may let us wait in its queue
STALL_S = 15.0  # longest silence within a piece
LANES = 2
TAKE_OVER_S = 3.0  # a piece that another donor has had for so long is asked for here too
BUSY_PAUSE_S = 2.0
RETRY_S = 2.0  # until a donor that went away is tried again
GIVE_UP_S = 60.0  # without a single piece; the pieces that are here stay
# A state so far behind the newest, but for the rounds kept since, is still worth finishing: peers have those rounds.
RESUMABLE_ROUNDS = 48

Method = Callable[[str, str], Call]
OnProgress = Callable[[int, int], None]
OnLeft = Callable[[str, str], None]


class Malformed(Exception):
    """The donor broke the format or sent other bytes than its state has; the text is the reason."""


def _agreed(judges: Sequence[Sequence[Standing]]) -> set[Standing]:
    """The states that more than a third of them hold, and two at least."""
    holders = Counter(standing for offers in judges for standing in set(offers))
    return {standing for standing, number in holders.items() if number >= enough(len(judges))}


class StateFetch:
    """One download. `donors()` names the peers that may have state now, `active()` those of them that take part in
    rounds; `where()` is the digest where most of them say that they stand, `own` that of the state that we have.
    `on_left(peer, reason)` is told of each donor that is left for good."""

    def __init__(
        self,
        donors: Callable[[], Sequence[str]],
        method: Method,
        partial: PartialState,
        pieces: Sequence[int],
        *,
        active: Callable[[], Sequence[str]],
        passed: PassedRounds,
        least_work: float,
        own: bytes,
        where: Callable[[], bytes],
        on_progress: OnProgress,
        on_left: OnLeft,
    ):
        self._donors, self._method, self._partial, self._pieces = donors, method, partial, pieces
        self._active, self._passed, self._own, self._where = active, passed, own, where
        self._least_work, self._on_progress, self._on_left = least_work, on_progress, on_left
        self._left: set[str] = set()  # donors caught with bad data
        self._hashes: list[bytes] = []
        self._missing: dict[int, set[str]] = {}  # piece -> the donors that are asked for it now
        self._asked: dict[int, float] = {}  # piece -> when it was asked for last, time.monotonic()
        self._last_piece = time.monotonic()
        self._changed = asyncio.Event()
        self._failure: OSError | None = None

    async def run(self) -> Standing | None:
        """Download into the partial state; None when nobody can give one, or no more of it. Raises NoSpace, OSError."""
        standing = await self._choose()
        if standing is None:
            return None
        if standing != self._partial.standing:
            self._partial.begin(standing)
        team: dict[str, asyncio.Task[None]] = {}
        keeping_up = asyncio.create_task(self._passed.keep_up(standing.round))
        self._last_piece = time.monotonic()
        try:
            while not self._is_done() and time.monotonic() - self._last_piece < GIVE_UP_S:
                for donor in self._donors():
                    if donor not in self._left and (donor not in team or team[donor].done()):
                        team[donor] = asyncio.create_task(self._draw(donor, standing.digest))
                await self._until_changed(RETRY_S)
                if self._failure is not None:
                    raise self._failure
        finally:
            await end(keeping_up, *team.values())
        return standing if self._is_done() else None

    def _is_done(self) -> bool:
        return bool(self._hashes) and not self._missing

    async def _until_changed(self, patience_s: float) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), patience_s)
        except asyncio.TimeoutError:
            pass

    # ------------------------------------------------------------------ which state

    async def _choose(self) -> Standing | None:
        """The state to get: one that more than a third of the donors have, and two at least, if there is any; of these
        the one with the most work. None if that is our own."""
        begun = self._partial.standing
        judges = await self._judges(begun.digest if begun is not None else b"")
        agreed = _agreed(judges)
        if {standing.digest for standing in agreed} == {self._own}:
            # Those on our history hold what we have, and the others one each that somebody asked for once.
            judges = await self._judges(self._where())
            agreed = _agreed(judges)
        holders = Counter(standing for offers in judges for standing in set(offers))
        if not agreed and len(judges) >= MIN_PEERS:
            # While rounds pass quickly all differ; a liar is not in the middle.
            middle = statistics.median_low(max(s.work for s in offers) for offers in judges)
            agreed = {standing for standing in holders if standing.work == middle}
        others = {standing for standing in agreed or holders if standing.digest != self._own}
        if not others:
            return None
        best = min(others, key=lambda s: (-s.work, -holders[s], s.digest))
        if begun is None or begun not in holders or begun.digest == self._own:
            return best
        return begun if best.round - self._passed.reached(begun.round) <= RESUMABLE_ROUNDS else best

    async def _judges(self, wanted: bytes) -> list[list[Standing]]:
        """What each donor holds. Those that take part in no round may have an old state: they are asked what to get
        where hardly any other answers."""
        donors = list(self._donors())
        answers = await asyncio.gather(*(self._offers(donor, wanted) for donor in donors))
        active = set(self._active())
        judges = [offers for donor, offers in zip(donors, answers) if offers and donor in active]
        return judges if len(judges) >= 2 else [offers for offers in answers if offers]

    async def _offers(self, donor: str, wanted: bytes) -> list[Standing]:
        """The states that a donor holds; it begins to hold `wanted` if it stands there."""
        try:
            return await self._ask_offers(donor, wanted)
        except asyncio.CancelledError:
            raise
        except Malformed as error:
            self._leave(donor, str(error))
        except Exception as error:  # hivemind raises many types when a peer is gone
            logging.info("%s offers no state: %r", donor, error)
        return []

    async def _ask_offers(self, donor: str, wanted: bytes) -> list[Standing]:
        reply, _ = await ask(
            self._method(donor, "rpc_fetch_state"),
            {"want": "offer", "digest": wanted, "work": self._least_work},
            max_bytes=0,
            timeout_s=STALL_S,
            reply_timeout_s=OFFER_TIMEOUT_S,
        )
        states = reply.get("states")
        if not isinstance(states, list) or len(states) > MAX_HELD:
            raise Malformed("offers no list of states")
        offers = [_standing(state) for state in states]
        return [standing for standing in offers if standing.work >= self._least_work]

    # ------------------------------------------------------------------ one donor

    async def _draw(self, donor: str, digest: bytes) -> None:
        """Get pieces from one donor until none is left to get, or it goes away."""
        try:
            if digest not in [standing.digest for standing in await self._ask_offers(donor, digest)]:
                raise StreamError("does not have the state that is being downloaded")
            if not self._hashes:
                await self._get_hashes(donor, digest)
            lanes = [asyncio.create_task(self._lane(donor, digest)) for _ in range(LANES)]
            try:
                await asyncio.gather(*lanes)
            finally:
                await end(*lanes)
        except asyncio.CancelledError:
            raise
        except Malformed as error:
            self._leave(donor, str(error))
        except Exception as error:  # hivemind raises many types when a peer is gone
            logging.info("%s is gone for now: %r", donor, error)
        await asyncio.sleep(0 if self._is_done() else RETRY_S)
        self._changed.set()

    def _leave(self, donor: str, reason: str) -> None:
        if donor not in self._left:
            self._left.add(donor)
            self._on_left(donor, reason)
        self._changed.set()

    async def _get_hashes(self, donor: str, digest: bytes) -> None:
        size = 32 * len(self._pieces)
        _, blob = await ask(
            self._method(donor, "rpc_fetch_state"),
            {"want": "hashes", "digest": digest},
            max_bytes=size,
            timeout_s=STALL_S,
        )
        if len(blob) != size or sha256(blob) != digest:
            raise Malformed("its list of hashes does not have the digest that was agreed on")
        hashes = [blob[i : i + 32] for i in range(0, size, 32)]
        missing = await asyncio.to_thread(self._partial.missing, hashes)
        if not self._hashes:  # another donor's list may have come meanwhile
            self._hashes, self._missing = hashes, {index: set() for index in missing}
            self._tell_progress()

    async def _lane(self, donor: str, digest: bytes) -> None:
        """Get one piece after another."""
        while self._missing and donor not in self._left:
            index = self._next(donor)
            if index is None:
                await self._until_changed(TAKE_OVER_S / 4)
                continue
            self._missing[index].add(donor)
            self._asked[index] = time.monotonic()
            try:
                piece = await self._piece(donor, digest, index)
            except Refused as error:
                if error.reason != BUSY:
                    raise
                await asyncio.sleep(BUSY_PAUSE_S)
                continue
            finally:
                if index in self._missing:
                    self._missing[index].discard(donor)
            self._keep(index, piece)

    def _next(self, donor: str) -> int | None:
        """The first piece that nobody is asked for, else one that others have been asked for long ago."""
        for index, asked in self._missing.items():
            if not asked:
                return index
        elsewhere = [index for index, asked in self._missing.items() if donor not in asked]
        slowest = min(elsewhere, key=lambda index: self._asked[index], default=None)
        late = time.monotonic() - TAKE_OVER_S
        return slowest if slowest is not None and self._asked[slowest] < late else None

    async def _piece(self, donor: str, digest: bytes, index: int) -> bytes:
        _, piece = await ask(
            self._method(donor, "rpc_fetch_state"),
            {"want": "piece", "digest": digest, "piece": index},
            max_bytes=self._pieces[index],
            timeout_s=STALL_S,
            reply_timeout_s=HEADER_TIMEOUT_S,
        )
        if sha256(piece) != self._hashes[index]:
            raise Malformed(f"piece {index} is corrupt")
        return piece

    def _keep(self, index: int, piece: bytes) -> None:
        if index not in self._missing:
            return  # another donor was faster
        try:
            self._partial.write(index, piece)
        except OSError as error:  # of our own disk, no fault of the donor's
            self._failure = error
            raise
        del self._missing[index]
        self._last_piece = time.monotonic()
        self._tell_progress()
        self._changed.set()

    def _tell_progress(self) -> None:
        total = self._partial.total_bytes
        self._on_progress(total - sum(self._pieces[i] for i in self._missing), total)


def _standing(state: object) -> Standing:
    """A state as an offer names it, checked."""
    try:
        round, work, digest = cast(tuple[Any, Any, Any], state)
        if not (isinstance(digest, bytes) and len(digest) == 32):
            raise ValueError
        if not (0 <= operator.index(round) < MAX_ROUNDS and 0 <= work < math.inf):  # false for NaN
            raise ValueError
        return Standing(round, float(work), digest)
    except (TypeError, ValueError, OverflowError):
        raise Malformed("offers a state that cannot be") from None
