"""What the worker loop holds between its stages: a round's training, and the payload that is under way."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from dtrain.trainer.exchange import Outcome


@dataclass(frozen=True)
class Training:
    """What one round's inner steps gave."""

    round: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Delivery:
    """A payload that is under way, and where the local weights stood when it left."""

    payload: bytes
    training: Training
    base: Tensor  # [num_params] on the model's device
    outcome: Future[Outcome]
