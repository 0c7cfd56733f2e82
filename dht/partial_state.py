"""A state on its way: the file that verified pieces are written into, which outlives this process and its worker."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

DATA, NOTE = "incoming.state", "incoming.json"
SPARE_BYTES = 64 * 1024 * 1024  # of disk that a download leaves free


class NoSpace(Exception):
    """The disk cannot take the state; the text is for the user."""


@dataclass(frozen=True)
class Standing:
    """A state that peers stand at."""

    round: int
    work: float  # tokens in its history
    digest: bytes


class PartialState:
    """The pieces of one state that are already here.

    What is in the file counts only after its hash has been checked again, so a crash at any moment spoils nothing.
    """

    def __init__(self, folder: Path, pieces: Sequence[int]):
        """`pieces`: their lengths in bytes, as this run's model has them."""
        self.path, self._note = folder / DATA, folder / NOTE
        self._pieces = pieces
        self._starts = [0, *accumulate(pieces)]
        self.standing: Standing | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._recall()

    @property
    def total_bytes(self) -> int:
        return self._starts[-1]

    def _recall(self) -> None:
        try:
            note = json.loads(self._note.read_text())
            standing = Standing(int(note["round"]), float(note["work"]), bytes.fromhex(note["digest"]))
            if self.path.stat().st_size == self.total_bytes:
                self.standing = standing
        except (OSError, ValueError, TypeError, KeyError):
            pass  # nothing there, or not whole: begin anew

    def begin(self, standing: Standing) -> None:
        """Make room for another state than the one that is here. Raises NoSpace."""
        self.drop()
        free = shutil.disk_usage(self.path.parent).free
        if free < self.total_bytes + SPARE_BYTES:
            raise NoSpace(
                f"the run's weights need {self.total_bytes / 1e9:.2f} GB in {self.path.parent}, "
                f"where {free / 1e9:.2f} GB are free; type --folder with a folder on a larger disk"
            )
        with self.path.open("wb") as file:
            file.truncate(self.total_bytes)
        note = {"round": standing.round, "work": standing.work, "digest": standing.digest.hex()}
        temporary = self._note.with_suffix(".tmp")
        temporary.write_text(json.dumps(note))
        os.replace(temporary, self._note)
        self.standing = standing

    def drop(self) -> None:
        """Forget what is here."""
        self.standing = None
        for path in (self._note, self.path):
            with suppress(FileNotFoundError):
                path.unlink()

    def missing(self, hashes: Sequence[bytes]) -> list[int]:
        """The pieces that are not here yet; reads the whole file."""
        with self.path.open("rb") as file:
            return [i for i, length in enumerate(self._pieces) if sha256(file.read(length)) != hashes[i]]

    def write(self, index: int, piece: bytes) -> None:
        """Put a verified piece in its place. Raises OSError, as when the disk is full."""
        with self.path.open("r+b") as file:
            file.seek(self._starts[index])
            file.write(piece)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
