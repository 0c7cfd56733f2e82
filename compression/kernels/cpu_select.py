"""Exact top-k of a chunk without sorting.

512 lanes keep the largest magnitude of every 512th element, formed while the chunk is written. Magnitudes are
compared as the integers of their bits. Bisection on the lanes alone finds a bound that at least k of them, and hardly
more, reach; so at least k elements reach it, too. A pass of vector comparisons turns the elements that do into a
bitmap, which yields a few more than k candidates in ascending order, and bisection among those the exact cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression.kernels.cpu_tools import count_trailing_zeros, float_bits, jit
from dtrain.compression.kernels.cpu_vector import LANES as STEP
from dtrain.compression.kernels.cpu_vector import fold_step, mask_at_least, prefetch_row, scan_step

LANES = 512
_MAGNITUDE = np.int32(0x7FFFFFFF)
_NARROW = np.int32(12 << 23)  # the k-th largest is hardly ever below 2**-12 of the largest: try that range first


@jit
def fold(values: Any, source: Any, stride: int, decay: Any, lane_max: Any, following: int, next_stride: int) -> None:
    """values <- decay * values + source, [n] fp32; source is rows of 64, `stride` apart. Fills lane_max [512].

    following, next_stride: address of what is folded next, its rows apart. Hardware doesn't foresee rows of a block
    that lie pages apart, so they are asked for here, one chunk ahead; 0 asks for nothing.
    """
    lane_max[:] = np.int32(-1)
    whole = len(values) & -64
    for i in range(0, whole, 64):
        row, lane = (i >> 6) * stride, i & (LANES - 1)
        if following != 0:
            prefetch_row(following + (i >> 6) * next_stride * 4)
        for j in range(0, 64, STEP):
            fold_step(values, i + j, source, row + j, lane_max, lane + j, decay)
    for i in range(whole, len(values)):  # only a short run can have a rest, and runs are contiguous
        values[i] = values[i] * decay + source[i]
        lane_max[i & (LANES - 1)] = max(lane_max[i & (LANES - 1)], float_bits(values[i]) & _MAGNITUDE)


@jit
def scan(values: Any, lane_max: Any) -> None:
    """Fill lane_max [512] from values [n] as they are."""
    lane_max[:] = np.int32(-1)
    whole = len(values) & -64
    for i in range(0, whole, STEP):
        scan_step(values, i, lane_max, i & (LANES - 1))
    for i in range(whole, len(values)):
        lane_max[i & (LANES - 1)] = max(lane_max[i & (LANES - 1)], float_bits(values[i]) & _MAGNITUDE)


@jit
def _count(keys: Any, n: int, cut: Any) -> int:
    found = np.int32(0)
    for i in range(n):
        found += np.int32(keys[i] >= cut)
    return int(found)


@jit
def _lane_bound(lane_max: Any, k: int, top: Any) -> Any:
    """A magnitude that at least k lanes reach, if possible no more than k + k / 8; 0 when fewer than k are in use."""
    high, low = np.int32(top + 1), np.int32(max(top - _NARROW, 0))
    if k > LANES or _count(lane_max, LANES, low) < k:
        low = np.int32(0)
        if k > LANES or _count(lane_max, LANES, low) < k:
            return low
    while high - low > 1:
        middle = np.int32(low + ((high - low) >> 1))
        found = _count(lane_max, LANES, middle)
        if found >= k:
            low = middle
            if found <= k + (k >> 3):
                break
        else:
            high = middle
    return low


@jit
def select(values: Any, k: int, lane_max: Any, keys: Any, places: Any, positions: Any) -> None:
    """Write the ascending positions of the k largest magnitudes of values [n] into positions [k].

    Equal magnitudes: lowest position first. lane_max: as `fold` or `scan` left it. Scratch: keys, places [n].
    """
    top = np.int32(0)
    for j in range(LANES):
        top = max(top, lane_max[j])
    cut = _lane_bound(lane_max, k, top)
    num = _candidates(values, cut, keys, places)
    high, found = np.int32(top + 1), num
    while found != k and high - cut > 1:
        middle = np.int32(cut + ((high - cut) >> 1))
        count = _count(keys, num, middle)
        if count >= k:
            cut, found = middle, count
        else:
            high = middle
    ties = k  # how many elements that equal the cut are taken; they matter only when too many reach it
    if found != k:
        ties = k - _count(keys, num, cut + np.int32(1))
    out = 0
    for i in range(num):
        if out < k:
            equal = keys[i] == cut
            take = (keys[i] > cut) | (equal & (ties > 0))
            positions[out] = places[i]
            out += int(take)
            ties -= int(equal & take)


@jit
def _candidates(values: Any, cut: Any, keys: Any, places: Any) -> int:
    """Magnitudes and positions, ascending, of all elements that reach the cut; returns how many."""
    num, whole = 0, len(values) & -64
    for i in range(0, whole, 64):
        word = mask_at_least(values, i, cut)
        while word != np.uint64(0):
            p = i + count_trailing_zeros(word)
            word &= word - np.uint64(1)
            keys[num] = float_bits(values[p]) & _MAGNITUDE
            places[num] = p
            num += 1
    for p in range(whole, len(values)):
        key = float_bits(values[p]) & _MAGNITUDE
        if key >= cut:
            keys[num] = key
            places[num] = p
            num += 1
    return num
