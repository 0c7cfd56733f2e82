"""Data-parallel training: the gradient's mean travels every step. The baseline that costs the most bytes."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from torch import Tensor

from dtrain.compression.layout import Shapes
from dtrain.trainer import exact
from dtrain.trainer.inner import GRADIENT, learning_rate
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.strategy import Strategy

EPSILON = 1e-8  # as in the inner AdamW


class Ddp(Strategy):
    """AdamW (arXiv 1711.05101) on the mean gradient, clipped: what one machine would do with everybody's batches."""

    collects = GRADIENT
    defaults = MappingProxyType(
        {
            "train.inner_steps": 1,
            "train.optimizer": "adamw",  # none: gradients are collected
            "codec.kind": "dense",
            "codec.dense_bits": 32,
            "strategy.feedback_decay": 1.0,
            "exchange.exact_up_to": 1,  # the sum of whole payloads is one payload, their union many
        }
    )

    def __init__(self, manifest: Manifest, shapes: Shapes) -> None:
        super().__init__(manifest, shapes)
        self.refuse_momentum()
        self.refuse_optimizer()
        self.refuse_outer_schedule()
        self._first, self._second = self.track("first_moment"), self.track("second_moment")

    def step(self, theta: Sequence[Tensor], mean: Sequence[Tensor], round: int) -> None:
        """See Strategy."""
        beta1, beta2 = self.train.beta1, self.train.beta2
        lr = self.config.outer_lr * learning_rate(self.train, round * self.train.inner_steps)
        step_size = lr / (1.0 - exact.power(beta1, round + 1))
        unbias = 1.0 / (1.0 - exact.power(beta2, round + 1))
        shrink = min(1.0, self.train.clip / (exact.norm(mean) + 1e-6))
        for outer, gradient, first, second in zip(theta, mean, self._first, self._second, strict=True):
            gradient.mul_(shrink)
            first.mul_(beta1).add_(gradient * (1.0 - beta1))
            second.mul_(beta2).add_(gradient.mul_(gradient).mul_(1.0 - beta2))
            if outer.ndim >= 2:
                outer.mul_(1.0 - lr * self.train.weight_decay)
            outer.sub_((first * step_size).div_((second * unbias).sqrt_().add_(EPSILON)))
