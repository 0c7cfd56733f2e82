"""An auditor for law 2, "nothing is lost": keeps its own books of what a worker produced, sent and kept.

What a strategy's error feedback should hold follows from its inputs alone: every delta that went in, less what was
delivered of every payload. The auditor computes that beside it and compares, round by round (`--audit`). It costs one
more encoding per round and memory for two more feedbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dtrain.compression.codec import Codec
from dtrain.trainer.strategies import Strategy

_RUN = bytes(8)


class AuditedStrategy:
    """A strategy with error feedback, and the books beside it.

    `report(error, scale)` gets, after every settled payload, the largest difference between what is kept and what
    should be, and the largest value kept.
    """

    def __init__(
        self, strategy: Strategy, codec: Codec, decay: float, report: Callable[[float, float], None]
    ):
        self._strategy, self._codec, self._decay, self._report = strategy, codec, decay, report
        self._expected = codec.error_feedback()

    def _add(self, delta: Sequence[Tensor], decay: float) -> None:
        payload = self._codec.encode(delta, self._expected, decay=decay, run=_RUN, round=0)
        self._codec.give_back(self._expected, payload, 0, self._codec.num_chunks)

    def encode(self, theta: Sequence[Tensor], local: Sequence[Tensor], round: int) -> bytes:
        """See Strategy."""
        self._add([outer - inner for outer, inner in zip(theta, local)], self._decay)
        return self._strategy.encode(theta, local, round)

    def give_back(self, payload: bytes, ranges: Sequence[tuple[int, int]]) -> None:
        """See Strategy. Called once for every payload, when it is known what of it was delivered."""
        sent = self._codec.error_feedback()
        self._codec.give_back(sent, payload, 0, self._codec.num_chunks)
        returned = self._codec.error_feedback()
        for first_chunk, num_chunks in ranges:
            self._codec.give_back(returned, payload, first_chunk, num_chunks)
        self._expected -= sent - returned
        self._strategy.give_back(payload, ranges)
        kept = self._strategy.state_dict()["feedback"]
        error = float((kept - self._expected).abs().max())
        self._report(error, float(kept.abs().max()))
        self._expected.copy_(kept)  # rounding must not pile up over many rounds

    def absorb(self, delta: Sequence[Tensor]) -> None:
        """See Strategy."""
        self._add(delta, 1.0)
        self._strategy.absorb(delta)

    def apply(self, theta: Sequence[Tensor], aggregates: Sequence[bytes]) -> None:
        """See Strategy."""
        self._strategy.apply(theta, aggregates)

    def state_dict(self) -> dict[str, Tensor]:
        """See Strategy."""
        return self._strategy.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See Strategy."""
        self._strategy.load_state_dict(tensors)
        self._expected.copy_(torch.as_tensor(self._strategy.state_dict()["feedback"]))

    def shared_state(self) -> dict[str, Tensor]:
        """See Strategy."""
        return self._strategy.shared_state()

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See Strategy."""
        self._strategy.load_shared_state(tensors)
