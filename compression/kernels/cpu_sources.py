"""Where the chunks of source tensors lie in memory, as contiguous fp32 on the CPU, converted piece by piece
if not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.layout import Layout

Ints = npt.NDArray[np.int64]


def addresses_of(layout: Layout, tensors: Sequence[torch.Tensor], first: int, end: int) -> Ints:
    """Addresses of chunks first to end within contiguous fp32 CPU tensors, which must outlive their use."""
    bases = np.asarray([tensor.data_ptr() for tensor in tensors], np.int64)
    return np.asarray(bases[layout.tensor[first:end]] + 4 * layout.start[first:end], dtype=np.int64)


def source_addresses(
    layout: Layout, tensors: Sequence[torch.Tensor], first: int, end: int
) -> tuple[Ints, list[torch.Tensor]]:
    """Addresses of chunks first to end of any float tensors; the copies that some point into come with them.

    Only the rows that these chunks need are converted, so that a caller who goes part by part needs little
    memory.
    """
    addresses, copies = addresses_of(layout, tensors, first, end), []
    for index in np.unique(layout.tensor[first:end]).tolist():
        tensor = tensors[index].detach()
        if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous():
            continue
        while tensor.ndim > 1 and tensor.shape[0] == 1:
            tensor = tensor[0]
        chunks = np.flatnonzero(layout.tensor[first:end] == index) + first
        row = math.prod(tensor.shape[1:])
        last = int(chunks[-1])
        height = 63 * int(layout.stride[last]) + 64 if layout.stride[last] != 64 else int(layout.size[last])
        top, bottom = int(layout.start[chunks[0]]) // row, -(-(int(layout.start[last]) + height) // row)
        copy = tensor[top:bottom].to(device="cpu", dtype=torch.float32).contiguous()
        addresses[chunks - first] = copy.data_ptr() + 4 * (layout.start[chunks] - top * row)
        copies.append(copy)
    return addresses, copies
