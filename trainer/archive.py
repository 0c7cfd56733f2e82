"""Keeps a run's newest state on disk without training, so that the run outlives its workers; what is downloaded when.

For machines with little memory: nothing here imports torch, and a state is never in memory whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dtrain.trainer.disk import flush
from dtrain.trainer.exchange import ARCHIVING, Given, PeerView, Provider, Watch, can_give, is_archive, work_of

NOTE = "state.json"
SHARE = 0.1  # of the time that may go into downloads
RETRY_S = 5.0  # after a download that did not come about
LEAVING = ("finished", "leaving")  # who says so will not have the state for us later


@dataclass(frozen=True)
class Kept:
    """A state on the disk: what `exchange.Given` says of one, but for the hashes, and its file's name."""

    round: int
    work: float
    digest: str  # hex
    file: str


class Fetched(Protocol):
    """A downloaded state; see `dht.archive.FetchedState`."""

    @property
    def round(self) -> int: ...

    @property
    def work(self) -> float: ...

    @property
    def digest(self) -> bytes: ...

    @property
    def path(self) -> Path: ...


class Source(Protocol):
    """Where states come from and newcomers are heard; see `dht.archive.Archive`."""

    def swarm(self) -> Sequence[PeerView]: ...

    def fetch(self, watch: Watch, *, above: float, wanted: float) -> Fetched | None: ...

    def serve_state(self, provider: Provider) -> None: ...

    def announce(self, status: Mapping[str, object]) -> None: ...


class StateFile:
    """The newest state of one run in a folder: one file of bytes, and a note of what it is."""

    def __init__(self, folder: Path, pieces: Sequence[int]):
        """`pieces`: lengths in bytes of what the state is hashed in, as this run's model has them."""
        self._folder, self._pieces = folder, pieces
        self._lock = threading.Lock()  # newcomers are answered from another thread
        folder.mkdir(parents=True, exist_ok=True)
        self.kept = self._recall()
        self._sweep()

    @property
    def size_bytes(self) -> int:
        return sum(self._pieces)

    def _recall(self) -> Kept | None:
        try:
            kept = Kept(**json.loads((self._folder / NOTE).read_text()))
            whole = (self._folder / kept.file).stat().st_size == self.size_bytes
            return kept if whole and kept.file == f"{kept.digest[:16]}.state" else None
        except (OSError, ValueError, TypeError):
            return None  # none yet, or spoiled: the workers have it

    def put(self, fetched: Fetched) -> None:
        """Take over a file; what was here goes once the new one counts. OSError if the disk refuses."""
        digest = fetched.digest.hex()
        kept = Kept(fetched.round, fetched.work, digest, f"{digest[:16]}.state")
        with self._lock:
            os.replace(fetched.path, self._folder / kept.file)
            flush(self._folder / kept.file)  # the note must not outlive a power cut that its file does not
            draft = self._folder / f"{NOTE}.tmp"
            draft.write_text(json.dumps(asdict(kept)) + "\n")
            flush(draft)
            os.replace(draft, self._folder / NOTE)
            self.kept = kept
            self._sweep()

    def _sweep(self) -> None:
        for path in self._folder.glob("*.state"):
            if self.kept is None or path.name != self.kept.file:
                path.unlink(missing_ok=True)

    def give(self, write: Callable[[memoryview], object]) -> Given:
        """Write the state out, piece by piece. OSError if there is none, or its bytes are not what they were."""
        with self._lock:
            if self.kept is None:
                raise OSError("no state is kept here yet")
            try:
                return self._checked(self.kept, write)
            except OSError:
                self.kept = None  # to be fetched anew
                raise

    def _checked(self, kept: Kept, write: Callable[[memoryview], object]) -> Given:
        hashes = []
        with (self._folder / kept.file).open("rb") as file:
            for length in self._pieces:
                piece = file.read(length)
                hashes.append(hashlib.sha256(piece).digest())
                write(memoryview(piece))
        if hashlib.sha256(b"".join(hashes)).hexdigest() != kept.digest:
            raise OSError(f"{kept.file} is not what it was when it was written")
        return Given(kept.round, kept.work, bytes.fromhex(kept.digest), hashes)


class Archivist:
    """Decides when the state is fetched anew: at first, then after `every_s` at least, when a worker that has more is
    about to go, and never so often that downloads take more than a tenth of the time."""

    def __init__(
        self,
        source: Source,
        file: StateFile,
        watch: Watch,
        say: Callable[[str], None],
        *,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._source, self._file, self._watch, self._say = source, file, watch, say
        self._every_s, self._clock = every_s, clock
        self._not_before = 0.0  # by the clock
        self._said: Kept | None = None
        source.serve_state(file.give)
        self._announce()

    def look(self) -> bool:
        """Fetch the state if it is time; whether there is a new one."""
        self._announce()  # the disk may have spoiled what was here
        have = self._file.kept.work if self._file.kept is not None else 0.0
        ahead = [view for view in self._source.swarm() if can_give(view) and work_of(view) > have]
        leaving = any(view.status["state"] in LEAVING for view in ahead if not is_archive(view))
        if not ahead or (self._clock() < self._not_before and not leaving):
            return False
        began = self._clock()
        fetched = self._source.fetch(self._watch, above=have, wanted=max(map(work_of, ahead)))
        now = self._clock()
        if fetched is None:
            self._not_before = now + RETRY_S
            return False
        self._not_before = now + max(self._every_s, (now - began) / SHARE)
        try:
            self._file.put(fetched)
        except OSError as error:
            self._say(f"Cannot keep the run's state: {error.strerror}.")
            return False
        self._announce()
        self._say(
            f"The run's state after round {fetched.round} is here ({self._file.size_bytes / 1e6:.1f} MB)."
        )
        return True

    def _announce(self) -> None:
        """Say what we have, if that is not what we said last; who never had anything says nothing."""
        kept = self._file.kept
        if kept == self._said:
            return
        self._said, stands = kept, kept or Kept(0, 0.0, "", "")
        state = "joining" if kept is None else ARCHIVING
        fields = {"round": stands.round, "digest": stands.digest, "work": stands.work}
        self._source.announce({"state": state, **fields})
