"""Training text as tokens. A worker's stream is a function of run, round and peer id: its work can be repeated.

Here is text that is held as a whole; `streamed.py` has data that is read as it is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.trainer.assignment import Deal, lane_of, philox
from dtrain.trainer.config_data import BYTES, DataConfig
from dtrain.trainer.errors import UsageError
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer

Tokens = npt.NDArray[np.integer[Any]]

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}
)
END_OF_DOCUMENT = b"\x00"
"""Stands between two source files; no Python source holds it."""
PIECE_CHARS = 1 << 20


class Data(Protocol):
    """What the worker loop needs of its data."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def lanes(self) -> int:
        """Disjoint parts of each epoch, see `DataConfig.lanes`."""

    @property
    def is_common(self) -> bool:
        """Whether all workers of the run have this text, so that one can do again what another has done."""

    def batches(
        self,
        *,
        seed: int,
        run_id: str,
        round: int,
        peer_id: str,
        batch_size: int,
        seq_len: int,
        lane: int | None = None,
        ahead: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of one worker's round: x and y [batch_size, seq_len] int64, y one token ahead of x.

        Equal arguments give equal batches, on every machine. `lane` is the peer's own if it is not given. Without
        `ahead` nothing is read before it is asked for, and this worker's own batches are not disturbed.
        """

    def eval_batches(
        self, *, batch_size: int, seq_len: int, max_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The fixed evaluation windows: x and y [at most batch_size, seq_len] int64."""

    def prompt(self, round: int, num_tokens: int) -> list[int]:
        """A piece of evaluation text, another one for every round; at most so many tokens."""

    def close(self) -> None:
        """Read no more."""


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and tokens kept for evaluation."""

    train: Tokens
    """[num_tokens] of the training text."""
    eval: Tokens
    """[num_tokens] of the evaluation text; no document is in both."""
    lanes: int = 0
    """See `DataConfig.lanes`."""
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    windows_per_round: int = 1 << 10
    """What a round deals to each lane."""
    is_common: bool = True
    """See Data."""

    def batches(
        self,
        *,
        seed: int,
        run_id: str,
        round: int,
        peer_id: str,
        batch_size: int,
        seq_len: int,
        lane: int | None = None,
        ahead: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See Data. With lanes, windows follow one another without overlap; without, they begin at random places."""
        starts = self._num_starts(self.train, seq_len)
        if self.lanes:
            lane = lane_of(peer_id, self.lanes) if lane is None else lane
            yield from self._dealt(f"{seed}\n{run_id}", round, lane, batch_size, seq_len)
        source = philox(f"{seed}\n{run_id}\n{round}\n{peer_id}")
        while True:
            places = source.random_raw(batch_size) % np.uint64(starts)
            yield self._windows(self.train, places.astype(np.int64), seq_len)

    def _dealt(
        self, label: str, round: int, lane: int, batch_size: int, seq_len: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of whole windows."""
        units = self._deal(label, seq_len).units(round, lane)
        while True:
            places = [unit for _, unit in itertools.islice(units, batch_size)]
            yield self._windows(self.train, np.array(places, np.int64) * seq_len, seq_len)

    def assigned(self, seed: int, run_id: str, round: int, lane: int, seq_len: int) -> list[tuple[int, int]]:
        """(epoch, index) of each window that a lane trains on in a round; window i begins at token i * seq_len."""
        units = self._deal(f"{seed}\n{run_id}", seq_len).units(round, lane)
        return list(itertools.islice(units, self.windows_per_round))

    def _deal(self, label: str, seq_len: int) -> Deal:
        return Deal(label, (len(self.train) - 1) // seq_len, self.lanes, self.windows_per_round)

    def eval_batches(
        self, *, batch_size: int, seq_len: int, max_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See Data; evenly spread."""
        starts = self._num_starts(self.eval, seq_len)
        count = max(1, min(max_tokens, len(self.eval)) // seq_len)
        places = np.arange(count, dtype=np.int64) * (starts - 1) // max(1, count - 1)
        for first in range(0, count, batch_size):
            yield self._windows(self.eval, places[first : first + batch_size], seq_len)

    def prompt(self, round: int, num_tokens: int) -> list[int]:
        """See Data."""
        num_tokens = min(num_tokens, len(self.eval))
        start = round * 7919 % max(1, len(self.eval) - num_tokens)
        return [int(token) for token in self.eval[start : start + num_tokens]]

    def close(self) -> None:
        """Nothing is read."""

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


def open_data(
    manifest: Manifest,
    path: Path | None = None,
    tokenizer_path: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> Data:
    """What a manifest's workers train on; the paths are this machine's copies, where the data or tokenizer is local.

    UsageError if it cannot be had, is another one, or does not fit the model.
    """
    data = manifest.data
    tokenizer = open_tokenizer(data, tokenizer_path)
    if tokenizer.size > manifest.model.vocab_size:
        raise UsageError(
            f"the tokenizer {data.tokenizer} has {tokenizer.size} tokens, the model only {manifest.model.vocab_size}: "
            f"set model.vocab_size to {-(-tokenizer.size // 64) * 64}"
        )
    if not data.is_streamed:
        per_round = manifest.round_tokens_each // manifest.train.seq_len
        return replace(open_corpus(data, path, tokenizer), windows_per_round=max(1, per_round))
    from dtrain.trainer.documents import check_column
    from dtrain.trainer.sources import find
    from dtrain.trainer.streamed import StreamedCorpus

    files = [find(part, path) for part in data.parts]
    for part, found in zip(data.parts, files, strict=True):
        check_column(found[0], part.column)
    return StreamedCorpus(manifest, tokenizer, files, say, stop or threading.Event())


def open_corpus(config: DataConfig, path: Path | None = None, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus that a manifest's data section means; `path` is this machine's copy of its file, if it has one.

    UsageError for a missing, unreadable, empty or wrong file.
    """
    if config.is_streamed:
        raise UsageError(f"data.source = {config.source} is streamed, and of no use here: use a text file")
    if tokenizer is None:
        tokenizer = open_tokenizer(config)
    if config.source == "stdlib":
        if path is not None:
            raise UsageError(
                f"this run trains on the Python standard library's text: leave out --data {path}"
            )
        return _stdlib_corpus(config, tokenizer)
    if path is None:
        raise UsageError(f"this run trains on the file {config.name}: type --data PATH with your copy of it")
    if file_sha256(path) != config.sha256:
        raise UsageError(
            f"{path} (--data) is not this run's {config.name}, whose SHA-256 begins {config.sha256[:16]}: "
            "get the same file as the others, or begin a new run with another --run-id"
        )
    tokens: Tokens
    if config.tokenizer == BYTES:
        tokens = np.memmap(path, dtype=np.uint8, mode="r")
    else:
        tokens = np.concatenate(tokenizer.encode(_pieces(path.read_text("utf-8", "replace"))))
    cut = len(tokens) - max(1, int(len(tokens) * config.eval_fraction))
    return Corpus(tokens[:cut], tokens[cut:], config.lanes, tokenizer)


def _pieces(text: str) -> list[str]:
    """A text cut at line ends into pieces that can be tokenized one by one."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


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


def _stdlib_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    folder = stdlib_folder()
    train: list[bytes] = []
    held_out: list[bytes] = []
    for relative in python_sources(folder):
        # By name, not by order: a file is held out by all workers or by none, whatever their Python's version.
        draw = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") / 2.0**64
        chosen = held_out if draw < config.eval_fraction else train
        chosen.append((folder / relative).read_bytes() + END_OF_DOCUMENT)
    if not train or not held_out:
        raise UsageError(
            f"this Python has no library sources below {folder}: type --data PATH with any text file"
        )
    tokens, held = (_as_tokens(part, config, tokenizer) for part in (train, held_out))
    return Corpus(tokens, held, config.lanes, tokenizer, is_common=False)  # every Python has another library


def python_sources(folder: Path) -> list[str]:
    """Paths of the sources relative to `folder`, with "/", sorted."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [
            (Path(parent) / name).relative_to(folder).as_posix() for name in files if name.endswith(".py")
        ]
    return sorted(found)


def _as_tokens(documents: list[bytes], config: DataConfig, tokenizer: Tokenizer) -> Tokens:
    if config.tokenizer == BYTES:
        return np.frombuffer(b"".join(documents), dtype=np.uint8)
    texts = [document.removesuffix(END_OF_DOCUMENT).decode("utf-8", "replace") for document in documents]
    end = np.array([tokenizer.end], np.int32)
    return np.concatenate([array for tokens in tokenizer.encode(texts) for array in (tokens, end)])
