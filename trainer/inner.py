"""Inner training: the learning-rate schedule, the inner optimizers, and one inner step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dtrain.trainer.config import DataConfig, TrainConfig
from dtrain.trainer.data import Corpus
from dtrain.trainer.errors import RunError, UsageError


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of inner step `step`, counted from the run's beginning: linear warm-up, then a cosine
    down to `min_lr_ratio` at `total_steps`, constant after it."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = max(1, config.total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / length)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101); matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=fused)


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainConfig], torch.optim.Optimizer]] = {"adamw": adamw}
"""Inner optimizers by the name that `train.optimizer` gives."""


class InnerLoop:
    """Trains one model on one device, step by step. The optimizer's moments live on from round to round."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        if config.optimizer not in OPTIMIZERS:
            choices = ", ".join(OPTIMIZERS)
            raise UsageError(f"there is no train.optimizer {config.optimizer!r}: choose one of {choices}")
        self.model = model
        self.config = config
        self.parameters = list(model.parameters())
        self.device = self.parameters[0].device
        self.optimizer = OPTIMIZERS[config.optimizer](model, config)

    def step(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """Train on x, y [B, T] int64 as the run's inner step `index`; returns the loss before it (0-dim).

        The loss stays on the device: read it seldom, as reading waits for a GPU to finish.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, index)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            loss: Tensor = self.model(
                x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors under the names "<parameter index>.<moment>"."""
        state = self.optimizer.state_dict()["state"]
        return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; an empty mapping resets the moments."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        sizes = [p.shape for group in self.optimizer.param_groups for p in group["params"]]
        for place, entry in state.items():
            for name, value in entry.items():
                if place >= len(sizes) or (value.ndim > 0 and value.shape != sizes[place]):
                    raise RunError(f"stored optimizer state {place}.{name} does not fit this model")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products on GPUs that have them; fp32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, data: DataConfig, train: TrainConfig) -> float:
    """Mean loss (natural log per token) of the model over the corpus's fixed evaluation windows."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for x, y in corpus.eval_batches(
        batch_size=train.batch_size, seq_len=train.seq_len, max_tokens=data.eval_tokens
    ):
        with autocast(device):
            total += float(model(x.to(device), y.to(device))) * y.numel()
        count += y.numel()
    return total / count
