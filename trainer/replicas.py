"""Several GPUs of one machine as one worker: each computes the gradient of its share of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.trainer.compute import Compute
from dtrain.trainer.errors import UsageError


class Replicas(Compute):
    """`Compute` over copies of the model on other devices, whose weights follow the model's step by step."""

    def __init__(self, model: nn.Module, others: Sequence[torch.device], **choices: Any) -> None:
        """`others` beside the model's own device; `choices` as for Compute, the same for all.

        UsageError for a model that cannot be copied.
        """
        super().__init__(model, **choices)
        try:
            copies = [copy.deepcopy(model).to(device) for device in others]
        except (RuntimeError, ValueError, TypeError) as error:
            raise UsageError(
                f"this model cannot be copied to {others[0]} ({error}): name one --device"
            ) from None
        self._others = [Compute(other, **choices) for other in copies]
        for other in self._others:
            other.scaler = self.scaler  # all losses are scaled alike
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(copies)), thread_name_prefix="replica")

    def backward(self, x: Tensor, y: Tensor, restart: Callable[[], None]) -> Tensor:
        """See Compute. The parameters must have no gradient yet."""
        parts = [
            (a, b)
            for a, b in zip(x.tensor_split(1 + len(self._others)), y.tensor_split(1 + len(self._others)))
        ]
        parts = [(a, b) for a, b in parts if len(a)]
        futures = [self._pool.submit(self._follow, *pair) for pair in zip(self._others, parts[1:])]
        try:
            mine = super().backward(*parts[0], restart)
        finally:
            losses = [future.result() for future in futures]  # nobody may still be at it when this returns
        shares = [len(part[0]) / len(x) for part in parts]
        self._gather(shares)
        return sum(
            (loss.to(mine.device) * share for loss, share in zip(losses, shares[1:])), mine * shares[0]
        )

    def _follow(self, other: Compute, part: tuple[Tensor, Tensor]) -> Tensor:
        """A copy's gradient of its part, by the weights of now."""
        with torch.no_grad():
            for theirs, ours in zip(_trained(other.model), _trained(self.model)):
                theirs.copy_(ours)
        other.model.zero_grad()
        return other.backward(*part, other.model.zero_grad)

    def _gather(self, shares: Sequence[float]) -> None:
        """The weighted sum of all gradients becomes the model's."""
        copies = [_trained(other.model) for other in self._others[: len(shares) - 1]]
        for index, ours in enumerate(_trained(self.model)):
            if ours.grad is None:
                continue
            ours.grad.mul_(shares[0])
            for share, theirs in zip(shares[1:], copies):
                gradient = theirs[index].grad
                if gradient is not None:
                    ours.grad.add_(gradient.to(ours.device), alpha=share)

    def describe(self) -> str:
        """See Compute."""
        return f"{super().describe()}, on {1 + len(self._others)} devices"


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_compute(model: nn.Module, others: Sequence[torch.device], **choices: Any) -> Compute:
    """For a model on its device, and copies on the others if there are any."""
    return Replicas(model, others, **choices) if others else Compute(model, **choices)
