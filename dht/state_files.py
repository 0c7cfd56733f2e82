"""The worker's half of state transfers: files that it exchanges with its network process."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtrain.dht import ipc
from dtrain.dht.partial_state import NOTE
from dtrain.dht.state_donor import map_file


class Given(Protocol):
    """See `dtrain.trainer.exchange.Given`."""

    @property
    def round(self) -> int: ...

    @property
    def work(self) -> float: ...

    @property
    def digest(self) -> bytes: ...

    @property
    def hashes(self) -> Sequence[bytes]: ...


class Watch(Protocol):
    """See `dtrain.trainer.exchange.Watch`."""

    def progress(self, have: int, total: int) -> None: ...

    def left(self, donor: str, reason: str) -> None: ...

    def trouble(self, reason: str) -> None: ...


Provider = Callable[[Callable[[memoryview], object]], Given]


@dataclass(frozen=True)
class State:
    """See `dtrain.trainer.exchange.State`."""

    round: int
    work: float
    digest: bytes
    blob: bytes | memoryview | mmap.mmap


class StateFiles:
    """Snapshots for newcomers go out through `folder`, downloads come in through it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.provider: Provider | None = None
        self.watch: Watch | None = None
        self._number = itertools.count()

    def sweep(self) -> None:
        """Remove what a killed worker left; a download that is under way stays, as it goes on."""
        for path in self.folder.glob("outgoing-*"):
            path.unlink(missing_ok=True)

    def write(self) -> dict[str, Any] | None:
        """Write our state for newcomers; what the network process needs to know of it, None if we have none."""
        if self.provider is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"outgoing-{next(self._number)}"
        try:
            with path.open("wb") as file:
                given = self.provider(file.write)
        except BaseException:  # e.g. a full disk: half a state is of no use
            path.unlink(missing_ok=True)
            raise
        fields = {"round": given.round, "work": given.work, "digest": given.digest}
        return {**fields, "hashes": b"".join(given.hashes), "path": str(path)}

    def hear(self, message: ipc.Message) -> None:
        """An event of a download."""
        if self.watch is None:
            return
        if message["event"] == "progress":
            self.watch.progress(message["have"], message["total"])
        elif message["event"] == "left":
            self.watch.left(message["donor"], message["reason"])

    def read(self, answer: dict[str, Any]) -> State:
        """The state that the network process has downloaded; its file goes when it is let go of."""
        state = State(answer["round"], answer["work"], answer["digest"], map_file(Path(answer["path"])))
        with suppress(FileNotFoundError):
            (self.folder / NOTE).unlink()
        return state
