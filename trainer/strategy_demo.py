"""DeMo: decoupled momentum. Every step, the fast-moving part of each worker's momentum travels."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from dtrain.compression.layout import Shapes
from dtrain.trainer.inner import GRADIENT, learning_rate
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.strategy import Strategy


class Demo(Strategy):
    """m <- beta * m + gradient; q = top-k of DCT(m); m <- m - q; theta <- theta - lr * sign(mean q) (arXiv 2411.19870).

    The error feedback is the momentum m, and lr the inner schedule's times `strategy.outer_lr`. The mean is over all
    workers; the sign takes the difference to a mean over a coefficient's senders away, but for its weight within a
    block.
    """

    collects = GRADIENT
    defaults = MappingProxyType(
        {
            "train.inner_steps": 1,
            "train.optimizer": "adamw",  # none: gradients are collected
            "codec.transform": "dct",
            "codec.value_bits": 8,
            "strategy.outer_lr": 0.1,  # signs want a tenth of AdamW's rate
            "strategy.feedback_decay": 0.999,
        }
    )

    def __init__(self, manifest: Manifest, shapes: Shapes) -> None:
        super().__init__(manifest, shapes)
        self.refuse_momentum()
        self.refuse_optimizer()
        self.refuse_outer_schedule()

    def step(self, theta: Sequence[Tensor], mean: Sequence[Tensor], round: int) -> None:
        """See Strategy."""
        lr = self.config.outer_lr * learning_rate(self.train, round * self.train.inner_steps)
        for outer, momentum in zip(theta, mean, strict=True):
            if outer.ndim >= 2:
                outer.mul_(1.0 - lr * self.train.weight_decay)
            outer.sub_(momentum.sign_().mul_(lr))
