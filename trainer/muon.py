"""Muon (arXiv 2502.16982): momentum, made orthogonal, for the hidden matrices of a model.

Updates and saved state are those of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, which torch has since 2.9.
That one computes in bf16 everywhere, for which CPUs without bf16 arithmetic take longer than for the model's
passes (experiments/RESULTS.md). Here only CUDA has bf16; elsewhere it is fp32, by a way that takes about half of the
operations for n = 4 m (`dtrain bench optimizers` measures the whole).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic x (A + B x^2 + C x^4) that takes singular values towards one (https://kellerjordan.github.io/posts/muon)."""
STEPS = 5  # of it
EPSILON = 1e-7  # the least norm of a matrix
ADAMW_RMS = 0.2  # of AdamW's usual update, in learning rates


class Muon(Optimizer):
    """Trains matrices; updates have the size of AdamW's, so that both take the same learning rate."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; of Nesterov's kind."""
        if closure is not None:
            raise NotImplementedError("Muon takes no closure")
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                average = state["momentum_buffer"]
                average.lerp_(parameter.grad, 1 - momentum)
                update = orthogonal(parameter.grad.lerp(average, momentum))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * ADAMW_RMS * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix [m, n] with its singular values at 0.7 to 1.2, but for those near 0; on CUDA in bf16."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / matrix.norm().clamp(min=EPSILON)
    return _iterated(matrix.bfloat16()) if matrix.is_cuda else _by_gram_matrix(matrix.float())


def _iterated(x: Tensor) -> Tensor:
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _by_gram_matrix(x: Tensor) -> Tensor:
    """The same with the polynomials of all steps multiplied first, [m, m] each.

    Their product is large where the Gram matrix is zero but for rounding: too large for bf16.
    """
    gram = x @ x.T
    product = polynomial = _polynomial(gram)
    for _ in range(STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product @ x


def _polynomial(gram: Tensor) -> Tensor:
    found = torch.addmm(gram, gram, gram, beta=B, alpha=C)
    found.diagonal().add_(A)
    return found
