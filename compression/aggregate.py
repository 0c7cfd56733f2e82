"""Parts of the codec that concern spans and aggregates: who contributed, with what weight, which chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dtrain.compression import wire
from dtrain.compression.errors import CompressionError, PayloadError
from dtrain.compression.layout import Layout

Ints = npt.NDArray[np.int64]


def check_contributors(contributors: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The list itself if it can be written: ascending indices, weights in range; else CompressionError."""
    if not contributors:
        raise CompressionError("nothing to reduce: no contributor")
    for position, (index, weight) in enumerate(contributors):
        if not 0 <= index <= wire.MAX_CONTRIBUTORS or (position and index == contributors[position - 1][0]):
            raise CompressionError(f"contributor index {index} is out of range or given twice")
        if not wire.MIN_WEIGHT <= weight <= wire.MAX_WEIGHT:
            raise CompressionError(f"contributor {index}'s weight {weight} is not in 1e-9 to 1e15")
    return contributors


def check_refused(refused: Mapping[int, str], contributors: Sequence[tuple[int, float]]) -> None:
    """CompressionError unless these are reasons that exist, of others than the contributors."""
    for index, reason in refused.items():
        if (
            reason not in wire.REFUSALS
            or not 0 <= index <= wire.MAX_CONTRIBUTORS
            or index in dict(contributors)
        ):
            raise CompressionError(f"contributor {index} cannot be refused as {reason!r}")


def check_members(named: Sequence[int], num_members: int) -> None:
    """Raise PayloadError "bad-contributors" when an index is not one of the group's."""
    if max(named) >= num_members:
        raise PayloadError("bad-contributors", f"index {max(named)} in a group of {num_members}")


def normalized(contributors: Sequence[tuple[int, float]]) -> list[float]:
    """Each weight over the sum of all, rounded to fp32: computed in one way on every machine."""
    total = math.fsum(weight for _, weight in contributors)
    return [float(np.float32(weight / total)) for _, weight in contributors]


def split_union(body: memoryview, count: int) -> list[memoryview]:
    """The `count` sealed payloads of a union's body. Raises PayloadError "bad-length"."""
    sections = []
    for _ in range(count):
        length = wire.section_length(body)
        sections.append(body[:length])
        body = body[length:]
    if len(body):
        raise PayloadError("bad-length", f"{len(body)} bytes left over after the last section")
    return sections


def check_range(layout: Layout, first_chunk: int, num_chunks: int) -> None:
    """Raise PayloadError "wrong-range" unless the header's range exists and lies on boundaries."""
    try:
        layout.split(first_chunk, num_chunks)
    except CompressionError as error:
        raise PayloadError("wrong-range", str(error)) from None


def check_disjoint(covered: list[tuple[int, int]], first_chunk: int, num_chunks: int) -> None:
    """Note a span as covered. Raises CompressionError when it overlaps one before it."""
    for first, count in covered:
        if first < first_chunk + num_chunks and first_chunk < first + count:
            raise CompressionError(
                f"aggregates overlap at chunks {first_chunk} + {num_chunks} and {first} + {count}"
            )
    covered.append((first_chunk, num_chunks))


def spans(layout: Layout, unit_bits: Ints, shares: Sequence[float]) -> list[tuple[int, int]]:
    """(first chunk, number of chunks) per share; `unit_bits` [groups + dense chunks] is each unit's nominal
    size.
    """
    if not shares or not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise CompressionError(f"shares must be numbers from 0 up, at least one above 0, not {list(shares)}")
    edges = np.concatenate(
        [layout.group_edges, np.arange(layout.num_sparse + 1, layout.num_chunks + 1, dtype=np.int64)]
    )
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(unit_bits)])
    total, bits = math.fsum(shares), int(before[-1])
    last = max(i for i, share in enumerate(shares) if share > 0)
    found, begin, sum_so_far = [], 0, 0.0
    for i, share in enumerate(shares):
        sum_so_far += share
        target = bits if i >= last else min(bits, math.floor(sum_so_far / total * bits + 0.5))
        unit = int(np.searchsorted(before, target))
        if unit and target - before[unit - 1] < before[unit] - target:
            unit -= 1
        end = max(begin, int(edges[unit]))
        found.append((begin, end - begin))
        begin = end
    return found
