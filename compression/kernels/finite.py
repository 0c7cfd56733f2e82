"""Whether tensors hold NaN or infinity, in plain torch, for a device or a type that has no loop of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def finite(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """For each tensor of any float type, on one device, whether all its elements are finite."""
    if not tensors:
        return []
    # All sums at once: on a GPU, looking at each would wait for it. A sum is finite only if every term is; it may
    # overflow without a culprit, so look again before refusing.
    sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in tensors]).tolist()
    return [
        math.isfinite(total) or bool(tensor.isfinite().all())
        for tensor, total in zip(tensors, sums, strict=True)
    ]
