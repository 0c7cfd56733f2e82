"""What this worker's payloads have delivered since its newest checkpoint, kept on its disk.

A checkpoint holds the error feedback as it was then. A worker that is killed and goes on from there would send again
what its payloads have delivered since. So each payload is here before it leaves, and once its round is over also what
of it came back; a new checkpoint makes them superfluous. They are small: a percent or two of the model each.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

Ranges = Sequence[tuple[int, int]]
"""(first chunk, number of chunks)."""


@dataclass(frozen=True)
class Sent:
    """A payload of one round. `returned`: what of it reached nobody; None = the worker was killed before it knew."""

    round: int
    payload: bytes
    returned: Ranges | None


class SentLog:
    """The payloads of the rounds since the newest checkpoint, a file each. A disk that refuses costs only the log."""

    def __init__(self, folder: Path):
        self._folder = folder

    def made(self, payload: bytes, round: int) -> None:
        """Before it leaves."""
        with _grudgingly():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._returned(round).unlink(missing_ok=True)
            _write(self._payload(round), payload)

    def settled(self, round: int, returned: Ranges) -> None:
        """Its round is over."""
        with _grudgingly():
            _write(self._returned(round), json.dumps([list(part) for part in returned]).encode())

    def trim(self, first: int, end: float = math.inf) -> None:
        """Keep rounds `first` to `end` - 1 only: of those before a checkpoint knows, those after became of no theta."""
        for round in self._rounds():
            if not first <= round < end:
                with _grudgingly():
                    self._payload(round).unlink(missing_ok=True)
                    self._returned(round).unlink(missing_ok=True)

    def since(self, round: int) -> list[Sent]:
        """The payloads of that round and later ones, oldest first."""
        found = []
        for number in self._rounds():
            if number < round:
                continue
            with suppress(OSError):
                found.append(Sent(number, self._payload(number).read_bytes(), self._settled_as(number)))
        return found

    def _settled_as(self, round: int) -> Ranges | None:
        try:
            return [
                (int(first), int(count)) for first, count in json.loads(self._returned(round).read_text())
            ]
        except (OSError, ValueError, TypeError):
            return None

    def _rounds(self) -> list[int]:
        names = [path.stem for path in self._folder.glob("*.payload")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _payload(self, round: int) -> Path:
        return self._folder / f"{round:08d}.payload"

    def _returned(self, round: int) -> Path:
        return self._folder / f"{round:08d}.returned"


def delivered(num_chunks: int, returned: Ranges) -> list[tuple[int, int]]:
    """The ranges of a payload's chunks that are not in `returned`."""
    edges = [0]
    for first, count in sorted(returned):
        edges += [first, max(edges[-1], first + count)]
    edges.append(num_chunks)
    return [(a, b - a) for a, b in zip(edges[::2], edges[1::2]) if a < b]


def common(a: Ranges, b: Ranges) -> list[tuple[int, int]]:
    """The ranges of chunks that are in both."""
    spans = [(max(i, j), min(i + m, j + n)) for i, m in a for j, n in b]
    return sorted((start, end - start) for start, end in spans if start < end)


def _write(path: Path, blob: bytes) -> None:
    """Whole or not at all, for a process that is killed; a power cut may lose the newest."""
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_bytes(blob)
    os.replace(draft, path)


@contextmanager
def _grudgingly() -> Iterator[None]:
    """A full disk does not end the training: after a crash something would be sent twice, that is all."""
    try:
        yield
    except OSError as error:
        logging.info("what was sent is not kept: %s", error)
