"""A reducer's residual on this machine's disk: a killed process takes it up again where it stopped.

Before anybody can have a round's aggregate, what will be kept if it counts is in the file AHEAD; once the round counts,
that becomes the file KEPT. A process that was killed between the two finds both, and the round's members know which of
them is true. What is handed over to the worker's error feedback stays in the file until the worker says that a
checkpoint holds it: hand-overs are numbered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dtrain.compression import audit
from dtrain.compression.codec import Codec
from dtrain.compression.errors import CompressionError
from dtrain.compression.residual import Piece, Residual
from dtrain.dht.seals import Seal

KEPT, AHEAD = "kept.safetensors", "ahead.safetensors"
METADATA_KEY = "dtrain"

Handed = tuple[int, Piece]
"""(number of the hand-over, what was handed over)"""


@dataclass(frozen=True)
class Commitment:
    """A reducer's word on what it keeps: `leaves` are those of the sealed span (`compression/audit.py`)."""

    seal: Seal
    leaves: Sequence[bytes]


@dataclass(frozen=True)
class Unsure:
    """A reduced span of which it is not yet known whether it counts."""

    round: int
    aggregate: bytes  # its SHA-256
    residual: Residual  # what is kept if it counts
    commitment: Commitment | None  # to that


class KeptResidual:
    """One reducer's residual in `folder`; without one in memory only. Not for several threads at once."""

    def __init__(self, codec: Codec, run: bytes, folder: Path | None = None):
        """`run` is the manifest's hash: the residual of another run is not taken up."""
        self._codec, self._run, self._folder = codec, run, folder
        self._residual = Residual(codec)
        self._handed: list[Handed] = []
        self.num_handed = 0  # hand-overs so far
        self.unsure: Unsure | None = None
        self.commitment: Commitment | None = None
        """To all that is kept; None when there is nothing, or not what any sum has left over."""
        if folder is not None:
            self._take_up(folder)

    # ------------------------------------------------------------------ one round

    def draw(self, first_chunk: int, num_chunks: int, weight: float) -> Tensor:
        """See `Residual.draw`."""
        return self._residual.draw(first_chunk, num_chunks, weight)

    def reduced(
        self,
        round: int,
        span: tuple[int, int],
        weight: float,
        values: Tensor,
        aggregate: bytes,
        commitment: Commitment | None = None,
    ) -> None:
        """A span's sum left `values` over, in an aggregate that nobody has yet; `settle` or `forget` follows."""
        after = self._residual.settled(*span, weight, values)
        self.unsure = Unsure(round, hashlib.sha256(aggregate).digest(), after, commitment)
        self._write_ahead(self.unsure)

    def settle(self) -> None:
        """The aggregate counts."""
        if self.unsure is None:
            return
        self._residual, self.commitment = self.unsure.residual, self.unsure.commitment
        self.unsure = None
        if self._folder is not None:
            with suppress(OSError):  # it could not be written, which was said then
                _flush(self._folder / AHEAD)
                os.replace(self._folder / AHEAD, self._folder / KEPT)

    def forget(self) -> None:
        """The aggregate does not count: what was kept before is kept still."""
        self.unsure = None
        self._unlink(AHEAD)

    def judge(self, aggregates: Sequence[bytes] | None) -> None:
        """Decide by the aggregates of the unsure round, as its members have them.

        None = nobody knows them any more: then it counts, as nearly every round does.
        """
        if self.unsure is None:
            return
        if aggregates is None:
            logging.warning(
                "nobody can tell whether round %d counted; we assume that it did", self.unsure.round
            )
        if aggregates is None or self.unsure.aggregate in [hashlib.sha256(a).digest() for a in aggregates]:
            self.settle()
        else:
            logging.info("round %d did not count", self.unsure.round)
            self.forget()

    # ------------------------------------------------------------------ handing over

    def release(self, first_chunk: int = 0, num_chunks: int = 0) -> list[Piece]:
        """See `Residual.release`. The pieces stay on the disk until `saved`."""
        pieces = self._residual.release(first_chunk, num_chunks)
        if not self._residual.pieces or any(self._is_committed(first, count) for first, count, _ in pieces):
            self.commitment = None
        if pieces:
            self.num_handed += 1
            if self._folder is not None:
                self._handed += [(self.num_handed, piece) for piece in pieces]
            self._write(KEPT, self._residual, self._seal_note(self.commitment))
        return pieces

    def part(self) -> list[Piece]:
        """What no seal vouches for is handed over before the next sum: an audit could not tell where it is from."""
        return self.release() if self.commitment is None else []

    def _is_committed(self, first_chunk: int, num_chunks: int) -> bool:
        if self.commitment is None:
            return False
        first, count = self.commitment.seal.span
        return first < first_chunk + num_chunks and first_chunk < first + count

    def saved(self, number: int) -> None:
        """Hand-overs up to this number are in a checkpoint: they need not be kept here any more."""
        self.num_handed = max(self.num_handed, number)
        self._handed = [(num, piece) for num, piece in self._handed if num > number]

    def take_back(self, number: int) -> None:
        """Hand-overs after this number reached nobody: keep those pieces again."""
        back = [piece for num, piece in self._handed if num > number]
        if not back:
            return
        self._handed = [(num, piece) for num, piece in self._handed if num <= number]
        self._residual.add(back)
        self.commitment = None
        if self.unsure is not None:
            self.unsure.residual.add(back)
            self.unsure = replace(self.unsure, commitment=None)
            self._write_ahead(self.unsure)
        self._write(KEPT, self._residual, {})

    # ------------------------------------------------------------------ files

    def _write_ahead(self, unsure: Unsure) -> None:
        note = {"round": unsure.round, "aggregate": unsure.aggregate.hex()}
        self._write(AHEAD, unsure.residual, {**note, **self._seal_note(unsure.commitment)})

    @staticmethod
    def _seal_note(commitment: Commitment | None) -> dict[str, Any]:
        return {} if commitment is None else {"seal": commitment.seal.pack().hex()}

    def _commitment(self, residual: Residual, note: dict[str, Any]) -> Commitment | None:
        """To what a file holds, if it is just that."""
        if "seal" not in note:
            return None
        try:
            seal = Seal.unpack(bytes.fromhex(note["seal"]))
            leaves = audit.leaves(self._codec, *seal.span, residual.draw(*seal.span, 1.0))
        except (ValueError, CompressionError):
            return None
        return Commitment(seal, leaves) if audit.root(leaves) == seal.root else None

    def _write(self, name: str, residual: Residual, note: dict[str, Any]) -> None:
        if self._folder is None:
            return
        path = self._folder / name
        handed = [[number, first, count] for number, (first, count, _) in self._handed]
        kept = [[first, count] for first, count, _ in residual.pieces]
        note |= {"run": self._run.hex(), "num_handed": self.num_handed, "kept": kept, "handed": handed}
        tensors = {f"kept.{i}": values for i, (_, _, values) in enumerate(residual.pieces)}
        tensors |= {f"handed.{i}": values for i, (_, (_, _, values)) in enumerate(self._handed)}
        temporary = path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(note)})
            if name == KEPT:
                _flush(temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            logging.warning("cannot keep what this machine owes as a reducer in %s: %s", self._folder, error)
            for left in (temporary.name, KEPT, AHEAD):  # what is old is false from now on
                self._unlink(left)

    def _unlink(self, name: str) -> None:
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    def _take_up(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if (found := self._read(folder / KEPT)) is not None:
            self._residual, self._handed, note = found
            self.commitment = self._commitment(self._residual, note)
        if (found := self._read(folder / AHEAD)) is not None:
            after, _, note = found
            aggregate, commitment = bytes.fromhex(note["aggregate"]), self._commitment(after, note)
            self.unsure = Unsure(int(note["round"]), aggregate, after, commitment)
        if self.unsure is not None or self._residual.pieces or self._handed:
            logging.info("taken up: what this machine owes as a reducer")

    def _read(self, path: Path) -> tuple[Residual, list[Handed], dict[str, Any]] | None:
        """What a file holds; None, and no file any more, if it is not whole or of another run."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()[METADATA_KEY])
                if note["run"] != self._run.hex():
                    raise ValueError("it is of another run")
                kept = [
                    self._piece(first, count, file.get_tensor(f"kept.{i}"))
                    for i, (first, count) in enumerate(note["kept"])
                ]
                handed = [
                    (int(number), self._piece(first, count, file.get_tensor(f"handed.{i}")))
                    for i, (number, first, count) in enumerate(note["handed"])
                ]
                self.num_handed = max(self.num_handed, int(note["num_handed"]))
                return Residual(self._codec, kept), handed, note
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            logging.warning("%s is not taken up: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def _piece(self, first: int, count: int, values: Tensor) -> Piece:
        if not (first >= 0 and count > 0 and first + count <= self._codec.num_chunks):
            raise ValueError("it names chunks that the model does not have")
        if values.dtype != torch.float32 or values.shape != self._codec.residual(first, count).shape:
            raise ValueError("it does not fit the model")
        return first, count, values


def _flush(path: Path) -> None:
    """Have a file's bytes on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
