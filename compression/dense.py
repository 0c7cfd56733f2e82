"""Dense coding: every element travels, as fp16, fp32 or blockwise 8 bit.

Elements are numbered in chunk order; a block is one dense chunk (it never spans two tensors). fp16 and fp32
are the plain little-endian values. With 8 bits all blocks' largest magnitudes come first (fp32), then one
byte per element: a code into the signed dynamic map of arXiv 2110.02861, relative to the block's largest.

That is bitsandbytes' blockwise quantization, written here because it is part of a wire format: its map must have the
same 256 values in every version and on every machine (its own, computed with torch, differs from ours in the last bit
of 72), and a volunteer would download 125 MB for one table. Codes here are always the nearest; those of bitsandbytes
on a CPU are another one in 8 % of cases, a nearly equal one.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from dtrain.compression.errors import PayloadError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FP16_MAX = 65504.0
BLOCK_MAX = 1e30  # largest block magnitude that 8-bit coding writes or accepts
SCALE_BYTES = {8: 4, 16: 0, 32: 0}  # per block


def quantize(values: Floats, bits: int, starts: Ints) -> tuple[Floats, Bytes]:
    """(blocks' largest magnitudes, bytes of the elements) of `values` [n], whose blocks begin at `starts`.

    Magnitudes beyond the format's largest are cut. The first array is empty but with 8 bits.
    """
    nothing = np.zeros(0, np.float32)
    if bits == 32:
        return nothing, values.astype("<f4").view(np.uint8)
    if bits == 16:
        return nothing, np.clip(values, -FP16_MAX, FP16_MAX).astype("<f2").view(np.uint8)
    if not len(values):
        return nothing, np.zeros(0, np.uint8)
    largest = np.minimum(np.maximum.reduceat(np.abs(values), starts), np.float32(BLOCK_MAX))
    codes = nearest_codes(
        values / _spread(np.where(largest > 0, largest, np.float32(1)), starts, len(values))
    )
    return largest.astype(np.float32), codes


def dequantize(largest: Floats, data: Bytes, bits: int, starts: Ints) -> Floats:
    """Values that `quantize` wrote, fp32."""
    if bits != 8:
        return data.view("<f2" if bits == 16 else "<f4").astype(np.float32)
    return np.asarray(dynamic_map()[data] * _spread(largest, starts, len(data)), dtype=np.float32)


def check(largest: Floats, data: Bytes, bits: int) -> None:
    """Raises PayloadError "not-finite" when these bytes hold anything but finite values in range."""
    if bits != 8 and not np.isfinite(data.view("<f2" if bits == 16 else "<f4")).all():
        raise PayloadError("not-finite", "a dense value is infinite or not a number")
    if not ((largest >= 0) & (largest <= np.float32(BLOCK_MAX))).all():
        raise PayloadError("not-finite", "a dense block's magnitude is negative, too large or not a number")


def _spread(per_block: Floats, starts: Ints, count: int) -> Floats:
    return np.repeat(per_block, np.diff(starts, append=count))


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


@functools.cache
def _midpoints() -> Floats:
    values = dynamic_map()
    return np.asarray((values[:-1] + values[1:]) / np.float32(2), dtype=np.float32)


BUCKET_SHIFT = 18  # a bucket is the sign, the exponent and 5 bits of mantissa: it holds few midpoints
BUCKETS = 1 << (32 - BUCKET_SHIFT)


@functools.cache
def _first_codes() -> npt.NDArray[np.uint8]:
    """For every bucket of fp32 numbers, the code of the least number in it."""
    bits = np.arange(BUCKETS, dtype=np.uint32) << np.uint32(BUCKET_SHIFT)
    bits = np.where(bits >> 31 == 1, bits | np.uint32((1 << BUCKET_SHIFT) - 1), bits).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.searchsorted(_midpoints(), bits.view(np.float32)), dtype=np.uint8)


def nearest_codes(relative: Floats) -> Bytes:
    """Code of the nearest value of the dynamic map for numbers in [-1, 1]: the number of midpoints below
    them.

    A table finds nearly all of it at once; numbers whose bucket holds midpoints take a step for each.
    """
    relative = np.ascontiguousarray(relative, dtype=np.float32)
    codes = _first_codes()[relative.view(np.uint32) >> np.uint32(BUCKET_SHIFT)]
    above = np.append(_midpoints(), np.float32(np.inf))
    while True:
        behind = above[codes] < relative
        if not behind.any():
            return np.ascontiguousarray(codes, dtype=np.uint8)
        codes = codes + behind.astype(np.uint8)
