"""Checks of the tensors that callers hand in, and making those that they get back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dtrain.compression.errors import CompressionError
from dtrain.compression.kernels.base import Kernel
from dtrain.compression.layout import Layout

LINE_BYTES = 64


def check_shapes(layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
    """Raises CompressionError that names the first tensor whose shape is not the layout's."""
    if len(tensors) != len(layout.shapes):
        raise CompressionError(f"{len(tensors)} tensors given, the codec was made for {len(layout.shapes)}")
    for (name, shape), tensor in zip(layout.shapes, tensors, strict=True):
        if tuple(tensor.shape) != shape:
            raise CompressionError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")


def check_sources(layout: Layout, tensors: Sequence[torch.Tensor], kernel: Kernel) -> None:
    """Raises CompressionError that names the first tensor with a wrong shape, no floats, NaN or infinity."""
    check_shapes(layout, tensors)
    for (name, _), tensor in zip(layout.shapes, tensors, strict=True):
        if not tensor.is_floating_point():
            raise CompressionError(f"tensor {name!r} is {tensor.dtype}, expected a float type")
    for (name, _), good in zip(layout.shapes, kernel.finite(tensors), strict=True):
        if not good:
            raise CompressionError(f"tensor {name!r} holds NaN or infinity; nothing was encoded")


def check_flat(what: str, tensor: torch.Tensor, numel: int) -> None:
    """Raises CompressionError unless a feedback or residual is contiguous fp32 [numel]."""
    if tensor.shape != (numel,) or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise CompressionError(
            f"the {what} must be contiguous fp32 [{numel}], not {tensor.dtype} {list(tensor.shape)}"
        )


def outputs(layout: Layout, given: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    """fp32 tensors of the layout's shapes, of any content: those given, once checked, or new ones."""
    if given is not None:
        check_shapes(layout, given)
        for (name, _), tensor in zip(layout.shapes, given, strict=True):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise CompressionError(f"output {name!r} must be contiguous fp32, not {tensor.dtype}")
        return list(given)
    # One array: numpy asks the system for huge pages then, which are quicker to come by than small ones.
    # It begins on a cache line, so that kernels may write past the caches.
    memory = np.empty(layout.num_params + LINE_BYTES // 4, np.float32)
    skipped = -memory.ctypes.data % LINE_BYTES // 4
    flat, made, done = torch.from_numpy(memory[skipped : skipped + layout.num_params]), [], 0
    for (_, shape), numel in zip(layout.shapes, layout.numels, strict=True):
        made.append(flat[done : done + numel].view(shape))
        done += numel
    return made


def clear_rest(layout: Layout, covered: Sequence[tuple[int, int]], tensors: Sequence[torch.Tensor]) -> None:
    """Set to 0 what lies outside the `covered` spans (first chunk, number of chunks)."""
    rest = np.ones(layout.num_chunks, bool)
    for first, count in covered:
        rest[first : first + count] = False
    for chunk in np.flatnonzero(rest).tolist():
        layout.view(tensors[int(layout.tensor[chunk])], chunk).zero_()
