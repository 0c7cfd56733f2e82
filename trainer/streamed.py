"""Data that is read as it is needed: pieces of files become documents, tokens, sequences, batches.

Documents of a piece are laid one after another, each with an end token behind it, and cut into sequences of fixed
length; every token is a target once. A round begins with pieces of its own (`assignment.py`), so going on after a
restart costs no reading of what came before.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.trainer.assignment import Deal, draw, lane_of, philox
from dtrain.trainer.config_data import PartConfig
from dtrain.trainer.documents import documents
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.prefetch import RoundsAhead
from dtrain.trainer.sources import PARQUET, Piece, SourceFile, cut
from dtrain.trainer.text import one_line
from dtrain.trainer.tokenizer import ByteTokenizer, Tokenizer

BYTES_PER_TOKEN = 4.0  # of English web text, by a tokenizer of 50k tokens
PARQUET_SHRINKS = 0.6  # a file's bytes for a byte of text
SPARE = 1.25  # of what a round needs: pieces differ in what they hold
LEAST_PIECES = 20
DOCUMENTS_AT_ONCE = 64
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
EVAL_PIECES = 8

Batch = tuple[Tensor, Tensor]
Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Part:
    """One source, ready to be dealt out."""

    config: PartConfig
    train: Sequence[Piece]
    held: Sequence[Piece]
    """Kept for evaluation."""
    deal: Deal


class StreamedCorpus:
    """The sequences of a run whose data is streamed."""

    is_common = True

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        files: Sequence[Sequence[SourceFile]],
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """`files` of each of the manifest's parts. `say` gets a line for the user when something is wrong."""
        self.tokenizer, self.lanes = tokenizer, manifest.data.lanes
        self.parts = [
            _part(manifest, index, found, isinstance(tokenizer, ByteTokenizer))
            for index, found in enumerate(files)
        ]
        weights = np.array([part.config.weight for part in self.parts])
        self._edges = np.cumsum(weights / weights.sum())
        self._say, self._stop = say, stop
        self._said: set[str] = set()
        self._gone: dict[str, float] = {}  # URL of a file that is gone: when to look again
        self._ahead: RoundsAhead[Batch] = RoundsAhead(stop)
        self._eval: npt.NDArray[np.int64] | None = None

    # ------------------------------------------------------------------ training

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
    ) -> Iterator[Batch]:
        """See `data.Corpus`; made ahead in a thread. The order within the data depends on the manifest's seed and run
        id, `lane` on the peer id if it is not given."""
        lane = lane_of(peer_id, self.lanes) if lane is None else lane

        def make(number: int) -> Callable[[], Iterator[Batch]]:
            return lambda: self._batches(number, lane, batch_size, seq_len)

        if not ahead:
            return self._batches(round, lane, batch_size, seq_len)
        key = (lane, batch_size, seq_len)
        return self._ahead.round((round, *key), make(round), (round + 1, *key), make(round + 1))

    def _batches(self, round: int, lane: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        streams = [self.sequences(part, round, lane, seq_len) for part in self.parts]
        chosen = philox(f"mix\n{self.parts[0].deal.label}\n{round}\n{lane}")
        while True:
            draws = chosen.random_raw(batch_size) / 2.0**64
            places = np.minimum(np.searchsorted(self._edges, draws, side="right"), len(streams) - 1)
            windows = [next(streams[place], None) for place in places]
            if any(window is None for window in windows):
                return  # told to stop
            yield _batch(np.stack(windows))  # type: ignore[arg-type]

    def sequences(self, part: Part, round: int, lane: int, seq_len: int) -> Iterator[npt.NDArray[np.int64]]:
        """Endless [seq_len + 1] of a lane's pieces of a round."""
        pieces = (part.train[unit] for _, unit in part.deal.units(round, lane))
        return self._packed(pieces, part, seq_len)

    def assigned(self, part: Part, round: int, lane: int) -> list[tuple[int, int]]:
        """(epoch, index in `part.train`) of each piece that a lane trains on in a round."""
        return list(itertools.islice(part.deal.units(round, lane), part.deal.per_round))

    def _packed(self, pieces: Iterator[Piece], part: Part, seq_len: int) -> Iterator[npt.NDArray[np.int64]]:
        left: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        num_barren = 0  # pieces since the last text: a long document leaves none to those after it
        for piece in pieces:
            if self._stop.is_set():
                return
            num_barren += piece.file.url not in self._gone
            if num_barren > 4 * len(part.train) + 64:
                raise RunError(
                    f"the data {part.config.name} has no text in its column {part.config.column!r}"
                )
            for tokens in self._tokens(piece, part):
                num_barren = 0
                left = np.concatenate((left, tokens))
                count = max(0, len(left) - 1) // seq_len
                for index in range(count):
                    yield left[index * seq_len : (index + 1) * seq_len + 1]
                left = left[count * seq_len :]

    def _tokens(self, piece: Piece, part: Part) -> Iterator[npt.NDArray[np.int64]]:
        """A piece's tokens, some documents at a time."""
        texts = self._patiently(piece, part)
        while some := list(itertools.islice(texts, DOCUMENTS_AT_ONCE)):
            ends = np.array([self.tokenizer.end], np.int64)
            yield np.concatenate(
                [a for tokens in self.tokenizer.encode(some) for a in (tokens.astype(np.int64), ends)]
            )

    # ------------------------------------------------------------------ sources that fail

    def _patiently(self, piece: Piece, part: Part) -> Iterator[str]:
        """The documents of a piece, however often its source drops the connection meanwhile."""
        given, pause_s, name = 0, FIRST_RETRY_S, piece.file.url
        if time.monotonic() < self._gone.get(name, 0.0):
            self._stop.wait(0.01)  # all may be gone
            return
        while not self._stop.is_set():
            try:
                for text in itertools.islice(documents(piece, part.config.column, self._notice), given, None):
                    if pause_s > FIRST_RETRY_S:
                        self._say(f"The data source {name} answers again.")
                        pause_s = FIRST_RETRY_S
                    yield text
                    given += 1
                return
            except FileNotFoundError:
                self._notice(f"{name} is gone: training goes on without it")
                self._gone[name] = time.monotonic() + LAST_RETRY_S
                return
            except UsageError:
                raise
            except Exception as error:  # every protocol has its own
                self._say(
                    f"The data source {name} does not answer ({one_line(error)}); again in {pause_s:.0f} s."
                )
                self._stop.wait(pause_s)
                pause_s = min(LAST_RETRY_S, 2 * pause_s)

    def _notice(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(f"Data: {line}.")

    # ------------------------------------------------------------------ evaluation

    def eval_batches(self, *, batch_size: int, seq_len: int, max_tokens: int) -> Iterator[Batch]:
        """The fixed evaluation sequences, of pieces that nobody trains on; read once."""
        if self._eval is None:
            self._eval = self._read_eval(seq_len, max(1, max_tokens // seq_len))
        for first in range(0, len(self._eval), batch_size):
            yield _batch(self._eval[first : first + batch_size])

    def _read_eval(self, seq_len: int, count: int) -> npt.NDArray[np.int64]:
        found: list[npt.NDArray[np.int64]] = []
        for part in self.parts:
            share = max(1, round(count * part.config.weight / sum(p.config.weight for p in self.parts)))
            step = max(1, len(part.held) // EVAL_PIECES)
            mine: list[npt.NDArray[np.int64]] = []
            for piece in (p for first in range(step) for p in part.held[first::step]):
                if len(mine) >= share:
                    break
                most = min(share - len(mine), math.ceil(share / EVAL_PIECES))
                mine += itertools.islice(self._packed(iter([piece]), part, seq_len), most)
            found += mine
        if not found:
            raise UsageError(
                f"the data is too short: no part kept for evaluation holds a sequence of {seq_len} + 1 tokens; "
                "give more text or a smaller train.seq_len"
            )
        return np.stack(found[:count])

    def prompt(self, round: int, num_tokens: int) -> list[int]:
        """The beginning of an evaluation sequence, another one for every round."""
        if self._eval is None:
            return [self.tokenizer.end]
        return [int(token) for token in self._eval[round * 7919 % len(self._eval)][:num_tokens]]

    def close(self) -> None:
        """Read no more."""
        self._ahead.close()


def _part(manifest: Manifest, index: int, files: Sequence[SourceFile], of_bytes: bool) -> Part:
    data, train = manifest.data, manifest.train
    config = data.parts[index]
    share = config.weight / sum(part.weight for part in data.parts)
    per_token = (1.0 if of_bytes else BYTES_PER_TOKEN) * (
        PARQUET_SHRINKS if files[0].format == PARQUET else 1.0
    )
    total = sum(file.num_bytes for file in files)
    needed = SPARE * manifest.round_tokens_each * per_token * share
    size = max(min(needed, total / data.lanes, total / LEAST_PIECES), 4 * train.seq_len * per_token)
    pieces = cut(files, int(size))
    held = [p for i, p in enumerate(pieces) if draw(f"held\n{config.name}\n{i}") < data.eval_fraction * 2**64]
    if not held and len(pieces) > 1:
        held = pieces[-1:]
    kept = set(held)
    rest = [piece for piece in pieces if piece not in kept]
    if not held or not rest:
        raise UsageError(
            f"the data {config.name} is a single piece, of which nothing can be kept for evaluation: "
            "give more text, or files that are not compressed"
        )
    deal = Deal(
        label=f"{train.seed}\n{manifest.run_id}\n{index}",
        num_units=len(rest),
        lanes=data.lanes,
        per_round=max(1, math.ceil(needed / size)),
    )
    return Part(config, rest, held, deal)


def _batch(windows: npt.NDArray[np.int64]) -> Batch:
    """x and y [B, seq_len] of windows [B, seq_len + 1]."""
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
