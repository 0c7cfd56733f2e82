"""Exact top-k of a chunk without sorting.

Lanes, 512 for small k, keep the largest magnitude of every 512th element; that costs little while the chunk is
written. Magnitudes are compared as the integers of their bits. Bisection on the lanes alone finds a bound that at
least k of them, and hardly more, reach; so at least k elements reach it, too. A pass of vector comparisons turns
the elements that do into a bitmap, which yields a few more than k candidates in ascending order, and bisection
among those the exact cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression.kernels.cpu_tools import count_trailing_zeros, float_bits, jit
from dtrain.compression.kernels.cpu_vector import LANES as STEP
from dtrain.compression.kernels.cpu_vector import fold_step, mask_at_least, prefetch_row, scan_step

MIN_LANES, MAX_LANES = 512, 4096
_MAGNITUDE = np.int32(0x7FFFFFFF)
_FIRST_STEP = 1 << 18  # in units of the last place: 3 %


def num_lanes(k: int) -> int:
    """A power of two: with 8 lanes to every kept coefficient, few more than k elements reach the lanes' bound."""
    return max(MIN_LANES, min(MAX_LANES, 1 << (8 * k - 1).bit_length()))


@jit
def fold(
    values: Any, source: Any, stride: int, decay: Any, lane_max: Any, following: int, next_stride: int
) -> None:
    """values <- decay * values + source, [n] fp32; source is rows of 64, `stride` apart. Fills lane_max
    [512].

    following, next_stride: address of what is folded next, its rows apart. Hardware doesn't foresee rows of a
    block that lie pages apart, so they are asked for here, one chunk ahead; 0 asks for nothing.
    """
    last = len(lane_max) - 1
    for j in range(len(lane_max)):
        lane_max[j] = np.int32(-1)
    whole = len(values) & -64
    for i in range(0, whole, 64):
        row, lane = (i >> 6) * stride, i & last
        if following != 0:
            prefetch_row(following + (i >> 6) * next_stride * 4)
        for j in range(0, 64, STEP):
            fold_step(values, i + j, source, row + j, lane_max, lane + j, decay)
    for i in range(whole, len(values)):  # only a short run can have a rest, and runs are contiguous
        values[i] = values[i] * decay + source[i]
        lane_max[i & last] = max(lane_max[i & last], float_bits(values[i]) & _MAGNITUDE)


@jit
def scan(values: Any, lane_max: Any) -> None:
    """Fill lane_max [a power of two >= 512] from values [n] as they are."""
    last = len(lane_max) - 1
    for j in range(len(lane_max)):
        lane_max[j] = np.int32(-1)
    whole = len(values) & -64
    for i in range(0, whole, STEP):
        scan_step(values, i, lane_max, i & last)
    for i in range(whole, len(values)):
        lane_max[i & last] = max(lane_max[i & last], float_bits(values[i]) & _MAGNITUDE)


@jit
def _count(keys: Any, n: int, cut: Any) -> int:
    found = np.int32(0)
    for i in range(n):
        found += np.int32(keys[i] >= cut)
    return int(found)


@jit
def _lane_bound(lane_max: Any, k: int, top: Any, guess: Any) -> Any:
    """A magnitude that at least k lanes reach, if possible no more than k + k / 8; 0 when fewer than k are in
    use.
    """
    lanes = len(lane_max)
    if k > lanes or _count(lane_max, lanes, np.int32(0)) < k:
        return np.int32(0)
    low, high, enough = np.int64(0), np.int64(top) + 1, k + (k >> 3)
    step = np.int64(_FIRST_STEP) if guess > 0 else high
    middle = min(np.int64(guess), high - 1) if guess > 0 else high >> 1
    while high - low > 1:
        found = _count(lane_max, lanes, np.int32(middle))
        if found < k:
            high = middle
            middle -= step
        elif found > enough:
            low = middle
            middle += step
        else:
            return np.int32(middle)
        step *= 4
        if not low < middle < high:  # away from the guess in growing steps, then bisection
            middle = low + ((high - low) >> 1)
    return np.int32(low)


@jit
def select(values: Any, k: int, lane_max: Any, guess: Any, keys: Any, places: Any, positions: Any) -> Any:
    """Write the ascending positions of the k largest magnitudes of values [n] into positions [k + 1].

    Equal magnitudes: lowest position first. lane_max: as `fold` or `scan` left it. Scratch: keys, places [n +
    2]. guess: what the last call returned, or 0; it saves time when chunks are alike and changes nothing
    else.
    """
    top = np.int32(0)
    for j in range(len(lane_max)):
        top = max(top, lane_max[j])
    bound = _lane_bound(lane_max, k, top, guess)
    num = _candidates(values, bound, places)
    for i in range(num):
        keys[i] = float_bits(values[np.uint64(places[i])]) & _MAGNITUDE
    cut, high, found = bound, np.int32(top + 1), num
    while found != k and high - cut > 1:
        middle = np.int32(cut + ((high - cut) >> 1))
        count = _count(keys, num, middle)
        if count >= k:
            cut, found = middle, count
        else:
            high = middle
    if found == k:
        out = np.uint64(0)
        for i in range(num):
            positions[out] = places[i]
            out += np.uint64(keys[i] >= cut)
        return bound
    _take(keys, places, num, cut, k, positions)
    return bound


@jit
def _take(keys: Any, places: Any, num: int, cut: Any, k: int, positions: Any) -> None:
    """Positions of the keys above the cut and of so many of those that equal it, from the first, that there
    are k.
    """
    ties, out = k - _count(keys, num, cut + np.int32(1)), 0
    for i in range(num):
        if keys[i] > cut or (keys[i] == cut and ties > 0):
            ties -= int(keys[i] == cut)
            positions[out] = places[i]
            out += 1


@jit
def _candidates(values: Any, cut: Any, places: Any) -> int:
    """Ascending positions of all elements that reach the cut; returns how many. Two places beyond are
    overwritten.
    """
    num, whole, one = np.uint64(0), len(values) & -64, np.uint64(1)
    for i in range(0, whole, 64):
        word = mask_at_least(values, i, cut)
        # Hardly any word has more than two ones where k is small: the first two are taken without a branch.
        for _ in range(2):
            places[num] = i + count_trailing_zeros(word | (one << np.uint64(63)))
            num += np.uint64(word != np.uint64(0))
            word &= word - one
        while word != np.uint64(0):
            places[num] = i + count_trailing_zeros(word)
            num += one
            word &= word - one
    for p in range(whole, len(values)):
        places[num] = p
        num += np.uint64((float_bits(values[p]) & _MAGNITUDE) >= cut)
    return int(num)
