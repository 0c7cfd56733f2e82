"""Inner training: the learning-rate schedule, one inner step, and what the steps of a round contribute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtrain.trainer import exact
from dtrain.trainer.compute import Compute, autocast, trim_heap
from dtrain.trainer.config import TrainConfig
from dtrain.trainer.config_data import DataConfig
from dtrain.trainer.data import Data
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.flat import FlatParameters
from dtrain.trainer.optimizers import make_optimizers

DELTA = "delta"  # theta - local: the inner steps move the local weights
GRADIENT = "gradient"  # the mean gradient at theta: the inner steps leave the weights alone

LARGE = 10_000_000  # parameters, from which on memory is worth some milliseconds a round
EVAL_TOKENS = 4096  # per pass: the logits of more would take more memory than training does
TABLES = ("qmap1", "qmap2", "absmax1", "absmax2")
"""Parts of bitsandbytes' state whose shape is not the parameter's."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of inner step `step`, counted from the run's beginning: linear warm-up, then a cosine
    down to `min_lr_ratio` at `total_steps`, constant after it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(1, config.total_steps - config.warmup_steps)
    progress = (step - config.warmup_steps) / length
    return config.lr * exact.cosine_decay(progress, config.min_lr_ratio)  # some outer steps use this rate too


class Inner(Protocol):
    """What the worker loop needs of its inner training."""

    def step(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Train on x, y [B, T] int64 as the run's inner step `index`; returns the loss before it (0-dim).

        The loss stays on the device: read it seldom, as reading waits for a GPU to finish.
        """

    def contribution(self, base: Tensor, local: FlatParameters) -> list[Tensor]:
        """What the steps since the local weights were `base` [num_params] gave: an fp32 CPU tensor per parameter."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a restart needs beside the weights."""

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; an empty mapping begins anew."""


class InnerLoop:
    """Trains one model on one device by an inner optimizer, whose moments live on from round to round.

    It contributes a delta: base - local.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, compute: Compute | None = None) -> None:
        self.model = model
        self.compute = compute or Compute(model)
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(model, config)

    def step(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """See Inner."""
        rate = learning_rate(self.config, index)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self._clear()
        loss, scaler = self.compute.backward(x, y, self._clear), self.compute.scaler
        for optimizer in self.optimizers:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        for optimizer in self.optimizers:
            scaler.step(optimizer)
        scaler.update()
        return loss

    def _clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def contribution(self, base: Tensor, local: FlatParameters) -> list[Tensor]:
        """See Inner."""
        self._clear()  # the exchange needs the memory
        if local.flat.device.type == "cpu" and local.num_params >= LARGE:
            trim_heap()
        return local.views(base.cpu() - local.flat.cpu())

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizers' tensors under the names "<parameter>.<moment>"."""
        state = {p: entry for optimizer in self.optimizers for p, entry in optimizer.state.items()}
        return {
            # bitsandbytes' parameters share their tables, which one safetensors file cannot say.
            f"{name}.{moment}": torch.as_tensor(value).clone() if moment in TABLES else torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for moment, value in state.get(parameter, {}).items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See Inner. RunError if a moment does not fit."""
        state: dict[str, dict[str, Any]] = {}
        for key, value in tensors.items():
            name, _, moment = key.rpartition(".")
            fits = name in self.parameters and (
                value.ndim == 0 or moment in TABLES or value.shape == self.parameters[name].shape
            )
            if not fits:
                raise RunError(f"stored optimizer state {key} does not fit this model")
            is_count = value.ndim == 0 and not value.is_floating_point()
            state.setdefault(name, {})[moment] = int(value) if is_count else value
        names = {parameter: name for name, parameter in self.parameters.items()}
        for optimizer in self.optimizers:
            mine = [names[p] for group in optimizer.param_groups for p in group["params"]]
            places = {place: state[name] for place, name in enumerate(mine) if name in state}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": places, "param_groups": groups})


class GradientLoop:
    """Adds up gradients and leaves the weights alone. It contributes the mean gradient since its last contribution."""

    def __init__(self, model: nn.Module, compute: Compute | None = None) -> None:
        self.model = model
        self.compute = compute or Compute(model)
        if self.compute.precision == "fp16":
            raise UsageError(
                "--precision fp16 goes with strategies that have an inner optimizer: type bf16 or fp32"
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._num_steps = 0

    def step(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """See Inner."""
        before = [p.grad for p in self.parameters] if self._num_steps else []
        self._clear()
        loss = self.compute.backward(x, y, self._clear)
        for parameter, sum in zip(self.parameters, before):
            if parameter.grad is None:
                parameter.grad = sum
            elif sum is not None:
                parameter.grad += sum
        self._num_steps += 1
        return loss

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def contribution(self, base: Tensor, local: FlatParameters) -> list[Tensor]:
        """See Inner."""
        count, self._num_steps = self._num_steps, 0
        if count == 0:
            return [torch.zeros(shape) for _, shape in local.shapes]
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        return [gradient.float().div(count).cpu() for gradient in gradients]

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: each round begins anew."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""


def make_inner(model: nn.Module, config: TrainConfig, collects: str, compute: Compute | None = None) -> Inner:
    """The inner training of a strategy that collects this, see `strategy.py`."""
    return GradientLoop(model, compute) if collects == GRADIENT else InnerLoop(model, config, compute)


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Data, data: DataConfig, train: TrainConfig) -> float:
    """Mean loss (natural log per token) of the model over the corpus's fixed evaluation windows."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        at_once = max(1, min(train.batch_size, EVAL_TOKENS // train.seq_len))
        for x, y in corpus.eval_batches(
            batch_size=at_once, seq_len=train.seq_len, max_tokens=data.eval_tokens
        ):
            with autocast(device):
                total += float(model(x.to(device), y.to(device))) * y.numel()
            count += y.numel()
    return total / count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and the like."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
