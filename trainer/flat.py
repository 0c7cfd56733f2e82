"""All trained parameters of a model in one contiguous tensor: a round moves one block of memory, not hundreds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatParameters:
    """Re-homes a model's trained parameters as views of one flat tensor, in the order of `named_parameters`.

    Frozen ones (`requires_grad` is False) stay where they are. Call it after the model has moved to its device: moving
    a model gives its parameters new storage.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.shapes: list[tuple[str, tuple[int, ...]]] = [(name, tuple(p.shape)) for name, p in named]
        """(name, shape) of every trained parameter; what the codec is built from."""
        self.flat: Tensor = torch.cat([p.detach().to(torch.float32).flatten() for _, p in named])
        """[num_params] fp32 on the model's device; writing to it writes the parameters."""
        for (_, parameter), view in zip(named, self.views(self.flat), strict=True):
            parameter.data = view

    @property
    def num_params(self) -> int:
        """Number of scalars in all trained parameters."""
        return self.flat.numel()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of a [num_params] tensor in the parameters' shapes and order."""
        sizes = [torch.Size(shape).numel() for _, shape in self.shapes]
        pieces = torch.split(flat, sizes)
        return [piece.view(shape) for piece, (_, shape) in zip(pieces, self.shapes, strict=True)]
