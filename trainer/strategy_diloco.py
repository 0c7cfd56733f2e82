"""DiLoCo: whole deltas and an outer step with Nesterov momentum."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from dtrain.compression.layout import Shapes
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.strategy import Strategy


class Diloco(Strategy):
    """v <- mu * v + mean; theta <- theta - alpha * (mean + mu * v) (arXiv 2311.08105).

    The paper sends fp32; `codec.dense_bits` = 16 or 8 sends less, and the rounding goes into the error feedback.
    """

    defaults = MappingProxyType(
        {
            "codec.kind": "dense",
            "codec.dense_bits": 16,
            "strategy.outer_lr": 0.7,
            "strategy.outer_momentum": 0.9,
            "strategy.feedback_decay": 1.0,
            "exchange.exact_up_to": 1,  # the sum of whole payloads is one payload, their union many
        }
    )

    def __init__(self, manifest: Manifest, shapes: Shapes) -> None:
        super().__init__(manifest, shapes)
        self._velocity = self.track("velocity")

    def step(self, theta: Sequence[Tensor], mean: Sequence[Tensor], round: int) -> None:
        """See Strategy."""
        momentum, outer_lr = self.config.outer_momentum, self.outer_lr(round)
        for outer, delta, velocity in zip(theta, mean, self._velocity, strict=True):
            velocity.mul_(momentum).add_(delta)
            delta.add_(velocity * momentum)
            outer.sub_(delta.mul_(outer_lr))
