"""The outer loop's half of a worker: theta, its digest, the outer step, and what others may take over from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.checkpoint import Checkpoint, pack
from dtrain.trainer.errors import RunError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.outer import OuterState
from dtrain.trainer.strategy import Strategy


@dataclass(frozen=True)
class SharedState:
    """What newcomers get from us; see `exchange.State`."""

    round: int
    work: float
    digest: bytes
    blob: bytes


class OuterLoop:
    """Theta of one worker. It changes by outer steps and by taking over a donor's state, in no other way."""

    def __init__(self, manifest: Manifest, local: FlatParameters, codec: Codec, strategy: Strategy):
        self._manifest_hash = manifest.hash
        self.codec, self.strategy = codec, strategy
        self.state = OuterState(local.flat.detach().cpu().clone())
        self.theta: list[Tensor] = local.views(self.state.theta_flat)
        self.digest = self.state.digest(strategy.shared_state())
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

    def replace(self, state: Checkpoint) -> None:
        """Take over a donor's or a checkpoint's theta. RunError if it is of another run."""
        theta = state.tensors["theta"]
        if theta.shape != self.state.theta_flat.shape or state.manifest_hash != self._manifest_hash:
            raise RunError("these are the weights of another run")
        with self._lock:
            self.strategy.load_shared_state(part(state.tensors, "shared"))
            self.state.theta_flat.copy_(theta)
            self._stands_at(state.round, state.tokens)

    def _stands_at(self, round: int, tokens: int) -> None:
        self.state.round, self.state.tokens = round, tokens
        self.digest = self.state.digest(self.strategy.shared_state())

    def shared_state(self) -> SharedState:
        """What a newcomer needs to stand where we stand; the same bytes from everybody who stands there."""
        with self._lock:
            blob = pack(self.checkpoint(self.shared_tensors()))
            return SharedState(self.round, float(self.tokens), self.digest, blob)

    def checkpoint(self, tensors: dict[str, Tensor], own_tokens: int | None = None) -> Checkpoint:
        """A checkpoint of theta with these tensors beside it."""
        extra = {} if own_tokens is None else {"own_tokens": own_tokens}
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
