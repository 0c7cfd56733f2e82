"""What all strategies have in common: what they collect from the inner steps, and the state that all workers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.compression.layout import Shapes
from dtrain.trainer import exact
from dtrain.trainer.config import require
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.inner import DELTA
from dtrain.trainer.manifest import Manifest


class Strategy(ABC):
    """A strategy says what the workers' inner steps give, and how the mean of it moves theta.

    Between the two it is averaged by the exchange, as `manifest.codec` has it (`feedback.py`). What a step needs beside
    theta and the mean must be shared: `track` it.
    """

    collects: ClassVar[str] = DELTA
    """What the inner steps give: DELTA or GRADIENT, see `inner.py`."""
    defaults: ClassVar[Mapping[str, object]] = MappingProxyType({})
    """Dotted manifest keys that this strategy wants otherwise than the preset has them."""

    def __init__(self, manifest: Manifest, shapes: Shapes) -> None:
        self.config = manifest.strategy
        self.train = manifest.train
        self._sizes = [math.prod(shape) for _, shape in shapes]
        self._shapes = [shape for _, shape in shapes]
        self._shared: dict[str, Tensor] = {}

    @abstractmethod
    def step(self, theta: Sequence[Tensor], mean: Sequence[Tensor], round: int) -> None:
        """Move theta, in place, by the weighted mean of what the workers collected in `round`.

        Both hold fp32 tensors on the CPU, one per parameter; `mean` is 0 where nothing arrived and may be overwritten.
        Equal arguments must give equal bits on every machine: elementwise operations, one at a time (one fused
        operation rounds once instead of twice, on some machines only), and `exact.py` for scalars.
        """

    def outer_lr(self, round: int) -> float:
        """Step size of this round's outer step (alpha); see StrategyConfig.min_outer_lr_ratio."""
        progress = round * self.train.inner_steps / self.train.total_steps
        return self.config.outer_lr * exact.cosine_decay(progress, self.config.min_outer_lr_ratio)

    def track(self, name: str) -> list[Tensor]:
        """A tensor per parameter, at first 0, that all workers hold alike: newcomers get it beside theta."""
        self._shared[name] = torch.zeros(sum(self._sizes))
        pieces = torch.split(self._shared[name], self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def shared_state(self) -> dict[str, Tensor]:
        """What a newcomer needs beside theta to take the same outer steps as everybody else, flat fp32."""
        return self._shared

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a donor's `shared_state`; RunError if it does not fit, and nothing has changed then."""
        for name, mine in self._shared.items():
            theirs = tensors.get(name)
            if theirs is None or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise RunError(f"the shared state lacks {name!r} of this run's strategy")
        for name, mine in self._shared.items():
            mine.copy_(tensors[name])

    def refuse_momentum(self) -> None:
        """For strategies whose step has no outer momentum."""
        rule = f"be 0 for strategy.name = {self.config.name}"
        require(self.config.outer_momentum == 0, "strategy.outer_momentum", rule, self.config.outer_momentum)

    def refuse_optimizer(self) -> None:
        """For strategies that collect gradients: no inner optimizer sees them."""
        if self.train.optimizer != "adamw":
            raise UsageError(
                f"strategy.name = {self.config.name} has no inner optimizer: leave out "
                f"train.optimizer = {self.train.optimizer}"
            )

    def refuse_outer_schedule(self) -> None:
        """For strategies whose outer rate is the inner schedule's."""
        rule, ratio = f"be 1 for strategy.name = {self.config.name}", self.config.min_outer_lr_ratio
        require(ratio == 1, "strategy.min_outer_lr_ratio", rule, ratio)
