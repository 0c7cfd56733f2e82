"""Bytes to values in numba: check groups, add them to values in chunk order, or decode several sections at
once.

The loops are built by functions for the reasons that cpu_encode.py gives. Sections are passed as an address
and a number of bytes, since numba would compile everything twice for arrays that may and may not be written
to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dtrain.compression.kernels import cpu_dct
from dtrain.compression.kernels.cpu_read import GOOD, add_chunk, group_bytes, read_codes, read_positions
from dtrain.compression.kernels.cpu_tools import byte_pointer, carray, claim, float_pointer, jit, jit_on_disk
from dtrain.compression.kernels.cpu_vector import clear_row, fence, stream_row
from dtrain.compression.kernels.cpu_write import PAD
from dtrain.compression.layout import MAX_GROUP_CHUNKS


@jit
def _most_kept(plan: Any, first_group: int, end_group: int) -> int:
    """Coefficients of the largest of these groups."""
    most = np.int64(0)
    for g in range(first_group, end_group):
        most = max(most, plan.group_kept[g])
    return int(most)


@jit
def _store(values: Any, address: int, stride: int, size: int) -> None:
    """Write a chunk's values [size] to memory: rows of 64, `stride` apart."""
    rest = np.int64(0)
    if address % 32 == 0 and stride % 8 == 0:
        for i in range(size >> 6):
            stream_row(values, i * 64, address + 4 * i * stride)
        rest = size & -64
    target = carray(float_pointer(address), (size if stride == 64 else 63 * stride + 64,))
    for i in range(rest, size):
        target[(i >> 6) * stride + (i & 63)] = values[i]


def build_check_and_add(sources: str) -> tuple[Callable[..., int], Callable[..., int]]:
    """Compile the two loops that need no transform."""

    @jit_on_disk
    def check(
        plan: Any, parts: Any, counter: Any, address: int, num_bytes: int, bounds: Any,
        section_group: int, bad: Any,
    ) -> int:  # fmt: skip
        """Read the positions of groups, whose bytes are at address + bounds [groups of the section + 1].

        parts [parts + 1]: edges in groups, of which this call takes those that `counter` still has; section_group:
        the section's first group. Returns an index into REASONS; bad[0] <- the group in
        question.
        """
        _ = sources
        data = carray(byte_pointer(address), (num_bytes,))
        most = _most_kept(plan, parts[0], parts[-1])
        positions, low = np.empty(most + PAD, np.int32), np.empty(most + PAD, np.int32)
        while True:
            part = claim(counter)
            if part >= len(parts) - 1:
                break
            for g in range(parts[part], parts[part + 1]):
                a, b = plan.group_edges[g], plan.group_edges[g + 1]
                group = group_bytes(data, bounds[g - section_group], bounds[g - section_group + 1])
                found = read_positions(
                    group,
                    plan.kept[a:b],
                    plan.size[a:b],
                    plan.fixed_bytes[g],
                    plan.value_bits,
                    positions,
                    low,
                )
                if found != GOOD:
                    bad[0] = g
                    return found  # type: ignore[no-any-return]
        return GOOD

    @jit_on_disk
    def add(
        plan: Any, parts: Any, counter: Any, address: int, num_bytes: int, bounds: Any,
        section_group: int, weight: Any, values: Any, base: int, bad: Any,
    ) -> int:  # fmt: skip
        """values (from element `base` on) <- values + weight * groups; else as `check`."""
        _ = sources
        data = carray(byte_pointer(address), (num_bytes,))
        most = _most_kept(plan, parts[0], parts[-1])
        positions, fields = np.empty(most + PAD, np.int32), np.empty(most + PAD, np.int32)
        table = np.empty(4, np.float32)
        while True:
            part = claim(counter)
            if part >= len(parts) - 1:
                break
            for g in range(parts[part], parts[part + 1]):
                a, b = plan.group_edges[g], plan.group_edges[g + 1]
                group = group_bytes(data, bounds[g - section_group], bounds[g - section_group + 1])
                found = read_positions(
                    group,
                    plan.kept[a:b],
                    plan.size[a:b],
                    plan.fixed_bytes[g],
                    plan.value_bits,
                    positions,
                    fields,
                )
                if found != GOOD:
                    bad[0] = g
                    return found  # type: ignore[no-any-return]
                read_codes(group, b - a, plan.group_kept[g], plan.value_bits, fields)
                first = np.int64(0)
                for c in range(a, b):
                    chunk = values[plan.offset[c] - base : plan.offset[c + 1] - base]
                    add_chunk(
                        group,
                        c - a,
                        b - a,
                        first,
                        plan.kept[c],
                        weight,
                        plan.value_bits,
                        positions,
                        fields,
                        table,
                        chunk,
                    )
                    first += plan.kept[c]
        return GOOD

    return check, add


def build_decode(sources: str, use_dct: bool) -> Callable[..., int]:
    """Compile the loop that decodes."""

    @jit_on_disk
    def decode(
        plan: Any, parts: Any, counter: Any, data_addresses: Any, data_sizes: Any, bounds: Any,
        section_group: int, weights: Any, addresses: Any, bad: Any,
    ) -> int:  # fmt: skip
        """Write the weighted sum of several sections' groups to the chunks' `addresses`; else as `check`.

        data_addresses, data_sizes [sections]: their bytes; bounds [sections, groups + 1]; weights [sections].
        """
        _ = sources
        most = _most_kept(plan, parts[0], parts[-1])
        positions = np.empty((len(weights), most + PAD), np.int32)
        fields = np.empty((len(weights), most + PAD), np.int32)
        heads = np.empty((len(weights), 2 + 2 * MAX_GROUP_CHUNKS), np.uint8)
        table = np.empty(4, np.float32)
        longest = np.int64(0)
        for c in range(plan.group_edges[parts[0]], plan.group_edges[parts[-1]]):
            longest = max(longest, plan.size[c])
        sums, result = np.empty(longest + 64, np.float32), np.empty((64, 64), np.float32)
        while True:
            part = claim(counter)
            if part >= len(parts) - 1:
                break
            for g in range(parts[part], parts[part + 1]):
                a, b = plan.group_edges[g], plan.group_edges[g + 1]
                for s in range(len(weights)):
                    data = carray(byte_pointer(data_addresses[s]), (data_sizes[s],))
                    group = group_bytes(data, bounds[s, g - section_group], bounds[s, g - section_group + 1])
                    found = read_positions(
                        group, plan.kept[a:b], plan.size[a:b], plan.fixed_bytes[g], plan.value_bits, positions[s],
                        fields[s],
                    )  # fmt: skip
                    if found != GOOD:
                        bad[0] = g
                        return found  # type: ignore[no-any-return]
                    read_codes(group, b - a, plan.group_kept[g], plan.value_bits, fields[s])
                    for i in range(min(len(group), heads.shape[1])):
                        heads[s, i] = group[i]
                first = np.int64(0)
                for c in range(a, b):
                    size = plan.size[c]
                    for i in range(0, size, 64):
                        clear_row(sums, i)
                    for s in range(len(weights)):
                        add_chunk(
                            heads[s], c - a, b - a, first, plan.kept[c], weights[s], plan.value_bits, positions[s],
                            fields[s], table, sums,
                        )  # fmt: skip
                    first += plan.kept[c]
                    if use_dct and size == 4096:
                        cpu_dct.inverse(sums[:4096].reshape(64, 64), result)
                        _store(result.ravel(), addresses[c], plan.stride[c], size)
                    else:
                        _store(sums, addresses[c], plan.stride[c], size)
        fence()
        return GOOD

    return decode
