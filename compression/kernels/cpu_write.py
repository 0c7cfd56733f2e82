"""Write one group: quantize the kept values, pack codes and gaps. The bytes are those of group.pack."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression.bits import MAX_RICE
from dtrain.compression.kernels.cpu_tools import bits_float, float_bits, jit, store_u64
from dtrain.compression.kernels.cpu_vector import join_fields
from dtrain.compression.levels import MAX_EXPONENT, MIN_EXPONENT

PAD = 8  # fields and bytes that may be touched beyond the last one, so that whole words can be written


@jit
def measure(values: Any, value_bits: int) -> tuple[float, float, float]:
    """(magnitude that the scale stands for, lower magnitude, mean) of one chunk's kept values [k].

    1 and 2 bits: means of all or of the upper and lower part; else the largest and the least. fp64.
    """
    total, top, bottom = 0.0, 0.0, np.inf
    for i in range(len(values)):
        x = abs(np.float64(values[i]))
        total += x
        top = max(top, x)
        bottom = min(bottom, x)
    mean = total / len(values)
    if value_bits > 2:
        return top, bottom, mean
    if value_bits == 1:
        return mean, 0.0, mean
    total_high, num_high = 0.0, 0
    for i in range(len(values)):
        x = abs(np.float64(values[i]))
        if x >= mean:
            total_high += x
            num_high += 1
    num_low = max(len(values) - num_high, 1)
    return total_high / max(num_high, 1), (total - total_high) / num_low, mean


@jit
def scale_bits(magnitude: float, value_bits: int) -> int:
    """Biased exponent and 4 bits of mantissa that stand for a magnitude: means round to nearest, maxima up."""
    rounding = (1 << 18) if value_bits <= 2 else (1 << 19) - 1
    return min((int(float_bits(np.float32(magnitude))) + rounding) >> 19, (MAX_EXPONENT << 4) | 15)


@jit
def scale_code(bits: int, exponent: int) -> int:
    """The byte of a scale below the group's exponent."""
    return max(bits - ((exponent - 15) << 4), 0) if exponent else 0


@jit
def scale_value(code: int, exponent: int) -> Any:
    """The fp32 that a scale's byte stands for."""
    if code == 0 or exponent == 0:
        return np.float32(0)
    return bits_float(np.int32((code + ((exponent - 15) << 4)) << 19))


@jit
def group_exponent(all_bits: Any, num_chunks: int) -> int:
    """The exponent that a group names: the largest of its scales, 0 when that is too small to write."""
    largest = 0
    for c in range(num_chunks):
        largest = max(largest, all_bits[c])
    return largest >> 4 if largest >> 4 >= MIN_EXPONENT else 0


@jit
def ratio_of(bottom: float, scale: Any, value_bits: int) -> int:
    """The ratio byte: bottom / scale in 256ths, to nearest with 2 bits, else down."""
    if scale == 0 or value_bits == 1:
        return 0
    relative = bottom * 256 / np.float64(scale)
    return int(min(np.rint(relative) if value_bits == 2 else np.floor(relative), 255.0))


@jit
def quantize(
    values: Any, scale: Any, ratio: int, mean: float, value_bits: int, codes: Any, sent: Any
) -> None:
    """Codes [k] of one chunk's kept values and what a reader will make of them, sent [k] fp32."""
    if value_bits <= 2:
        high = scale
        low = scale if value_bits == 1 else np.float32(np.float32(ratio) * scale) * np.float32(2.0**-8)
        for i in range(len(values)):
            x = values[i]
            upper = value_bits == 2 and abs(np.float64(x)) >= mean
            level = high if upper or value_bits == 1 else low
            codes[i] = np.int32(x < 0) | (np.int32(upper) << 1)
            sent[i] = -level if x < 0 else level
        return
    num_levels = 1 << (value_bits - 1)
    shift = np.float32(2.0 ** -(8 + value_bits))
    width = num_levels / np.float64(256 - ratio)
    divisor = np.float64(scale) if scale > 0 else 1.0
    for i in range(len(values)):
        x = values[i]
        above = abs(np.float64(x)) * 256 / divisor - ratio if scale > 0 else 0.0 - ratio
        level = int(min(max(np.floor(above * width), 0.0), num_levels - 1.0))
        n = ratio * (2 * num_levels - 1 - 2 * level) + 256 * (2 * level + 1)
        magnitude = np.float32(np.float32(n) * scale) * shift
        codes[i] = np.int32(x < 0) | np.int32(level << 1)
        sent[i] = -magnitude if x < 0 else magnitude


@jit
def write_fields(out: Any, at: int, fields: Any, n: int, width: int) -> int:
    """Write the low `width` bits of fields [n], i32, from byte `at`; returns the byte after them.

    Up to PAD bytes beyond may be overwritten; PAD fields beyond n must exist and are set to 0.
    """
    for i in range(n, n + PAD):
        fields[i] = 0
    if width <= 8:
        for i in range(0, n, 8):  # eight fields take `width` bytes
            store_u64(out, at + (i >> 3) * width, join_fields(fields, i, width))
        return at + ((n * width + 7) >> 3)
    mask = np.uint64((1 << width) - 1)
    word, filled = np.uint64(0), 0
    for i in range(n):
        word |= (np.uint64(fields[i]) & mask) << np.uint64(filled)
        filled += width
        while filled >= 8:
            out[at] = np.uint8(word & np.uint64(255))
            at += 1
            word >>= np.uint64(8)
            filled -= 8
    if filled > 0:
        out[at] = np.uint8(word)
        at += 1
    return at


@jit
def rice_parameter(gaps: Any, n: int) -> int:
    """The lowest r among those with the fewest bits; the cost is convex in r, so walk downhill from the mean."""
    total = np.int64(0)
    for i in range(n):
        total += gaps[i]
    r = np.int64(0)
    while r < MAX_RICE and (n << (r + 1)) <= total:
        r += 1
    best = _rice_bits(gaps, n, r)
    while r < MAX_RICE:
        more = _rice_bits(gaps, n, r + 1)
        if more >= best:
            break
        best = more
        r += 1
    while r > 0:
        fewer = _rice_bits(gaps, n, r - 1)
        if fewer > best:
            break
        best = fewer
        r -= 1
    return int(r)


@jit
def _rice_bits(gaps: Any, n: int, r: int) -> int:
    total = np.int32(0)
    for i in range(n):
        total += gaps[i] >> np.int32(r)
    return int(total) + n * r


@jit
def write_gaps(out: Any, at: int, gaps: Any, n: int, r: int) -> int:
    """Write gaps [n + PAD] with Rice parameter r from byte `at`; returns the byte after them. PAD as
    write_fields.
    """
    at = write_fields(out, at, gaps, n, r)
    word, bit, one = np.uint64(0), 0, np.uint64(1)
    for gap in gaps[:n]:
        bit += gap >> r
        while bit >= 64:
            store_u64(out, at, word)
            at += 8
            bit -= 64
            word = np.uint64(0)
        word |= one << np.uint64(bit)
        bit += 1
    store_u64(out, at, word)
    return at + ((bit + 7) >> 3)
