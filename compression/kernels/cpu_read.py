"""Read one group: positions with every check, then the values. The rules are those of group.unpack."""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression.bits import MAX_RICE
from dtrain.compression.kernels.cpu_tools import count_trailing_zeros, jit, load_u64
from dtrain.compression.kernels.cpu_write import scale_value
from dtrain.compression.levels import MAX_EXPONENT, MIN_EXPONENT

REASONS = ("", "bad-length", "bad-scale", "bad-rice", "bad-padding", "index-out-of-range")
GOOD, BAD_LENGTH, BAD_SCALE, BAD_RICE, BAD_PADDING, OUT_OF_RANGE = range(6)


@jit
def word_at(data: Any, byte: int, end: int) -> Any:
    """Eight bytes from `byte`; those at `end` and beyond count as 0."""
    if byte + 8 <= len(data):
        word = load_u64(data, byte)
        return word if byte + 8 <= end else word & ((np.uint64(1) << np.uint64(8 * max(end - byte, 0))) - np.uint64(1))
    word = np.uint64(0)
    for i in range(max(min(end, len(data)) - byte, 0)):
        word |= np.uint64(data[byte + i]) << np.uint64(8 * i)
    return word


@jit
def field(data: Any, start: int, end: int, i: int, width: int) -> int:
    """The i-th field of `width` <= 16 bits of a stream from byte `start`."""
    bit = i * width
    word = word_at(data, start + (bit >> 3), end) >> np.uint64(bit & 7)
    return int(word & np.uint64((1 << width) - 1))


@jit
def padding_is_zero(data: Any, start: int, num_bits: int) -> bool:
    """Whether the bits of a stream's last byte beyond its `num_bits` are zero."""
    rest = num_bits & 7
    return rest == 0 or data[start + (num_bits >> 3)] >> rest == 0


@jit
def read_positions(
    data: Any, begin: int, end: int, kept: Any, sizes: Any, num_chunks: int, fixed: int, value_bits: int, positions: Any
) -> int:
    """Check the group in data[begin:end] and write each kept coefficient's position within its chunk.

    kept, sizes: of the group's chunks. Returns an index into REASONS. Nothing outside data[begin:end] and
    positions[: sum of kept] is touched, whatever the bytes say.
    """
    if end - begin < fixed:
        return BAD_LENGTH
    exponent, r = data[begin], int(data[begin + 1])
    if exponent != 0 and (exponent < MIN_EXPONENT or exponent > MAX_EXPONENT):
        return BAD_SCALE
    if r > MAX_RICE:
        return BAD_RICE
    total = 0
    for c in range(num_chunks):
        total += kept[c]
    low, high = begin + fixed, begin + fixed + ((total * r + 7) >> 3)
    if high > end:
        return BAD_LENGTH
    per_chunk = 1 if value_bits == 1 else 2
    values = begin + 2 + per_chunk * num_chunks
    if not padding_is_zero(data, values, total * value_bits) or not padding_is_zero(data, low, total * r):
        return BAD_PADDING
    byte, before, i = high, -1, 0
    base = 0  # bit number within the unary stream of the current word's first bit
    word = word_at(data, byte, end)
    for c in range(num_chunks):
        position, size = -1, sizes[c]
        for _ in range(kept[c]):
            while word == np.uint64(0):
                byte += 8
                base += 64
                if byte >= end:
                    return BAD_LENGTH
                word = word_at(data, byte, end)
            at = base + count_trailing_zeros(word)
            word &= word - np.uint64(1)
            position += 1 + (((at - before - 1) << r) | field(data, low, high, i, r))
            before = at
            if position >= size:
                return OUT_OF_RANGE
            positions[i] = position
            i += 1
    if word != np.uint64(0):
        return BAD_PADDING
    while byte + 8 < end:
        byte += 8
        if word_at(data, byte, end) != np.uint64(0):
            return BAD_PADDING
    return GOOD if high + ((before + 8) >> 3) == end else BAD_LENGTH


@jit
def add_chunk(
    data: Any, begin: int, end: int, c: int, first: int, k: int, num_chunks: int,
    weight: Any, value_bits: int, positions: Any, out: Any, stride: int,
) -> None:  # fmt: skip
    """out <- out + weight * chunk c of a group that read_positions found good; `first`: kept before it in the group.

    out: fp32 from the chunk's first element, rows of 64 that are `stride` apart.
    """
    step = weight * scale_value(data[begin + 2 + c], data[begin])
    values = begin + 2 + num_chunks
    if value_bits == 1:
        for i in range(first, first + k):
            p = positions[i]
            out[(p >> 6) * stride + (p & 63)] += -step if data[values + (i >> 3)] >> (i & 7) & 1 else step
        return
    ratio = int(data[begin + 2 + num_chunks + c])
    values += num_chunks
    shift = np.float32(2.0**-8)
    if value_bits == 2:
        low, high = (np.float32(ratio) * step) * shift, (np.float32(256) * step) * shift
        table = (low, -low, high, -high)
        for i in range(first, first + k):
            p = positions[i]
            out[(p >> 6) * stride + (p & 63)] += table[data[values + (i >> 2)] >> (2 * (i & 3)) & 3]
        return
    num_levels = 1 << (value_bits - 1)
    shift = np.float32(2.0 ** -(8 + value_bits))
    for i in range(first, first + k):
        code = field(data, values, end, i, value_bits)
        level = code >> 1
        n = np.float32(ratio * (2 * num_levels - 1 - 2 * level) + 256 * (2 * level + 1))
        value = ((-n if code & 1 else n) * step) * shift
        p = positions[i]
        out[(p >> 6) * stride + (p & 63)] += value
