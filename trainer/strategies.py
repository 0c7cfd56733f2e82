"""Strategies: how the workers' deltas become one outer step.

A strategy says what travels and what is done with it:

a = beta * e + (theta - local)      error feedback plus this round's delta
q = what the payload holds of a     top-k, quantized (`dtrain.compression`)
e = a - q                           kept for the next round
theta = theta - alpha * mean(q)     the weighted mean over the group's workers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.manifest import Manifest


class Strategy(Protocol):
    """What the worker loop needs of a strategy. Tensors are fp32 on the CPU, as the parameters are."""

    def encode(self, theta: Sequence[Tensor], local: Sequence[Tensor], round: int) -> bytes:
        """This round's payload: theta is the outer state of `round`, local what training made of it."""

    def apply(self, theta: Sequence[Tensor], aggregates: Sequence[bytes]) -> None:
        """Take the outer step, in place. Equal aggregates give bit-equal thetas on every machine."""

    def give_back(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """Keep for later what these (first chunk, number of chunks) of a payload held: it reached nobody."""

    def absorb(self, delta: Sequence[Tensor]) -> None:
        """Keep a whole delta that never became a payload."""

    def state_dict(self) -> dict[str, Tensor]:
        """This worker's own state, for its checkpoints."""

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; RunError if it does not fit."""

    def shared_state(self) -> dict[str, Tensor]:
        """What a newcomer needs beside theta to take the same outer steps as everybody else."""

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a donor's `shared_state`."""


class SparseLoco:
    """Top-k deltas with error feedback and a plain outer step (arXiv 2508.15706)."""

    def __init__(self, manifest: Manifest, codec: Codec) -> None:
        self._codec = codec
        self._run = manifest.run_tag
        self._outer_lr = manifest.strategy.outer_lr
        self._decay = manifest.strategy.feedback_decay
        self._feedback = codec.error_feedback()

    def encode(self, theta: Sequence[Tensor], local: Sequence[Tensor], round: int) -> bytes:
        """See Strategy. CompressionError names the tensor if training left a value that is not finite."""
        delta = [outer - inner for outer, inner in zip(theta, local, strict=True)]
        return self._codec.encode(delta, self._feedback, decay=self._decay, run=self._run, round=round)

    def apply(self, theta: Sequence[Tensor], aggregates: Sequence[bytes]) -> None:
        """See Strategy."""
        for outer, mean in zip(theta, self._codec.decode(aggregates), strict=True):
            # Product and difference apart: one fused operation rounds once instead of twice, on some machines
            # only.
            outer.sub_(mean.mul_(self._outer_lr))

    def give_back(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Strategy."""
        for first_chunk, num_chunks in ranges:
            self._codec.give_back(self._feedback, payload, first_chunk, num_chunks)

    def absorb(self, delta: Sequence[Tensor]) -> None:
        """See Strategy."""
        # The feedback's layout is the codec's own: a payload that is made and given back at once adds the
        # delta to it.
        payload = self._codec.encode(delta, self._feedback, decay=1.0, run=self._run, round=0)
        self._codec.give_back(self._feedback, payload, 0, self._codec.num_chunks)

    def state_dict(self) -> dict[str, Tensor]:
        """{"feedback": [codec.feedback_numel] fp32}."""
        return {"feedback": self._feedback}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See Strategy."""
        feedback = tensors.get("feedback")
        if (
            feedback is None
            or feedback.shape != self._feedback.shape
            or feedback.dtype != self._feedback.dtype
        ):
            raise RunError("the stored error feedback does not fit this run's model and codec")
        self._feedback.copy_(feedback)

    def shared_state(self) -> dict[str, Tensor]:
        """Nothing: a round needs theta alone."""
        return {}

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""


STRATEGIES: dict[str, Callable[[Manifest, Codec], Strategy]] = {"sparseloco": SparseLoco}
"""Strategies by the name that `strategy.name` gives."""


def make_strategy(manifest: Manifest, codec: Codec) -> Strategy:
    """The strategy that the manifest names; UsageError lists the choices."""
    name = manifest.strategy.name
    if name not in STRATEGIES:
        raise UsageError(f"there is no strategy.name {name!r}: choose one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name](manifest, codec)
