"""SparseLoCo: sparse deltas with error feedback and a plain outer step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtrain.compression.layout import Shapes
from dtrain.trainer.manifest import Manifest
from dtrain.trainer.strategy import Strategy


class SparseLoco(Strategy):
    """theta <- theta - alpha * mean (arXiv 2508.15706). The error feedback carries the momentum."""

    def __init__(self, manifest: Manifest, shapes: Shapes) -> None:
        super().__init__(manifest, shapes)
        self.refuse_momentum()

    def step(self, theta: Sequence[Tensor], mean: Sequence[Tensor], round: int) -> None:
        """See Strategy."""
        outer_lr = self.outer_lr(round)
        for outer, delta in zip(theta, mean, strict=True):
            outer.sub_(delta.mul_(outer_lr))
