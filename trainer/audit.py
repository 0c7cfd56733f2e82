"""An auditor for law 2, "nothing is lost": keeps its own books of what a worker produced, sent and kept.

What an error feedback should hold follows from its inputs alone: every contribution that went in, less what was
delivered of every payload. The auditor computes that beside it and compares, round by round (`--audit`). It costs one
more encoding per round and memory for two more feedbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.feedback import Feedback

_RUN = bytes(8)


class AuditedFeedback:
    """An error feedback, and the books beside it.

    `report(error, scale)` gets, after every settled payload, the largest difference between what is kept and what
    should be, and the largest value kept.
    """

    def __init__(
        self, feedback: Feedback, codec: Codec, decay: float, report: Callable[[float, float], None]
    ):
        self._feedback, self._codec, self._decay, self._report = feedback, codec, decay, report
        self._expected = codec.error_feedback()

    def _add(self, delta: Sequence[Tensor], decay: float) -> None:
        payload = self._codec.encode(delta, self._expected, decay=decay, run=_RUN, round=0)
        self._codec.give_back(self._expected, payload, 0, self._codec.num_chunks)

    def encode(self, contribution: Sequence[Tensor], round: int) -> bytes:
        """See Feedback."""
        self._add(contribution, self._decay)
        return self._feedback.encode(contribution, round)

    def give_back(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Feedback. Called once for every payload, when it is known what of it was delivered."""
        sent = self._codec.error_feedback()
        self._codec.give_back(sent, payload, 0, self._codec.num_chunks)
        returned = self._codec.error_feedback()
        for first_chunk, num_chunks in ranges:
            self._codec.give_back(returned, payload, first_chunk, num_chunks)
        self._expected -= sent - returned
        self._feedback.give_back(payload, ranges)
        kept = self._feedback.state_dict()["feedback"]
        error = float((kept - self._expected).abs().max())
        self._report(error, float(kept.abs().max()))
        self._expected.copy_(kept)  # rounding must not pile up over many rounds

    def absorb(self, contribution: Sequence[Tensor]) -> None:
        """See Feedback."""
        self._add(contribution, 1.0)
        self._feedback.absorb(contribution)

    def take_over(self, first_chunk: int, num_chunks: int, values: Tensor) -> None:
        """See Feedback."""
        self._expected[self._codec.layout.elements(first_chunk, num_chunks)] += values
        self._feedback.take_over(first_chunk, num_chunks, values)

    def age(self) -> None:
        """See Feedback."""
        self._feedback.age()
        self._expected.copy_(self._feedback.state_dict()["feedback"])

    def forget(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Feedback."""
        self._feedback.forget(payload, ranges)
        self._expected.copy_(self._feedback.state_dict()["feedback"])

    def state_dict(self) -> dict[str, Tensor]:
        """See Feedback."""
        return self._feedback.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See Feedback."""
        self._feedback.load_state_dict(tensors)
        self._expected.copy_(torch.as_tensor(self._feedback.state_dict()["feedback"]))
