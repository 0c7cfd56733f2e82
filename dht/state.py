"""State for newcomers: a donor pins a snapshot and serves it in pieces; a newcomer picks one and resumes on loss.

A snapshot is one file made by the donor's trainer, the same bytes for every donor that stands at the same theta, so a
download that breaks goes on with another donor where it stopped. The newcomer checks the whole against the offered
hash; its trainer checks theta against the digest. What the swarm did meanwhile is caught up from past rounds.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import mmap
import operator
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.dht.streams import Call, Header, StreamError, ask

FRESH_S = 20.0  # a snapshot this young is offered again instead of making a new one
UNUSED_S = 120.0  # a snapshot nobody has read for this long is dropped
OFFER_TIMEOUT_S = 15.0
PIECE_TIMEOUT_S = 10.0
ROUNDS_OF_DONORS = 5  # how often the list of donors is gone through before a download fails
MAX_STATE_BYTES = 2**40
MAX_ROUNDS = 2**40


@dataclass
class Snapshot:
    """A state that the trainer has written out, mapped into memory; the file itself is already unlinked."""

    round: int
    work: float
    digest: bytes
    data: mmap.mmap | bytes
    sha256: bytes
    made: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        return len(self.data)


def map_file(path: Path) -> mmap.mmap | bytes:
    """Map a state file and unlink it: its pages live as long as somebody holds the map."""
    with path.open("rb") as file:
        size = path.stat().st_size
        data: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    path.unlink()
    return data


class StateDonor:
    """Answers `rpc_fetch_state`. `make()` asks the trainer for a snapshot file: (round, work, digest, path)."""

    def __init__(self, make: Callable[[], Awaitable[tuple[int, float, bytes, Path] | None]]):
        self._make = make
        self._snapshots: list[Snapshot] = []
        self._making = asyncio.Lock()

    async def offer(self, header: Header) -> tuple[dict[str, Any], bytes | memoryview]:
        """Reply to a newcomer: `{"want": "offer"}` or `{"want": "data", "sha256": ..., "offset": ...}`."""
        if header.get("want") == "data":
            return self._data(header)
        snapshot = await self._fresh()
        reply = {"round": snapshot.round, "work": snapshot.work, "digest": snapshot.digest}
        return {**reply, "total": snapshot.size, "sha256": snapshot.sha256}, b""

    def _data(self, header: Header) -> tuple[dict[str, Any], memoryview]:
        offset = header.get("offset")
        for snapshot in self._snapshots:
            if snapshot.sha256 == header.get("sha256"):
                if not isinstance(offset, int) or not 0 <= offset <= snapshot.size:
                    raise StreamError("no such offset")
                snapshot.used = time.monotonic()
                return {}, memoryview(snapshot.data)[offset:]
        raise StreamError("that state is no longer here")

    async def _fresh(self) -> Snapshot:
        async with self._making:
            now = time.monotonic()
            self._snapshots = [s for s in self._snapshots if now - s.used < UNUSED_S]
            if not self._snapshots or now - self._snapshots[-1].made > FRESH_S:
                made = await self._make()
                if made is None:
                    raise StreamError("no state to give yet")
                round, work, digest, path = made
                data = await asyncio.to_thread(map_file, path)
                sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
                self._snapshots.append(Snapshot(round, work, digest, data, sha256))
            return self._snapshots[-1]


@dataclass(frozen=True)
class Offer:
    """What a donor says it can give."""

    round: int
    work: float
    digest: bytes
    total: int
    sha256: bytes


async def fetch_state(
    donors: Sequence[str],
    method: Callable[[str, str], Call],
    path: Path,
    on_progress: Callable[[int, int], None],
) -> Offer | None:
    """Download the offered state with the most work behind it into `path`; None when no donor could give one."""
    answers = await asyncio.gather(*(_ask_offer(method(donor, "rpc_fetch_state")) for donor in donors))
    offers = {donor: offer for donor, offer in zip(donors, answers) if offer is not None}
    if not offers:
        return None
    best = min(offers.values(), key=lambda offer: (-offer.work, offer.digest))
    givers = [donor for donor, offer in offers.items() if offer.sha256 == best.sha256]
    with path.open("wb") as file:

        def write(_: Header, piece: bytes) -> None:
            if file.tell() + len(piece) > best.total:
                raise StreamError("sent more than it offered")
            file.write(piece)
            on_progress(file.tell(), best.total)

        for donor in givers * ROUNDS_OF_DONORS:
            want = {"want": "data", "sha256": best.sha256, "offset": file.tell()}
            try:
                await ask(
                    method(donor, "rpc_fetch_state"),
                    want,
                    max_bytes=best.total,
                    timeout_s=PIECE_TIMEOUT_S,
                    on_bytes=write,
                )
            except asyncio.CancelledError:
                raise
            except Exception:  # whatever broke, the next donor goes on where this one stopped
                await asyncio.sleep(0.2)
            if file.tell() == best.total:
                file.flush()
                if await asyncio.to_thread(_sha256_of, path) == best.sha256:
                    return best
                file.seek(0)  # some piece was corrupt: begin again with the next donor
                file.truncate()
    path.unlink()
    return None


async def _ask_offer(call: Call) -> Offer | None:
    try:
        reply, _ = await ask(call, {"want": "offer"}, max_bytes=0, timeout_s=OFFER_TIMEOUT_S)
        hashes = reply["digest"], reply["sha256"]
        fits = (
            all(isinstance(value, bytes) and len(value) == 32 for value in hashes)
            and 0 < operator.index(reply["total"]) <= MAX_STATE_BYTES
            and 0 <= operator.index(reply["round"]) < MAX_ROUNDS
            and 0 <= reply["work"] < math.inf  # false for NaN, which no order holds for
        )
        if not fits:
            return None
        return Offer(reply["round"], float(reply["work"]), hashes[0], reply["total"], hashes[1])
    except asyncio.CancelledError:
        raise
    except Exception:  # an unreachable or malformed donor is no donor
        return None


def _sha256_of(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
