"""Fixed-width fields and Rice-coded gaps in numpy: the plain statement of the format's bit layout.

Bits fill each byte from the least significant one; streams are padded with zero bits to a whole byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dtrain.compression.errors import PayloadError

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

MAX_RICE = 16


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` fields of `width` bits take."""
    return (count * width + 7) // 8


def pack(values: Ints, width: int) -> bytes:
    """Write `values` [n], each below 2**width, as fields of `width` bits (0 to 16)."""
    if width == 0:
        return b""
    bits = (values[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).ravel(), bitorder="little").tobytes()


def unpack(data: Bytes, count: int, width: int) -> Ints:
    """Read `count` fields of `width` bits; `data` has exactly packed_bytes(count, width) bytes.

    Raises PayloadError "bad-padding" when the last byte's unused bits are not zero.
    """
    if width == 0:
        return np.zeros(count, np.int64)
    bits = np.unpackbits(data, bitorder="little")
    if bits[count * width :].any():
        raise PayloadError("bad-padding", "bits after the last field are not zero")
    fields = bits[: count * width].reshape(count, width).astype(np.int64)
    return np.asarray(fields @ (1 << np.arange(width, dtype=np.int64)), dtype=np.int64)


def rice_parameter(gaps: Ints) -> int:
    """The number of low bits r that makes sum(gap >> r) + n * (r + 1) least; the lowest such r.

    The cost is convex in r, so walking down from the top until it would rise finds it; kernels may start
    anywhere.
    """
    costs = [int((gaps >> r).sum()) + r * len(gaps) for r in range(MAX_RICE + 1)]
    return int(np.argmin(costs))


def pack_gaps(gaps: Ints, r: int) -> bytes:
    """Write gaps [n] >= 0: first every gap's low r bits as fields, then every gap >> r in unary (zeros, then
    a one).
    """
    ends = np.cumsum((gaps >> r) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    return pack(gaps & ((1 << r) - 1), r) + np.packbits(unary, bitorder="little").tobytes()


def unpack_gaps(data: Bytes, count: int, r: int) -> Ints:
    """Read `count` gaps that fill `data` exactly.

    Raises PayloadError: "bad-length" (low bits or ones missing, or bytes left over), "bad-padding".
    """
    split = packed_bytes(count, r)
    if len(data) < split:
        raise PayloadError("bad-length", f"{len(data)} bytes are too few for {count} gaps")
    low = unpack(data[:split], count, r)
    unary = np.unpackbits(data[split:], bitorder="little")
    ends = np.flatnonzero(unary)
    if len(ends) < count:
        raise PayloadError("bad-length", f"{len(ends)} gaps where {count} should be")
    used = int(ends[count - 1]) + 1 if count else 0
    if len(ends) > count:
        raise PayloadError("bad-padding", "bits after the last gap are not zero")
    if (used + 7) // 8 != len(data) - split:
        raise PayloadError("bad-length", "bytes left over after the last gap")
    return ((np.diff(ends, prepend=-1) - 1) << r) | low
