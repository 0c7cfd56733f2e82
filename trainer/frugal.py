"""Parts of a model that keep less in memory for the backward pass than torch's own, for about the same time.

The logits of 1,024 tokens over 50,257 words take 206 MB, and their gradient and probabilities as much again. Made some
rows at a time, with the gradient in the same pass, they take what a few rows take, and no more arithmetic (the idea of
arXiv 2410.10989 and 2411.09009). A square is quicker made again than kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

AT_ONCE = 1 << 23
"""Logits that may be in memory at once; fewer than twice as many are made in one piece, by torch's own functions."""


def next_token_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats (0-dim) of the logits x @ weight.T.

    x [tokens, dim], weight [vocab, dim], targets [tokens] int64.
    """
    if targets.numel() * weight.shape[0] <= 2 * AT_ONCE:
        return functional.cross_entropy(functional.linear(x, weight).float(), targets)
    loss: Tensor = _InPieces.apply(x, weight, targets, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


class _InPieces(torch.autograd.Function):
    """Computes the gradients in its forward pass, as long as a piece's logits are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x) if learns else None
        grad_weight = torch.zeros_like(weight) if learns else None
        rows = max(1, AT_ONCE // weight.shape[0])
        for first in range(0, x.shape[0], rows):
            piece = slice(first, first + rows)
            logits = functional.linear(x[piece], weight).float()  # [rows, vocab]
            picked = targets[piece, None]
            norms = logits.logsumexp(dim=1, keepdim=True)
            total += (norms - logits.gather(1, picked)).sum()
            if grad_x is None or grad_weight is None:
                continue
            change = logits.sub_(
                norms
            ).exp_()  # probabilities, less 1 where the target is: the logits' gradient
            change.scatter_add_(1, picked, torch.full_like(norms, -1.0)).div_(x.shape[0])
            grad_x[piece] = functional.linear(change, weight.t())
            if torch.is_autocast_enabled(x.device.type):
                grad_weight += functional.linear(change.t(), x[piece].t())
            else:
                grad_weight.addmm_(change.t(), x[piece])
        ctx.save_for_backward(grad_x, grad_weight)
        return total / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad[0], grad_weight * grad[0], None, None


def linear_of_square(x: Tensor, weight: Tensor) -> Tensor:
    """x * x @ weight.T [..., out] of x [..., in] and weight [out, in]; of the two, x alone is kept."""
    out: Tensor = _LinearOfSquare.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _LinearOfSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x.square(), weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = grad[0].flatten(0, -2).t() @ x.square().flatten(0, -2)
        return (grad[0] @ weight).mul_(x).mul_(2), grad_weight
