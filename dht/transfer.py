"""State transfer in the network process: gives our worker's state to newcomers, and gets the swarm's for our worker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from dtrain.dht.heartbeats import Heartbeats
from dtrain.dht.ipc import Message
from dtrain.dht.partial_state import PartialState
from dtrain.dht.passed_rounds import PassedRounds
from dtrain.dht.state_donor import StateDonor, Written
from dtrain.dht.state_fetch import Method, StateFetch
from dtrain.dht.upload import UploadBudget
from dtrain.dht.worker_line import WorkerLine

TELL_PERIOD_S = 0.2  # between two words about a download's progress
BYTES_PER_MEGABIT = 125_000


class StateTransfer:
    """`pieces`: lengths in bytes of the state's pieces. `folder`: where a download is kept until it is whole.

    `ask_worker("state")` has the worker write its state to a file; `tell_worker` takes events for it.
    """

    def __init__(
        self,
        pieces: Sequence[int],
        folder: Path,
        newcomer_mbps: float,
        *,
        heartbeats: Heartbeats,
        ask_worker: Callable[[str], Awaitable[Any]],
        tell_worker: Callable[[Message], None],
    ):
        self._pieces, self._folder, self._heartbeats = pieces, folder, heartbeats
        self._ask_worker, self._tell_worker = ask_worker, tell_worker
        self._told = 0.0
        self.donor = StateDonor(
            pieces, self._write, self._standing, UploadBudget(newcomer_mbps * BYTES_PER_MEGABIT)
        )

    @classmethod
    def of(cls, args: dict[str, Any], heartbeats: Heartbeats, worker: WorkerLine) -> StateTransfer:
        """As a worker asks for it when it opens a run."""
        return cls(
            args["pieces"],
            Path(args["transfer_folder"]),
            args["newcomer_mbps"],
            heartbeats=heartbeats,
            ask_worker=worker.ask,
            tell_worker=worker.send,
        )

    async def fetch(
        self, method: Method, passed: PassedRounds, least_work: float = 0.0
    ) -> dict[str, Any] | None:
        """Download the swarm's state into a file, whose path is in the reply; None when nobody can give it now.

        Only a state with at least as much work (tokens) as ours, and as `least_work`, is taken. Raises NoSpace, or
        OSError when the disk fails.
        """
        partial = PartialState(self._folder, self._pieces)
        fetch = StateFetch(
            lambda: [record.peer_id for record in self._heartbeats.donors()],
            method,
            partial,
            self._pieces,
            active=lambda: [record.peer_id for record in self._heartbeats.donors() if record.is_active],
            passed=passed,
            least_work=max(least_work, float(self._heartbeats.status.get("work", 0.0))),
            own=self._standing()[1],
            where=self._where_most_stand,
            on_progress=self._tell_progress,
            on_left=lambda donor, reason: self._tell_worker(
                {"event": "left", "donor": donor, "reason": reason}
            ),
        )
        standing = await fetch.run()
        if standing is None:
            return None
        return {
            "round": standing.round,
            "work": standing.work,
            "digest": standing.digest,
            "path": str(partial.path),
        }

    def _where_most_stand(self) -> bytes:
        """Of those whose history is the run's rather than ours."""
        digests = Counter(str(record.status["digest"]) for record in self._heartbeats.ahead())
        try:
            return bytes.fromhex(max(digests, key=lambda digest: digests[digest], default=""))
        except ValueError:  # anybody may say anything
            return b""

    def _tell_progress(self, have: int, total: int) -> None:
        if have == total or time.monotonic() - self._told > TELL_PERIOD_S:
            self._told = time.monotonic()
            self._tell_worker({"event": "progress", "have": have, "total": total})

    async def _write(self) -> Written | None:
        written = await self._ask_worker("state")
        return None if written is None else Written(**{**written, "path": Path(written["path"])})

    def _standing(self) -> tuple[int, bytes]:
        """Our own round and digest, as our heartbeat says them."""
        status = self._heartbeats.status
        return int(status["round"]), bytes.fromhex(str(status["digest"]))
