"""What a worker sends of its contribution, and what it keeps back for the next rounds.

a = beta * e + contribution     error feedback plus what this round's inner steps made
q = what the payload holds of a     (`dtrain.compression`)
e = a - q                       kept for the next round
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.errors import RunError
from dtrain.trainer.manifest import Manifest


class Feedback(Protocol):
    """What the worker loop needs of it. Tensors are fp32 on the CPU, as the parameters are."""

    def encode(self, contribution: Sequence[Tensor], round: int) -> bytes:
        """This round's payload of `contribution`, which may be overwritten."""

    def give_back(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """Keep for later what these (first chunk, number of chunks) of a payload held: it reached nobody."""

    def absorb(self, contribution: Sequence[Tensor]) -> None:
        """Keep a whole contribution that never became a payload."""

    def take_over(self, first_chunk: int, num_chunks: int, values: Tensor) -> None:
        """Keep `values` of these chunks too [their elements in chunk order]: they are owed to theta, and now by us."""

    def age(self) -> None:
        """As a round's payload would have let it decay."""

    def forget(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """These ranges of a payload are in theta, though they are in the feedback too: they must not go twice."""

    def state_dict(self) -> dict[str, Tensor]:
        """This worker's own state, for its checkpoints."""

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; RunError if it does not fit."""


class ErrorFeedback:
    """Payloads by a codec, with error feedback that decays by `strategy.feedback_decay` each round."""

    def __init__(self, manifest: Manifest, codec: Codec) -> None:
        self._codec = codec
        self._run = manifest.run_tag
        self._decay = manifest.strategy.feedback_decay
        self._kept = codec.error_feedback()

    def encode(self, contribution: Sequence[Tensor], round: int) -> bytes:
        """See Feedback. CompressionError names the tensor if training left a value that is not finite."""
        return self._codec.encode(contribution, self._kept, decay=self._decay, run=self._run, round=round)

    def give_back(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Feedback."""
        for first_chunk, num_chunks in ranges:
            self._codec.give_back(self._kept, payload, first_chunk, num_chunks)

    def absorb(self, contribution: Sequence[Tensor]) -> None:
        """See Feedback."""
        # The feedback's layout is the codec's own: a payload that is made and given back at once adds the
        # contribution to it.
        payload = self._codec.encode(contribution, self._kept, decay=1.0, run=self._run, round=0)
        self._codec.give_back(self._kept, payload, 0, self._codec.num_chunks)

    def take_over(self, first_chunk: int, num_chunks: int, values: Tensor) -> None:
        """See Feedback."""
        self._kept[self._codec.layout.elements(first_chunk, num_chunks)] += values.to(self._kept.device)

    def age(self) -> None:
        """See Feedback."""
        self._kept *= self._decay

    def forget(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Feedback. Where the payload sent something, next to nothing else was left."""
        for first_chunk, num_chunks in ranges:
            sent = self._codec.values(self._codec.cut(payload, first_chunk, num_chunks)) != 0
            self._kept[self._codec.layout.elements(first_chunk, num_chunks)][sent.to(self._kept.device)] = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """{"feedback": [codec.feedback_numel] fp32}."""
        return {"feedback": self._kept}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See Feedback."""
        stored = tensors.get("feedback")
        if stored is None or stored.shape != self._kept.shape or stored.dtype != self._kept.dtype:
            raise RunError("the stored error feedback does not fit this run's model and codec")
        self._kept.copy_(stored)
