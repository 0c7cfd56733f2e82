"""Where the chunks of source tensors lie in memory, as contiguous fp32 on the CPU, converted piece by piece
if not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain.compression.kernels.cpu_tools import carray, claim, float_bits, float_pointer, jit, jit_on_disk
from dtrain.compression.kernels.cpu_vector import WORD, mask_at_least
from dtrain.compression.layout import Layout

Ints = npt.NDArray[np.int64]

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)


@jit
def _is_finite(values: Any) -> bool:
    """Whether all of fp32 [n] are finite."""
    found, quarter = np.uint64(0), len(values) // 4 & -WORD
    for i in range(0, quarter, WORD):  # memory answers four readers faster than one
        for part in range(4):
            found |= mask_at_least(values, i + part * quarter, _INFINITY)
    for i in range(4 * quarter, len(values)):
        found |= np.uint64((float_bits(values[i]) & _MAGNITUDE) >= _INFINITY)
    return bool(found == np.uint64(0))


def build_look(sources: str) -> Callable[..., None]:
    """Compile the loop that looks for NaN and infinity; `sources` stands for the text of everything it is made of."""

    @jit_on_disk
    def look(addresses: Any, sizes: Any, part_size: int, counter: Any, bad: Any) -> None:
        """Set bad[t] if one of the sizes[t] fp32 from addresses[t] on is not finite, for the parts that `counter`
        still has; parts are of `part_size` elements, none over the end of a tensor.
        """
        _ = sources
        tensor, first, mine = np.int64(0), np.int64(0), claim(counter)
        while tensor < len(sizes):
            num_parts = (sizes[tensor] + part_size - 1) // part_size
            if mine < first + num_parts:
                start = (mine - first) * part_size
                values = carray(float_pointer(addresses[tensor]), (sizes[tensor],))
                if not _is_finite(values[start : start + part_size]):
                    bad[tensor] = 1
                mine = claim(counter)
            else:
                first += num_parts
                tensor += 1

    return look


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the loops can read a tensor where it is: contiguous fp32 on the CPU."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


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
        if is_plain(tensor):
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
