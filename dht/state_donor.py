"""The donor's side of a state transfer: snapshots of our state, given to newcomers piece by piece.

A state is a sequence of pieces. Its digest is the SHA-256 of its pieces' SHA-256 hashes, one after another, and is what
heartbeats carry: donors that stand at the same digest give the same pieces, and each piece can be checked alone.

A snapshot is one file that the trainer writes on demand, mapped into memory and already unlinked. All newcomers share
it, and it stays the same while the run moves on; at most two are kept.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue

from dtrain.dht.streams import Header, StreamError, answer
from dtrain.dht.upload import Busy, Lease, UploadBudget

KEPT_SNAPSHOTS = 2
FRESH_ROUNDS = 8  # a snapshot so few rounds old is shared with further newcomers, who replay what came since
UNUSED_S = 300.0  # a snapshot nobody has read for this long is dropped
IN_USE_S = 30.0  # one read so lately makes no room for another
BUSY = "busy"  # a refusal that means: come back later

Reply = tuple[dict[str, Any], "bytes | memoryview"]


@dataclass(frozen=True)
class Written:
    """A state that the trainer has written to a file."""

    round: int
    work: float
    digest: bytes
    hashes: bytes  # 32 for each piece
    path: Path


@dataclass
class Snapshot:
    """A state as newcomers get it."""

    round: int
    work: float
    digest: bytes
    hashes: bytes
    data: mmap.mmap | bytes
    used: float = field(default_factory=time.monotonic)


class StateDonor:
    """Answers `rpc_fetch_state`.

    `pieces` are the lengths of the state's pieces in bytes; `make()` has the trainer write the state as it is now, None
    if it has none; `standing()` gives our own round and digest.
    """

    def __init__(
        self,
        pieces: Sequence[int],
        make: Callable[[], Awaitable[Written | None]],
        standing: Callable[[], tuple[int, bytes]],
        upload: UploadBudget,
    ):
        self._pieces, self._make, self._standing, self.upload = pieces, make, standing, upload
        self._ends = list(accumulate(pieces))
        self._snapshots: list[Snapshot] = []  # oldest first
        self._making = asyncio.Lock()

    async def serve(
        self, requests: AsyncIterator[BytesValue], read_header: Callable[[], Awaitable[Header]]
    ) -> AsyncIterator[BytesValue]:
        """Answer one request of a newcomer, which `read_header` reads:

        {"want": "offer", "digest": D, "work": W}     {"states": [[round, work, digest], ...]}, that of D too if we can,
                                                      and one with at least as much work as the newcomer has itself
        {"want": "hashes", "digest": D}           blob: the hash of every piece
        {"want": "piece", "digest": D, "piece": i}     blob: that piece
        """
        lease: Lease | None = None

        async def handle() -> Reply:
            nonlocal lease
            header = await read_header()
            if header.get("want") == "offer":
                return await self._offer(header.get("digest"), header.get("work"))
            snapshot = self._find(header.get("digest"))
            if header.get("want") == "hashes":
                return {}, snapshot.hashes
            piece = self._piece(snapshot, header.get("piece"))
            lease = await self._admit(len(piece))
            return {}, piece

        try:
            async for message in answer(requests, handle):
                yield message
            if lease is not None:
                lease.close(delivered=True)
        finally:
            if lease is not None:
                lease.close()

    async def _offer(self, wanted: object, least_work: object) -> Reply:
        async with self._making:
            now, (round, digest) = time.monotonic(), self._standing()
            self._snapshots = [s for s in self._snapshots if now - s.used < UNUSED_S]
            held = {snapshot.digest for snapshot in self._snapshots}
            is_fresh = bool(self._snapshots) and round - self._snapshots[-1].round <= FRESH_ROUNDS
            if isinstance(least_work, (int, float)) and is_fresh:
                is_fresh = self._snapshots[-1].work >= least_work
            if (
                digest not in held
                and (wanted == digest or not (is_fresh or wanted in held))
                and self._has_room()
            ):
                await self._add_snapshot()
        if not self._snapshots:
            raise StreamError("no state to give yet")
        return {"states": [[s.round, s.work, s.digest] for s in self._snapshots]}, b""

    async def _add_snapshot(self) -> None:
        written = await self._make()
        if written is None:
            return
        data = await asyncio.to_thread(map_file, written.path)
        if len(data) != self._ends[-1] or len(written.hashes) != 32 * len(self._pieces):
            raise StreamError("no state to give")
        snapshot = Snapshot(written.round, written.work, written.digest, written.hashes, data)
        self._snapshots = [s for s in self._snapshots if s.digest != snapshot.digest]
        if len(self._snapshots) == KEPT_SNAPSHOTS:
            self._snapshots.remove(min(self._snapshots, key=lambda s: s.used))
        self._snapshots.append(snapshot)

    def _has_room(self) -> bool:
        longest_unread_s = time.monotonic() - min((s.used for s in self._snapshots), default=0.0)
        return len(self._snapshots) < KEPT_SNAPSHOTS or longest_unread_s > IN_USE_S

    def _find(self, digest: object) -> Snapshot:
        for snapshot in self._snapshots:
            if snapshot.digest == digest:
                snapshot.used = time.monotonic()
                return snapshot
        raise StreamError("that state is not here")

    def _piece(self, snapshot: Snapshot, index: object) -> memoryview:
        if not isinstance(index, int) or not 0 <= index < len(self._pieces):
            raise StreamError("no such piece")
        end = self._ends[index]
        return memoryview(snapshot.data)[end - self._pieces[index] : end]

    async def _admit(self, num_bytes: int) -> Lease:
        try:
            return await self.upload.admit(num_bytes)
        except Busy:
            raise StreamError(BUSY) from None


def map_file(path: Path) -> mmap.mmap | bytes:
    """Map a file and unlink it: its pages live as long as somebody holds the map. Writing to it changes no file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        data: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    path.unlink()
    return data
