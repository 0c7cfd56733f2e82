"""Magnitudes of kept values: one scale per chunk and a few levels below it. See WIRE.md, "Scales" and
"Values".

A level is `n * scale / 2**shift` with a whole number n < 2**24 that depends on the code and, from 2 bits up,
on the chunk's ratio byte. The scale has 5 significant bits, so that every product below is exact or rounded
once: the same bits on every machine, with or without fused multiply-add.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Biased fp32 exponents that a group may name. The lowest scale is then 2**-79 and every level a normal
# number.
MIN_EXPONENT, MAX_EXPONENT = 63, 191


def shift_of(value_bits: int) -> int:
    """Number of fractional bits of n."""
    return {1: 0, 2: 8}.get(value_bits, 8 + value_bits)


def scale_codes(magnitudes: Floats, value_bits: int) -> tuple[int, Bytes]:
    """Code each chunk's magnitude [chunks] as 4 exponent and 4 mantissa bits below the group's shared
    exponent.

    Means (1 and 2 bits) round to nearest; maxima (4 bits and more) round up, so that the levels cover them.
    Returns (shared biased exponent, codes [chunks]); a magnitude under 2**-16 of the group's largest gets
    code 0: no scale, the chunk's values then stay in the error feedback.
    """
    rounding = (1 << 18) if value_bits <= 2 else (1 << 19) - 1
    bits = (
        magnitudes.view(np.int32).astype(np.int64) + rounding
    ) >> 19  # biased exponent and 4 bits of mantissa
    bits = np.minimum(bits, (MAX_EXPONENT << 4) | 15)
    exponent = int(bits.max(initial=0)) >> 4
    if exponent < MIN_EXPONENT:
        return 0, np.zeros(len(bits), np.uint8)
    return exponent, np.maximum(bits - ((exponent - 15) << 4), 0).astype(np.uint8)


def scales(exponent: int, codes: Bytes) -> Floats:
    """Decode what `scale_codes` made: fp32 [chunks]."""
    if exponent == 0:
        return np.zeros(len(codes), np.float32)
    bits = (codes.astype(np.int32) + ((exponent - 15) << 4)) << 19
    return np.where(codes == 0, np.float32(0), bits.view(np.float32)).astype(np.float32)


def numerators(codes: Ints, ratio: Ints, value_bits: int) -> Floats:
    """n of each value [n] with its sign, fp32; `codes` are the wire's fields, `ratio` the chunk's byte per
    value.
    """
    magnitude = codes >> 1
    if value_bits == 1:
        n = np.ones_like(codes)
    elif value_bits == 2:
        n = np.where(magnitude == 1, 256, ratio)
    else:
        num_levels = 1 << (value_bits - 1)
        n = ratio * (2 * num_levels - 1 - 2 * magnitude) + 256 * (2 * magnitude + 1)
    return np.where(codes & 1, -n, n).astype(np.float32)


def dequantize(n: Floats, scale: Floats, value_bits: int, weight: float = 1.0) -> Floats:
    """weight * n * scale / 2**shift as fp32, in this fixed order: (weight * scale), times n, times a power of
    two.
    """
    step = np.float32(weight) * scale
    return np.asarray((n * step) * np.float32(2.0 ** -shift_of(value_bits)), dtype=np.float32)
