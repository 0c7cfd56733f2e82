"""Exact top-k of a chunk without sorting.

512 lanes each keep the largest magnitude of every 512th element, formed while the chunk is written. Magnitudes are
compared as the integers of their bits. The k-th largest lane maximum bounds the k-th largest element from below;
bisection finds it on the lanes alone, only lanes that reach it are looked at again, and a second bisection among
those few candidates gives the exact cut. A bitmap then yields the kept positions in ascending order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression.kernels.cpu_tools import count_trailing_zeros, float_bits, jit

LANES = 512
_MAGNITUDE = np.int32(0x7FFFFFFF)
_NARROW = np.int32(12 << 23)  # the k-th largest is hardly ever below 2**-12 of the largest: try that range first


@jit
def fold(values: Any, source: Any, stride: int, decay: Any, lane_max: Any) -> None:
    """values <- decay * values + source, [n] fp32; source is rows of 64, `stride` apart. Fills lane_max [512]."""
    n = len(values)
    for j in range(LANES):
        lane_max[j] = np.int32(-1)
    if stride == 64:
        for i in range(0, n, LANES):
            for j in range(min(LANES, n - i)):
                x = values[i + j] * decay + source[i + j]
                values[i + j] = x
                lane_max[j] = max(lane_max[j], float_bits(x) & _MAGNITUDE)
        return
    for row in range(64):  # only blocks of 64 x 64 have another stride
        lane = (row & 7) * 64
        for j in range(64):
            x = values[row * 64 + j] * decay + source[row * stride + j]
            values[row * 64 + j] = x
            lane_max[lane + j] = max(lane_max[lane + j], float_bits(x) & _MAGNITUDE)


@jit
def scan(values: Any, lane_max: Any) -> None:
    """Fill lane_max [512] from values [n] as they are."""
    n = len(values)
    for j in range(LANES):
        lane_max[j] = np.int32(-1)
    for i in range(0, n, LANES):
        for j in range(min(LANES, n - i)):
            lane_max[j] = max(lane_max[j], float_bits(values[i + j]) & _MAGNITUDE)


@jit
def _count(keys: Any, n: int, cut: Any) -> int:
    found = np.int32(0)
    for i in range(n):
        found += np.int32(keys[i] >= cut)
    return int(found)


@jit
def select(values: Any, k: int, lane_max: Any, keys: Any, places: Any, bitmap: Any, ties: Any, positions: Any) -> None:
    """Write the ascending positions of the k largest magnitudes of values [n] into positions [k].

    Equal magnitudes: lowest position first. Scratch: keys, places [n + 8]; bitmap, ties [ceil(n / 64)].
    """
    n = len(values)
    top = np.int32(0)
    for j in range(LANES):
        top = max(top, lane_max[j])
    high = np.int32(top + 1)
    low = np.int32(max(top - _NARROW, 0))
    if _count(lane_max, LANES, low) < k:
        low = np.int32(0)
    slack = k + (k >> 3)
    if k > LANES or _count(lane_max, LANES, low) < k:
        high = low  # fewer lanes than k: every element is a candidate
    while high - low > 1:
        middle = np.int32(low + ((high - low) >> 1))
        found = _count(lane_max, LANES, middle)
        if found >= k:
            low = middle
            if found <= slack:
                break
        else:
            high = middle
    num = 0
    for j in range(min(LANES, n)):
        if lane_max[j] >= low:
            for p in range(j, n, LANES):
                key = float_bits(values[p]) & _MAGNITUDE
                keys[num] = key
                places[num] = p
                num += int(key >= low)
    cut = low
    found = num
    high = np.int32(top + 1)
    while found != k and high - cut > 1:
        middle = np.int32(cut + ((high - cut) >> 1))
        count = _count(keys, num, middle)
        if count >= k:
            cut = middle
            found = count
        else:
            high = middle
    _mark(keys, places, num, cut, found - k, bitmap, ties, (n + 63) >> 6)
    out = 0
    for w in range((n + 63) >> 6):
        word = bitmap[w]
        while word != np.uint64(0):
            positions[out] = w * 64 + count_trailing_zeros(word)
            out += 1
            word &= word - np.uint64(1)


@jit
def _mark(keys: Any, places: Any, num: int, cut: Any, surplus: int, bitmap: Any, ties: Any, num_words: int) -> None:
    """Set the bits of all keys at or above the cut, less `surplus` of those that equal it: the highest positions."""
    one = np.uint64(1)
    for w in range(num_words):
        bitmap[w] = np.uint64(0)
    for i in range(num):
        bitmap[places[i] >> 6] |= np.uint64(keys[i] >= cut) << np.uint64(places[i] & 63)
    if surplus == 0:
        return
    for w in range(num_words):
        ties[w] = np.uint64(0)
    for i in range(num):
        ties[places[i] >> 6] |= np.uint64(keys[i] == cut) << np.uint64(places[i] & 63)
    for w in range(num_words - 1, -1, -1):
        for b in range(63, -1, -1):
            bit = one << np.uint64(b)
            if surplus > 0 and ties[w] & bit:
                bitmap[w] ^= bit
                surplus -= 1
