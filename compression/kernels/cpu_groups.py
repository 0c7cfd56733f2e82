"""Whole ranges of groups in numba: the four loops that `CpuKernel` runs, each without the GIL.

They are built by a function so that numba's cache on disk, which looks only at one file and at captured values, is
keyed by the text of every file that they call into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from dtrain.compression.kernels import cpu_dct
from dtrain.compression.kernels.cpu_read import GOOD, add_chunk, read_positions
from dtrain.compression.kernels.cpu_select import LANES, fold, scan, select
from dtrain.compression.kernels.cpu_tools import byte_pointer, float_pointer, jit
from dtrain.compression.kernels.cpu_write import (
    group_exponent,
    measure,
    quantize,
    ratio_of,
    rice_parameter,
    scale_bits,
    scale_code,
    scale_value,
    write_fields,
    write_gaps,
)


class Loops(NamedTuple):
    """The compiled loops; see the functions of the same names below."""

    write: Callable[..., int]
    check: Callable[..., int]
    add: Callable[..., int]
    decode: Callable[..., int]


@jit
def _write_group(
    values: Any, edges: Any, kept: Any, picked: Any, positions: Any, gaps: Any, codes: Any, sent: Any, bits: Any,
    stats: Any, value_bits: int, out: Any, at: int,
) -> int:  # fmt: skip
    """Write one group of chunks whose selection is known and subtract what was written; returns the byte after it.

    values: fp32 of the group, chunk c at edges[c] to edges[c + 1]; picked, positions: kept values and where they are
    in their chunk, all chunks one after another.
    """
    num_chunks = len(kept)
    first = 0
    for c in range(num_chunks):
        k = kept[c]
        top, stats[c, 0], stats[c, 1] = measure(picked[first : first + k], value_bits)
        bits[c] = scale_bits(top, value_bits)
        before = -1
        for i in range(first, first + k):
            gaps[i] = positions[i] - before - 1
            before = positions[i]
        first += k
    total = first
    exponent = group_exponent(bits, num_chunks)
    start = at
    out[at] = np.uint8(exponent)
    at += 2
    first = 0
    for c in range(num_chunks):
        k = kept[c]
        code = scale_code(bits[c], exponent)
        scale = scale_value(code, exponent)
        ratio = ratio_of(stats[c, 0], scale, value_bits)
        out[at + c] = np.uint8(code)
        if value_bits > 1:
            out[at + num_chunks + c] = np.uint8(ratio)
        span = slice(first, first + k)
        quantize(picked[span], scale, ratio, stats[c, 1], value_bits, codes[span], sent[span])
        base = edges[c] - edges[0]
        for i in range(first, first + k):
            values[base + positions[i]] = picked[i] - sent[i]
        first += k
    at += num_chunks if value_bits == 1 else 2 * num_chunks
    at = write_fields(out, at, codes, total, value_bits)
    r = rice_parameter(gaps, total)
    out[start + 1] = np.uint8(r)
    return write_gaps(out, at, gaps, total, r)


def build(sources: str) -> Loops:
    """Compile the loops; `sources` stands for the text of everything they are made of."""

    @njit(nogil=True, error_model="numpy", cache=True)
    def write(
        first_group: int, end_group: int, group_edges: Any, offset: Any, kept: Any, addresses: Any, strides: Any,
        dct: bool, secants: Any, norm: Any, values: Any, base: int, decay: Any, value_bits: int, out: Any, lengths: Any,
    ) -> int:  # fmt: skip
        """Fold (unless `addresses` is empty), select and write groups one after another into `out`.

        addresses [chunks]: where each chunk's fp32 elements begin in memory, strides [chunks] its rows; values: the
        feedback from element `base` on; lengths: by group number. Returns the bytes written.
        """
        _ = sources
        largest, longest, most = 0, 0, 0
        for g in range(first_group, end_group):
            a, b = group_edges[g], group_edges[g + 1]
            total = 0
            for c in range(a, b):
                total += kept[c]
                longest = max(longest, offset[c + 1] - offset[c])
            largest, most = max(largest, total), max(most, b - a)
        lane_max = np.empty(LANES, np.int32)
        keys, places = np.empty(longest, np.int32), np.empty(longest, np.int32)
        positions, gaps, codes = np.empty(largest, np.int32), np.empty(largest, np.int32), np.empty(largest, np.int32)
        picked, sent = np.empty(largest, np.float32), np.empty(largest, np.float32)
        bits, stats = np.empty(most, np.int64), np.empty((most, 2), np.float64)
        block, coefficients = np.empty((64, 64), np.float32), np.empty((64, 64), np.float32)
        at = 0
        for g in range(first_group, end_group):
            a, b = group_edges[g], group_edges[g + 1]
            done = 0
            for c in range(a, b):
                chunk = values[offset[c] - base : offset[c + 1] - base]
                if len(addresses) == 0:
                    scan(chunk, lane_max)
                elif dct and len(chunk) == 4096:
                    source = carray(float_pointer(addresses[c]), (63 * strides[c] + 64,))
                    for i in range(64):
                        row = source[i * strides[c] : i * strides[c] + 64]
                        for j in range(64):
                            block[i, j] = row[j]
                    cpu_dct.forward(block, coefficients, secants, norm)
                    fold(chunk, coefficients.ravel(), 64, decay, lane_max)
                else:
                    length = len(chunk) if strides[c] == 64 else 63 * strides[c] + 64
                    source = carray(float_pointer(addresses[c]), (length,))
                    fold(chunk, source, strides[c], decay, lane_max)
                k = kept[c]
                mine = positions[done : done + k]
                select(chunk, k, lane_max, keys, places, mine)
                for i in range(k):
                    picked[done + i] = chunk[mine[i]]
                done += k
            before = at
            at = _write_group(
                values[offset[a] - base : offset[b] - base], offset[a : b + 1], kept[a:b], picked, positions, gaps,
                codes, sent, bits, stats, value_bits, out, at,
            )  # fmt: skip
            lengths[g] = at - before
        return at

    @njit(nogil=True, error_model="numpy", cache=True)
    def check(
        first_group: int, end_group: int, group_edges: Any, kept: Any, sizes: Any, fixed: Any, value_bits: int,
        data: Any, bounds: Any, section_group: int, bad: Any,
    ) -> int:  # fmt: skip
        """Read the positions of groups in data[bounds]. Returns an index into REASONS, bad[0] <- the group."""
        _ = sources
        positions = _positions_for(first_group, end_group, group_edges, kept)
        for g in range(first_group, end_group):
            a, b = group_edges[g], group_edges[g + 1]
            i = g - section_group
            found = read_positions(
                data, bounds[i], bounds[i + 1], kept[a:b], sizes[a:b], b - a, fixed[g], value_bits, positions
            )
            if found != GOOD:
                bad[0] = g
                return found
        return GOOD

    @njit(nogil=True, error_model="numpy", cache=True)
    def add(
        first_group: int, end_group: int, group_edges: Any, offset: Any, kept: Any, sizes: Any, fixed: Any,
        value_bits: int, data: Any, bounds: Any, section_group: int, weight: Any, values: Any, base: int, bad: Any,
    ) -> int:  # fmt: skip
        """values (from element `base`) <- values + weight * groups; else as `check`."""
        _ = sources
        positions = _positions_for(first_group, end_group, group_edges, kept)
        for g in range(first_group, end_group):
            a, b = group_edges[g], group_edges[g + 1]
            begin, end = bounds[g - section_group], bounds[g - section_group + 1]
            found = read_positions(data, begin, end, kept[a:b], sizes[a:b], b - a, fixed[g], value_bits, positions)
            if found != GOOD:
                bad[0] = g
                return found
            first = 0
            for c in range(a, b):
                chunk = values[offset[c] - base : offset[c + 1] - base]
                add_chunk(data, begin, end, c - a, first, kept[c], b - a, weight, value_bits, positions, chunk, 64)
                first += kept[c]
        return GOOD

    @njit(nogil=True, error_model="numpy", cache=True)
    def decode(
        first_group: int, end_group: int, group_edges: Any, kept: Any, sizes: Any, fixed: Any, value_bits: int,
        data_addresses: Any, data_sizes: Any, bounds: Any, section_group: int, weights: Any, addresses: Any,
        strides: Any, dct: bool, secants: Any, norm: Any, bad: Any,
    ) -> int:  # fmt: skip
        """Write the weighted sum of several sections' groups to the chunks' memory; else as `check`.

        data_addresses, data_sizes [sections]: their bytes; bounds [sections, groups + 1]; weights [sections].
        """
        _ = sources
        positions = _positions_for(first_group, end_group, group_edges, kept)
        most = 1
        for g in range(first_group, end_group):
            most = max(most, group_edges[g + 1] - group_edges[g])
        tile = np.empty((most if dct else 1, 64, 64), np.float32)
        result = np.empty((64, 64), np.float32)
        for g in range(first_group, end_group):
            a, b = group_edges[g], group_edges[g + 1]
            for c in range(a, b):
                _clear(_target(addresses[c], strides[c], sizes[c], dct, tile, c - a), strides[c], sizes[c], dct)
            for s in range(len(weights)):
                data = carray(byte_pointer(data_addresses[s]), (data_sizes[s],))
                begin, end = bounds[s, g - section_group], bounds[s, g - section_group + 1]
                found = read_positions(data, begin, end, kept[a:b], sizes[a:b], b - a, fixed[g], value_bits, positions)
                if found != GOOD:
                    bad[0] = g
                    return found
                first = 0
                for c in range(a, b):
                    target = _target(addresses[c], strides[c], sizes[c], dct, tile, c - a)
                    stride = 64 if dct else strides[c]
                    add_chunk(
                        data, begin, end, c - a, first, kept[c], b - a, weights[s], value_bits, positions, target, stride
                    )
                    first += kept[c]
            if dct:
                for c in range(a, b):
                    if sizes[c] == 4096:
                        cpu_dct.inverse(tile[c - a], result, secants, norm)
                        target = carray(float_pointer(addresses[c]), (63 * strides[c] + 64,))
                        for i in range(64):
                            row = target[i * strides[c] : i * strides[c] + 64]
                            for j in range(64):
                                row[j] = result[i, j]
        return GOOD

    return Loops(write, check, add, decode)


@jit
def _positions_for(first_group: int, end_group: int, group_edges: Any, kept: Any) -> Any:
    """Room for the positions of the largest of these groups."""
    largest = 0
    for g in range(first_group, end_group):
        total = 0
        for c in range(group_edges[g], group_edges[g + 1]):
            total += kept[c]
        largest = max(largest, total)
    return np.empty(largest, np.int32)


@jit
def _target(address: int, stride: int, size: int, dct: bool, tile: Any, number: int) -> Any:
    """Where a chunk's values are summed: a tile of coefficients, or the output itself."""
    if dct and size == 4096:
        return tile[number].ravel()
    return carray(float_pointer(address), (size if stride == 64 else 63 * stride + 64,))


@jit
def _clear(target: Any, stride: int, size: int, dct: bool) -> None:
    if stride == 64 or dct:
        target[:size] = np.float32(0)
        return
    for i in range(64):
        target[i * stride : i * stride + 64] = np.float32(0)
