"""Read one group: positions with every check, then the values. The rules are those of group.unpack."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression.bits import MAX_RICE
from dtrain.compression.kernels.cpu_tools import count_trailing_zeros, jit, load_u64
from dtrain.compression.kernels.cpu_vector import spread_fields
from dtrain.compression.kernels.cpu_write import PAD, scale_value
from dtrain.compression.levels import MAX_EXPONENT, MIN_EXPONENT

REASONS = ("", "bad-length", "bad-scale", "bad-rice", "bad-padding", "index-out-of-range")
_NO_SIGN = 0x7FFFFFFF
GOOD, BAD_LENGTH, BAD_SCALE, BAD_RICE, BAD_PADDING, OUT_OF_RANGE = range(6)


@jit
def group_bytes(data: Any, begin: int, end: int) -> Any:
    """The bytes of a group and PAD more, for loads of whole words: a view where the section goes on, else a
    copy.
    """
    if end + PAD <= len(data):
        return data[begin : end + PAD]
    copy = np.zeros(end - begin + PAD, np.uint8)
    for i in range(begin, end):
        copy[i - begin] = data[i]
    return copy


@jit
def read_fields(data: Any, start: int, n: int, width: int, fields: Any) -> None:
    """fields [n + PAD] <- the n fields of `width` <= 16 bits of a stream from byte `start`, and PAD of no
    meaning.
    """
    if width <= 8:
        for i in range(0, n, 8):  # eight fields take `width` bytes
            spread_fields(load_u64(data, start + (i >> 3) * width), width, fields, i)
        return
    mask = np.uint64((1 << width) - 1)
    for i in range(n):
        bit = i * width
        fields[i] = np.int32((load_u64(data, start + (bit >> 3)) >> np.uint64(bit & 7)) & mask)


@jit
def _padding_is_zero(data: Any, start: int, num_bits: int) -> bool:
    rest = num_bits & 7
    return rest == 0 or data[start + (num_bits >> 3)] >> rest == 0


@jit
def _read_ones(data: Any, start: int, end: int, n: int, ones: Any) -> int:
    """ones [n] <- positions of the n ones in the bits of data[start:end]; GOOD only if they fill it exactly."""
    i, last = np.int64(0), np.int64(-1)
    for byte in range(start, end, 8):
        word = load_u64(data, byte)
        if byte + 8 > end:
            word &= (np.uint64(1) << np.uint64(8 * (end - byte))) - np.uint64(1)
        base = (byte - start) * 8
        while word != np.uint64(0):
            if i == n:
                return BAD_PADDING
            last = base + count_trailing_zeros(word)
            ones[i] = last
            i += 1
            word &= word - np.uint64(1)
    if i < n or start + ((last + 8) >> 3) != end:
        return BAD_LENGTH
    return GOOD


@jit
def read_positions(
    data: Any, kept: Any, sizes: Any, fixed: int, value_bits: int, positions: Any, low: Any
) -> int:
    """Check a group (from `group_bytes`) and write each kept coefficient's position within its chunk.

    kept, sizes [chunks]; positions, low (scratch): the sum of kept and PAD more. Returns an index into
    REASONS. Nothing outside these arrays is touched, whatever the bytes say.
    """
    end, num_chunks = len(data) - PAD, len(kept)
    if end < fixed:
        return BAD_LENGTH
    exponent, r = data[0], int(data[1])
    if exponent != 0 and (exponent < MIN_EXPONENT or exponent > MAX_EXPONENT):
        return BAD_SCALE
    if r > MAX_RICE:
        return BAD_RICE
    total = np.int64(0)
    for c in range(num_chunks):
        total += kept[c]
    if not _padding_is_zero(data, 2 + (1 if value_bits == 1 else 2) * num_chunks, total * value_bits):
        return BAD_PADDING
    unary = fixed + ((total * r + 7) >> 3)
    if unary > end:
        return BAD_LENGTH
    if not _padding_is_zero(data, fixed, total * r):
        return BAD_PADDING
    found = _read_ones(data, unary, end, total, positions)
    if found != GOOD:
        return found
    read_fields(data, fixed, total, r, low)
    # Within a chunk, position = sum of (high part << r + low part + 1); the sum of the high parts is in the
    # ones.
    first, before = np.int64(0), np.int64(-1)
    for c in range(num_chunks):
        mine, lows = positions[first : first + kept[c]], low[first : first + kept[c]]
        sum_low, last = 0, before
        for i in range(len(mine)):
            sum_low += lows[i]
            last = mine[i]
            mine[i] = np.int32((((last - before - 1 - i) << r) + sum_low + i) & _NO_SIGN)
        if ((last - before - len(mine)) << r) + sum_low + len(mine) > sizes[
            c
        ]:  # positions ascend: this is the last's
            return OUT_OF_RANGE
        before = last
        first += kept[c]
    return GOOD


@jit
def add_chunk(
    data: Any, c: int, num_chunks: int, first: int, k: int, weight: Any, value_bits: int, positions: Any, codes: Any,
    table: Any, out: Any,
) -> None:  # fmt: skip
    """out <- out + weight * chunk c of a group that read_positions found good; `first`: kept before it in the
    group.

    codes [all of the group]: from `read_codes`. table: scratch [4]. out: fp32 [n].
    """
    step = weight * scale_value(int(data[2 + c]), int(data[0]))
    ratio = int(data[2 + num_chunks + c]) if value_bits > 1 else 0
    mine, fields = positions[first : first + k], codes[first : first + k]
    if value_bits <= 2:
        shift = np.float32(2.0**-8)
        low = step if value_bits == 1 else (np.float32(ratio) * step) * shift
        high = (np.float32(256) * step) * shift
        table[0], table[1], table[2], table[3] = low, -low, high, -high
        for i in range(len(mine)):
            out[np.uint64(mine[i])] += table[np.uint64(fields[i])]  # unsigned: no test for negative indices
        return
    num_levels = 1 << (value_bits - 1)
    shift = np.float32(2.0 ** -(8 + value_bits))
    for i in range(len(mine)):
        level = fields[i] >> 1
        n = np.float32(ratio * (2 * num_levels - 1 - 2 * level) + 256 * (2 * level + 1))
        out[np.uint64(mine[i])] += ((-n if fields[i] & 1 else n) * step) * shift


@jit
def read_codes(data: Any, num_chunks: int, total: int, value_bits: int, codes: Any) -> None:
    """codes [total + PAD] <- the values' fields of a group."""
    read_fields(data, 2 + (1 if value_bits == 1 else 2) * num_chunks, total, value_bits, codes)
