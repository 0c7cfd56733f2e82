"""Training text as tokens. A worker's stream is a function of run, round and peer id: its work can be
repeated.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.trainer.config import DataConfig
from dtrain.trainer.errors import UsageError

Tokens = npt.NDArray[np.uint8]

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
)
END_OF_DOCUMENT = b"\x00"
"""Stands between two source files; no Python source holds it."""


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and tokens kept for evaluation."""

    train: Tokens
    """[num_tokens] of the training text."""
    eval: Tokens
    """[num_tokens] of the evaluation text; no document is in both."""

    def batches(
        self, *, seed: int, run_id: str, round: int, peer_id: str, batch_size: int, seq_len: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of one worker's round: x and y [batch_size, seq_len] int64, y one token ahead of x.

        Windows begin at random places. Equal arguments give equal batches, on every machine and numpy.
        """
        starts = self._num_starts(self.train, seq_len)
        label = f"{seed}\n{run_id}\n{round}\n{peer_id}".encode()
        key = np.frombuffer(hashlib.sha256(label).digest()[:16], dtype="<u8").astype(np.uint64)
        # Philox's raw output is fixed by its paper; numpy promises no such thing for Generator.integers.
        source = np.random.Philox(key=key)
        while True:
            places = source.random_raw(batch_size) % np.uint64(starts)
            yield self._windows(self.train, places.astype(np.int64), seq_len)

    def eval_batches(
        self, *, batch_size: int, seq_len: int, max_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The fixed evaluation windows, evenly spread: x and y [at most batch_size, seq_len] int64."""
        starts = self._num_starts(self.eval, seq_len)
        count = max(1, min(max_tokens, len(self.eval)) // seq_len)
        places = np.arange(count, dtype=np.int64) * (starts - 1) // max(1, count - 1)
        for first in range(0, count, batch_size):
            yield self._windows(self.eval, places[first : first + batch_size], seq_len)

    @staticmethod
    def _num_starts(tokens: Tokens, seq_len: int) -> int:
        starts = len(tokens) - seq_len
        if starts < 1:
            raise UsageError(
                f"the text (--data) is too short: a part of {len(tokens)} tokens cannot hold a sequence "
                f"of {seq_len} + 1; give a longer file or a smaller train.seq_len"
            )
        return starts

    @staticmethod
    def _windows(tokens: Tokens, places: npt.NDArray[np.int64], seq_len: int) -> tuple[Tensor, Tensor]:
        window = tokens[places[:, None] + np.arange(seq_len + 1)].astype(np.int64)  # [B, seq_len + 1]
        both = torch.from_numpy(window)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def open_corpus(config: DataConfig, path: Path | None = None) -> Corpus:
    """The corpus that a manifest's data section means; `path` is this machine's copy of its file, if it has
    one.

    UsageError for a missing, unreadable, empty or wrong file.
    """
    if config.source == "stdlib":
        if path is not None:
            raise UsageError(
                f"this run trains on the Python standard library's text: leave out --data {path}"
            )
        return _stdlib_corpus(config.eval_fraction)
    if path is None:
        raise UsageError(f"this run trains on the file {config.name}: type --data PATH with your copy of it")
    if file_sha256(path) != config.sha256:
        raise UsageError(
            f"{path} (--data) is not this run's {config.name}, whose SHA-256 begins {config.sha256[:16]}: "
            "get the same file as the others, or begin a new run with another --run-id"
        )
    tokens = np.memmap(path, dtype=np.uint8, mode="r")
    cut = len(tokens) - max(1, int(len(tokens) * config.eval_fraction))
    return Corpus(train=tokens[:cut], eval=tokens[cut:])


def file_sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of a text file. UsageError if it can't be read or holds nothing."""
    sha, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                sha.update(piece)
                size += len(piece)
    except OSError as error:
        raise UsageError(f"cannot read the text (--data) {path}: {error.strerror}") from None
    if size == 0:
        raise UsageError(f"the text (--data) {path} is empty: give a file with text in it")
    return sha.hexdigest()


def stdlib_folder() -> Path:
    """Where this Python keeps its standard library's sources."""
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_corpus(eval_fraction: float) -> Corpus:
    folder = stdlib_folder()
    train: list[bytes] = []
    held_out: list[bytes] = []
    for relative in _python_sources(folder):
        # By name, not by order: a file is held out by all workers or by none, whatever their Python's
        # version.
        draw = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") / 2.0**64
        chosen = held_out if draw < eval_fraction else train
        chosen.append((folder / relative).read_bytes() + END_OF_DOCUMENT)
    if not train or not held_out:
        raise UsageError(
            f"this Python has no library sources below {folder}: type --data PATH with any text file"
        )
    return Corpus(train=_as_tokens(train), eval=_as_tokens(held_out))


def _python_sources(folder: Path) -> list[str]:
    """Paths of the sources relative to `folder`, with "/", sorted."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix() for name in files if name.endswith(".py")
        ]
    return sorted(found)


def _as_tokens(documents: list[bytes]) -> Tokens:
    return np.frombuffer(b"".join(documents), dtype=np.uint8)
