"""One group of chunks to bytes and back, in numpy: the plain statement of WIRE.md's "Group"."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dtrain.compression import bits, levels
from dtrain.compression.errors import PayloadError
from dtrain.compression.section import SectionFormat

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def pack(fmt: SectionFormat, number: int, positions: Ints, values: Floats) -> tuple[bytes, Floats]:
    """Write the kept `values` [n] at `positions` [n] (elements from the group's first, ascending).

    Returns (bytes, what a reader will make of them [n]).
    """
    first, end = fmt.layout.group_chunks(number)
    kept = fmt.kept[first:end]
    exponent, scale_codes, ratios, codes = _quantize(values, kept, fmt.value_bits)
    data = join(fmt, number, exponent, scale_codes, ratios, codes, positions)
    scale = levels.scales(exponent, scale_codes)
    return data, _values(codes, scale, ratios, kept, fmt.value_bits, 1.0)


def join(
    fmt: SectionFormat,
    number: int,
    exponent: int,
    scale_codes: Bytes,
    ratios: Bytes,
    codes: Ints,
    positions: Ints,
) -> bytes:
    """The bytes of a group from its parts; `positions` [n] from the group's first element."""
    gaps = _gaps(fmt, number, positions)
    r = bits.rice_parameter(gaps)
    head = bytes([exponent, r]) + scale_codes.tobytes() + (b"" if fmt.value_bits == 1 else ratios.tobytes())
    return head + bits.pack(codes, fmt.value_bits) + bits.pack_gaps(gaps, r)


class Fields(NamedTuple):
    """A group as it is written: scale, ratio [chunks]; codes, gaps [n]."""

    scale: Floats
    ratios: Bytes
    codes: Ints
    gaps: Ints


def unpack(fmt: SectionFormat, number: int, data: Bytes, weight: float = 1.0) -> tuple[Ints, Floats]:
    """Read a group: (positions [n] from the group's first element, weight * values [n] fp32).

    Raises PayloadError: those of `unpack_fields`, and "index-out-of-range".
    """
    first, end = fmt.layout.group_chunks(number)
    fields = unpack_fields(fmt, number, data)
    positions = positions_of(fmt, number, fields.gaps)
    return positions, _values(
        fields.codes, fields.scale, fields.ratios, fmt.kept[first:end], fmt.value_bits, weight
    )


def unpack_fields(fmt: SectionFormat, number: int, data: Bytes) -> Fields:
    """Take a group apart. Raises PayloadError: "bad-length", "bad-scale", "bad-rice", "bad-padding"."""
    first, end = fmt.layout.group_chunks(number)
    chunks, total = end - first, int(fmt.group_kept[number])
    fixed = int(fmt.fixed_bytes[number])
    if len(data) < fixed:
        raise PayloadError(
            "bad-length", f"group {number} has {len(data)} bytes, its values alone need {fixed}"
        )
    exponent, r = int(data[0]), int(data[1])
    if exponent and not levels.MIN_EXPONENT <= exponent <= levels.MAX_EXPONENT:
        raise PayloadError("bad-scale", f"group {number} names exponent {exponent}")
    if r > bits.MAX_RICE:
        raise PayloadError("bad-rice", f"group {number} names Rice parameter {r}")
    scale = levels.scales(exponent, data[2 : 2 + chunks])
    at = 2 + chunks
    ratios = np.zeros(chunks, np.uint8)
    if fmt.value_bits > 1:
        ratios, at = data[at : at + chunks], at + chunks
    codes = bits.unpack(data[at:fixed], total, fmt.value_bits)
    return Fields(scale, ratios, codes, bits.unpack_gaps(data[fixed:], total, r))


def _gaps(fmt: SectionFormat, number: int, positions: Ints) -> Ints:
    """Unkept positions before each kept one, counted from the kept one before it in the same chunk."""
    first, end = fmt.layout.group_chunks(number)
    gaps = np.diff(positions, prepend=-1) - 1
    heads = np.cumsum(fmt.kept[first:end]) - fmt.kept[first:end]
    chunk_starts = fmt.layout.offset[first:end] - fmt.layout.offset[first]
    gaps[heads] = positions[heads] - chunk_starts
    return gaps


def positions_of(fmt: SectionFormat, number: int, gaps: Ints) -> Ints:
    """Inverse of `_gaps`; no gap is so large that a sum could wrap (each is below 2**37)."""
    first, end = fmt.layout.group_chunks(number)
    kept = fmt.kept[first:end]
    heads = np.cumsum(kept) - kept
    running = np.cumsum(gaps + 1)
    before = running[heads] - gaps[heads] - 1
    within = running - 1 - np.repeat(before, kept)
    if (within[heads + kept - 1] >= fmt.layout.size[first:end]).any():
        raise PayloadError("index-out-of-range", f"group {number} has a position beyond its chunk's end")
    chunk_starts = fmt.layout.offset[first:end] - fmt.layout.offset[first]
    return np.asarray(within + np.repeat(chunk_starts, kept), dtype=np.int64)


def _quantize(values: Floats, kept: Ints, value_bits: int) -> tuple[int, Bytes, Bytes, Ints]:
    """(exponent, scale codes [chunks], ratios [chunks], codes [n]) for kept values of consecutive chunks."""
    magnitude = np.abs(values).astype(np.float64)
    heads = np.cumsum(kept) - kept
    sign = (values < 0).astype(np.int64)
    if value_bits <= 2:
        total = np.add.reduceat(magnitude, heads)
        high = magnitude >= np.repeat(total / kept, kept)
        num_high = np.add.reduceat(high.astype(np.int64), heads)
        total_high = np.add.reduceat(np.where(high, magnitude, 0.0), heads)
        tops = total / kept if value_bits == 1 else total_high / np.maximum(num_high, 1)
        bottoms = (total - total_high) / np.maximum(kept - num_high, 1)
        exponent, codes = levels.scale_codes(tops.astype(np.float32), value_bits)
        if value_bits == 1:
            return exponent, codes, np.zeros(len(kept), np.uint8), sign
        ratio = np.rint(_relative(bottoms, levels.scales(exponent, codes)))
        return exponent, codes, np.minimum(ratio, 255).astype(np.uint8), sign | high.astype(np.int64) << 1
    largest = np.maximum.reduceat(np.abs(values), heads)
    exponent, codes = levels.scale_codes(largest, value_bits)
    scale = levels.scales(exponent, codes)
    bottoms = np.minimum.reduceat(magnitude, heads)
    ratio = np.minimum(np.floor(_relative(bottoms, scale)), 255)
    num_levels = 1 << (value_bits - 1)
    above = _relative(magnitude, np.repeat(scale, kept)) - np.repeat(ratio, kept)
    level = np.floor(above * (num_levels / (256 - np.repeat(ratio, kept))))
    level = np.clip(level, 0, num_levels - 1).astype(np.int64)
    return exponent, codes, ratio.astype(np.uint8), sign | level << 1


def _relative(magnitude: npt.NDArray[np.float64], scale: Floats) -> npt.NDArray[np.float64]:
    """magnitude / scale in 256ths, 0 where the scale is 0."""
    divisor = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)
    return np.where(scale > 0, magnitude * 256 / divisor, 0.0)


def _values(codes: Ints, scale: Floats, ratios: Bytes, kept: Ints, value_bits: int, weight: float) -> Floats:
    n = levels.numerators(codes, np.repeat(ratios.astype(np.int64), kept), value_bits)
    return levels.dequantize(n, np.repeat(scale, kept), value_bits, weight)
