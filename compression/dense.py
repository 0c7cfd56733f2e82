"""Dense coding: every element travels, as fp16, fp32 or blockwise 8 bit.

Elements are numbered in chunk order; a block is one dense chunk (at most 256 elements, never across two
tensors). fp16 and fp32 are the plain little-endian values. With 8 bits all blocks' largest magnitudes come
first (fp32), then one byte per element: a code into the signed dynamic map of arXiv 2110.02861, relative to
the block's largest.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from dtrain.compression.errors import PayloadError
from dtrain.compression.layout import Layout

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FP16_MAX = 65504.0
BLOCK_MAX = 1e30  # largest block magnitude that 8-bit coding writes or accepts


def dense_bytes(layout: Layout, first: int, end: int, bits: int) -> int:
    """Bytes that dense chunks first to end (ids) take."""
    elements = int(layout.offset[end] - layout.offset[first])
    return elements * bits // 8 + (4 * (end - first) if bits == 8 else 0)


def slice_dense(
    layout: Layout, bits: int, data: Bytes, whole: tuple[int, int], part: tuple[int, int]
) -> bytes:
    """Bytes of the dense chunks `part` out of those of `whole` (chunk ids, first and end)."""
    scales = 4 if bits == 8 else 0
    begin, end = (int(layout.offset[c] - layout.offset[whole[0]]) * bits // 8 for c in part)
    base = scales * (whole[1] - whole[0])
    head = data[scales * (part[0] - whole[0]) : scales * (part[1] - whole[0])]
    return b"".join([head.tobytes(), data[base + begin : base + end].tobytes()])


def encode_dense(values: Floats, bits: int, starts: Ints) -> bytes:
    """Code `values` [n], whose blocks begin at `starts` [blocks]; magnitudes beyond the format's largest are
    cut.
    """
    if bits == 32:
        return values.astype("<f4").tobytes()
    if bits == 16:
        return np.clip(values, -FP16_MAX, FP16_MAX).astype("<f2").tobytes()
    if not len(values):
        return b""
    largest = np.minimum(np.maximum.reduceat(np.abs(values), starts), np.float32(BLOCK_MAX))
    spread = np.repeat(np.where(largest > 0, largest, np.float32(1)), np.diff(starts, append=len(values)))
    code_map = dynamic_map()
    midpoints = (code_map[:-1] + code_map[1:]) / np.float32(2)
    codes = np.searchsorted(midpoints, values / spread)
    return largest.astype("<f4").tobytes() + codes.astype(np.uint8).tobytes()


def decode_dense(data: Bytes, bits: int, starts: Ints, count: int) -> Floats:
    """Values [count] as fp32; `data` has the right length. Raises PayloadError "not-finite"."""
    if bits != 8:
        values = np.frombuffer(data, "<f2" if bits == 16 else "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise PayloadError("not-finite", "a dense value is infinite or not a number")
        return values
    largest = np.frombuffer(data[: 4 * len(starts)], "<f4").astype(np.float32)
    if not ((largest >= 0) & (largest <= np.float32(BLOCK_MAX))).all():
        raise PayloadError("not-finite", "a dense block's magnitude is negative, too large or not a number")
    spread = np.repeat(largest, np.diff(starts, append=count))
    return np.asarray(dynamic_map()[data[4 * len(starts) :]] * spread, dtype=np.float32)


@functools.cache
def dynamic_map() -> Floats:
    """The 256 values of the signed dynamic 8-bit type, ascending: more digits near 1, more range near 0.

    For each of 7 decades 10**-6 to 1, the middles of 1, 2, ... 64 equal parts of [0.1, 1] and their
    negatives, and 0 and 1 (Dettmers et al., arXiv 2110.02861, as in bitsandbytes' create_dynamic_map).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        for middle in (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6):
            values += [float(middle), -float(middle)]
    return np.sort(np.asarray(values, dtype=np.float32))
