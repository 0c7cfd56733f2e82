"""The inner optimizers by name: each trains all parameters of a model, by one or more torch optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.trainer.config import TrainConfig
from dtrain.trainer.errors import UsageError
from dtrain.trainer.muon import Muon

EPSILON = 1e-8


def adamw(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW (arXiv 1711.05101); matrices decay, vectors do not."""
    return [_adamw(_trained(model), config)]


def adamw8bit(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW with moments of 8 bits (arXiv 2110.02861), a quarter of the memory. UsageError without bitsandbytes."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            f"train.optimizer = adamw8bit needs bitsandbytes ({error}): type pip install 'dtrain[adamw8bit]'"
        ) from None
    betas = (config.beta1, config.beta2)
    return [AdamW8bit(_groups(_trained(model), config), lr=config.lr, betas=betas, eps=EPSILON)]


def muon(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """Muon (arXiv 2502.16982) for the hidden matrices, AdamW for embeddings and vectors, at one learning rate."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    hidden = [p for p in _trained(model) if p.ndim == 2 and id(p) not in tables]
    others = [p for p in _trained(model) if p.ndim != 2 or id(p) in tables]
    found: list[Optimizer] = []
    if hidden:
        found.append(Muon(hidden, lr=config.lr, weight_decay=config.weight_decay))
    if others:
        found.append(_adamw(others, config))
    return found


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainConfig], Sequence[Optimizer]]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "muon": muon,
}
"""Inner optimizers by the name that `train.optimizer` gives."""


def make_optimizers(model: nn.Module, config: TrainConfig) -> Sequence[Optimizer]:
    """The optimizers that `train.optimizer` names; UsageError lists the choices, or says what is missing."""
    if config.optimizer not in OPTIMIZERS:
        choices = ", ".join(OPTIMIZERS)
        raise UsageError(
            f"there is no train.optimizer (--optimizer) {config.optimizer!r}: choose one of {choices}"
        )
    return OPTIMIZERS[config.optimizer](model, config)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _adamw(parameters: list[nn.Parameter], config: TrainConfig) -> Optimizer:
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(_groups(parameters, config), lr=config.lr, betas=betas, eps=EPSILON, fused=fused)


def _groups(parameters: Iterable[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups with weight decay for matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
