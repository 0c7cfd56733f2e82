"""The outer loop's half of a worker: theta, its digest, the outer step, and what others may take over from it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.checkpoint import Checkpoint
from dtrain.trainer.errors import CheckpointError, RunError
from dtrain.trainer.exchange import Given, State
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.outer import (
    OuterState,
    combine,
    digest_of,
    in_order,
    piece_hashes,
    piece_lengths,
    raw_bytes,
)
from dtrain.trainer.strategy import Strategy

VAIN_TRIES = 3


class OuterLoop:
    """Theta of one worker. It changes by outer steps and by taking over a donor's state, in no other way."""

    def __init__(self, manifest: Manifest, local: FlatParameters, codec: Codec, strategy: Strategy):
        self._manifest_hash = manifest.hash
        self.codec, self.strategy = codec, strategy
        self.state = OuterState(local.flat.detach().cpu().clone())
        self.theta: list[Tensor] = local.views(self.state.theta_flat)
        self._hashes, self.digest = self._hashed()
        self.origin = b""  # digest of the newest state that was taken over from others
        self._vain = 0  # see was_refused
        self._lock = threading.Lock()  # theta and its round change together: donors read from another thread

    @property
    def round(self) -> int:
        """Outer steps behind theta; also the number of the round that the next one ends."""
        return self.state.round

    @property
    def tokens(self) -> int:
        """Tokens in theta's history, its "work"."""
        return self.state.tokens

    def step(self, aggregates: Sequence[bytes]) -> int:
        """Theta of this round becomes theta of the next; returns the tokens that went into it."""
        with self._lock:
            self.strategy.step(self.theta, self.codec.decode(aggregates), self.round)
            weights = [sum(w for _, w in self.codec.contributors(a)) for a in aggregates]
            tokens = int(max(weights, default=0.0))
            self._stands_at(self.round + 1, self.tokens + tokens)
        return tokens

    def was_refused(self, *, caught_up: bool) -> None:
        """The swarm stands on another theta. When that happens again and again and nobody is ahead of us whom we could
        catch up with, then ours is a history of its own, or its tokens were a liar's: they count no more, and the next
        try takes over what the others have.
        """
        self._vain = 0 if caught_up else self._vain + 1
        if self._vain >= VAIN_TRIES:
            with self._lock:
                self.state.tokens, self._vain = 0, 0

    def replace(self, state: Checkpoint) -> None:
        """Take over a checkpoint's theta. RunError if it is of another run."""
        theta = state.tensors["theta"]
        if theta.shape != self.state.theta_flat.shape or state.manifest_hash != self._manifest_hash:
            raise RunError("these are the weights of another run")
        with self._lock:
            self.strategy.load_shared_state(part(state.tensors, "shared"))
            self.state.theta_flat.copy_(theta)
            self._stands_at(state.round, state.tokens)

    def _stands_at(self, round: int, tokens: int) -> None:
        self.state.round, self.state.tokens, self._vain = round, tokens, 0
        self._hashes, self.digest = self._hashed()

    def _hashed(self) -> tuple[list[bytes], bytes]:
        hashes = [piece for tensor in self._in_order() for piece in piece_hashes(tensor)]
        return hashes, combine(hashes)

    def _in_order(self) -> list[Tensor]:
        return in_order(self.state.theta_flat, self.strategy.shared_state())

    # ------------------------------------------------------------------ from donor to newcomer

    @property
    def pieces(self) -> list[int]:
        """Lengths in bytes of the pieces that the state is hashed and given in."""
        return [length for tensor in self._in_order() for length in piece_lengths(tensor)]

    def give(self, write: Callable[[memoryview], object]) -> Given:
        """Write out what a newcomer needs to stand where we stand: the same bytes from everybody who stands there."""
        with self._lock:
            for tensor in self._in_order():
                write(raw_bytes(tensor))
            return Given(self.round, float(self.tokens), self.digest, self._hashes)

    def take_over(self, state: State) -> None:
        """Stand where a donor stands. CheckpointError if the bytes are not those of the state's digest, or not finite:
        a digest is the donor's word only."""
        own, given, start = self._in_order(), [], 0
        if memoryview(state.blob).nbytes != sum(self.pieces):
            raise CheckpointError("a state of another size")
        for tensor in own:
            values = np.frombuffer(state.blob, "<f4", tensor.numel(), start).astype(np.float32, copy=False)
            with np.errstate(invalid="ignore"):
                total = values.sum(dtype=np.float64)  # which no finite fp32 values can overflow
            if not math.isfinite(total):
                raise CheckpointError("a state with values that are not finite")
            given.append(torch.from_numpy(values).view_as(tensor))
            start += values.nbytes
        names = sorted(self.strategy.shared_state())
        shared = dict(zip(names, given[1:], strict=True))
        if digest_of(given[0], shared) != state.digest:
            raise CheckpointError("a state that does not match its digest")
        with self._lock:
            self.strategy.load_shared_state(shared)
            self.state.theta_flat.copy_(given[0])
            self._stands_at(state.round, int(state.work))
            self.origin = state.digest

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, tensors: dict[str, Tensor], extra: dict[str, Any]) -> Checkpoint:
        """A checkpoint of theta with these tensors and values beside it."""
        return Checkpoint(self.round, self.tokens, self.digest, self._manifest_hash, tensors, extra)

    def shared_tensors(self) -> dict[str, Tensor]:
        """Theta and what the strategy's outer step needs beside it."""
        return {"theta": self.state.theta_flat, **named("shared", self.strategy.shared_state())}


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under "prefix.name"."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The other way round."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}
