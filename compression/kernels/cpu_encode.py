"""Groups of chunks to bytes in numba: fold, select, quantize and pack, each chunk while it is in the cache.

The loop is built by a function so that numba's cache on disk, which looks only at one file and at captured
values, is keyed by the text of every file that it calls into, and so that the transform is compiled only
where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.compression.kernels import cpu_dct
from dtrain.compression.kernels.cpu_select import fold, scan, select
from dtrain.compression.kernels.cpu_tools import carray, claim, float_pointer, jit, jit_on_disk
from dtrain.compression.kernels.cpu_write import (
    PAD,
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


@jit
def _write_group(
    values: Any, edges: Any, kept: Any, picked: Any, positions: Any, gaps: Any, codes: Any, sent: Any,
    bits: Any, stats: Any, value_bits: int, out: Any, at: int,
) -> int:  # fmt: skip
    """Write a group whose selection is known, subtract what was written; returns the byte after it.

    values: fp32 of the group, chunk c at edges[c] to edges[c + 1] (less edges[0]); picked, positions: kept
    values and where they are in their chunk, all chunks one after another; gaps, codes, sent, bits, stats:
    scratch.
    """
    num_chunks = len(kept)
    first = np.int64(0)
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
    first = np.int64(0)
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


def build_write(sources: str, use_dct: bool) -> Callable[..., None]:
    """Compile the loop; `sources` stands for the text of everything it is made of."""

    @jit_on_disk
    def write(
        plan: Any, parts: Any, counter: Any, addresses: Any, values: Any,
        base: int, decay: Any, num_lanes: int, out: Any, starts: Any, lengths: Any,
    ) -> None:  # fmt: skip
        """Fold (unless `addresses` is empty), select and write the groups of every part that `counter` still has.

        parts [parts + 1]: edges in groups; starts [parts]: where each begins in `out`; addresses [chunks of all
        parts]: where each chunk's fp32 elements begin in memory; values: the feedback from element `base` on;
        lengths: by group number, filled here.
        """
        _ = sources
        first_group, end_group = parts[0], parts[-1]
        source_chunk, end_chunk = plan.group_edges[first_group], plan.group_edges[end_group]
        largest, longest, most = 0, 0, 0
        for g in range(first_group, end_group):
            largest = max(largest, plan.group_kept[g])
            most = max(most, plan.group_edges[g + 1] - plan.group_edges[g])
        for c in range(source_chunk, end_chunk):
            longest = max(longest, plan.size[c])
        lane_max = np.empty(num_lanes, np.int32)
        keys, places = np.empty(longest + 2, np.int32), np.empty(longest + 2, np.int32)
        positions, picked = np.empty(largest + 1, np.int32), np.empty(largest, np.float32)
        gaps, codes = np.empty(largest + PAD, np.int32), np.empty(largest + PAD, np.int32)
        sent, bits, stats = (
            np.empty(largest, np.float32),
            np.empty(most, np.int64),
            np.empty((most, 2), np.float64),
        )
        block, coefficients = np.empty((64, 64), np.float32), np.empty((64, 64), np.float32)
        guess = np.int32(0)
        while True:
            part = claim(counter)
            if part >= len(starts):
                return
            at = starts[part]
            for g in range(parts[part], parts[part + 1]):
                a, b = plan.group_edges[g], plan.group_edges[g + 1]
                done = np.int64(0)
                for c in range(a, b):
                    chunk, stride = values[plan.offset[c] - base : plan.offset[c + 1] - base], plan.stride[c]
                    if len(addresses) == 0:
                        scan(chunk, lane_max)
                    else:
                        length = len(chunk) if stride == 64 else 63 * stride + 64
                        source = carray(float_pointer(addresses[c - source_chunk]), (length,))
                        following, apart = np.int64(0), np.int64(0)
                        if c + 1 < end_chunk and plan.stride[c + 1] != 64:
                            following, apart = addresses[c + 1 - source_chunk], plan.stride[c + 1]
                        if use_dct and len(chunk) == 4096:
                            cpu_dct.load(source, stride, block, following, apart)
                            cpu_dct.forward(block, coefficients)
                            fold(chunk, coefficients.ravel(), 64, decay, lane_max, 0, 0)
                        else:
                            fold(chunk, source, stride, decay, lane_max, following, apart)
                    k = plan.kept[c]
                    mine = positions[done : done + k + 1]
                    guess = select(chunk, k, lane_max, guess, keys, places, mine)
                    for i in range(k):
                        picked[done + i] = chunk[mine[i]]
                    done += k
                before = at
                at = _write_group(
                    values[plan.offset[a] - base : plan.offset[b] - base], plan.offset[a : b + 1], plan.kept[a:b],
                    picked, positions, gaps, codes, sent, bits, stats, plan.value_bits, out, at,
                )  # fmt: skip
                lengths[g] = at - before

    return write
