"""64 x 64 DCT in numba: the butterflies of dct.py in the same order, in place, on rows of 64 at a time.

Butterflies run in place, so frequencies end in bit-reversed order; the last pass puts them right, scales them
and transposes. Same operations, same order, no fused multiply-add: the bits equal those of dct.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dtrain.compression import dct
from dtrain.compression.kernels.cpu_tools import jit
from dtrain.compression.kernels.cpu_vector import prefetch_row

SIDE = dct.SIDE
REVERSED = np.asarray([int(f"{f:06b}"[::-1], 2) for f in range(SIDE)], dtype=np.int64)


def half_secants() -> Any:
    """Factors of all butterflies: those of length n from n // 2 on, [64] fp32."""
    table = np.zeros(SIDE, np.float32)
    for n in (2, 4, 8, 16, 32, 64):
        table[n // 2 : n] = dct.half_secants(n)
    return table


def norms() -> Any:
    """Scales of the 64 frequencies, fp32."""
    return np.asarray(dct.norms(), dtype=np.float32)


@jit
def load(source: Any, stride: int, block: Any, following: int, next_stride: int) -> None:
    """block [64, 64] <- rows of 64 from source, `stride` apart; asks for the next block as `fold` does."""
    for i in range(SIDE):
        row, target = source[i * stride : i * stride + SIDE], block[i]
        if following != 0:
            prefetch_row(following + i * next_stride * 4)
        for j in range(SIDE):
            target[j] = row[j]


@jit
def forward(block: Any, out: Any, secants: Any, norm: Any) -> None:
    """out [64, 64] <- coefficients of block [64, 64], in dct.forward's order; block is overwritten."""
    _columns(block, secants)
    _untangle(block, out, norm)
    _columns(out, secants)
    _scale_rows(out, block, norm)
    _copy(block, out)


@jit
def inverse(block: Any, out: Any, secants: Any, norm: Any) -> None:
    """out [64, 64] <- elements from the coefficients in block [64, 64], which is overwritten."""
    _tangle(block, out, norm)
    _inverse_columns(out, secants)
    _transpose(out, block)
    _tangle(block, out, norm)
    _inverse_columns(out, secants)


@jit
def _columns(v: Any, secants: Any) -> None:
    """Unscaled DCT-II down every column of v [64, 64]; the frequencies end in bit-reversed order."""
    n, last = SIDE, secants[1]
    while n > 2:
        half = n // 2
        for start in range(0, SIDE, n):
            for i in range(half // 2):
                m = half - 1 - i  # butterflies i and m share their four rows
                a, b, c, d = v[start + i], v[start + m], v[start + half + i], v[start + half + m]
                first, second = secants[half + i], secants[half + m]
                for j in range(SIDE):
                    x, y, z, w = a[j], b[j], c[j], d[j]
                    a[j] = x + w
                    b[j] = y + z
                    c[j] = (x - w) * first
                    d[j] = (y - z) * second
        n = half
    for start in range(0, SIDE, 2):
        a, b = v[start], v[start + 1]
        for j in range(SIDE):
            x, y = a[j], b[j]
            a[j] = x + y
            b[j] = (x - y) * last
    n = 4
    while n <= SIDE:
        half = n // 2
        for start in range(half, SIDE, n):
            for i in range(half - 1):
                a = v[start + REVERSED[i] * half // SIDE]
                b = v[start + REVERSED[i + 1] * half // SIDE]
                for j in range(SIDE):
                    a[j] += b[j]
        n *= 2


@jit
def _inverse_columns(v: Any, secants: Any) -> None:
    """Inverse of `_columns`, up to scaling."""
    n, last = SIDE, secants[1]
    while n >= 4:
        half = n // 2
        for start in range(half, SIDE, n):
            for i in range(half - 1, 0, -1):
                a = v[start + REVERSED[i] * half // SIDE]
                b = v[start + REVERSED[i - 1] * half // SIDE]
                for j in range(SIDE):
                    a[j] += b[j]
        n = half
    for start in range(0, SIDE, 2):
        a, b = v[start], v[start + 1]
        for j in range(SIDE):
            x, y = a[j], b[j] * last
            a[j] = x + y
            b[j] = x - y
    n = 4
    while n <= SIDE:
        half = n // 2
        for start in range(0, SIDE, n):
            for i in range(half // 2):
                m = half - 1 - i
                a, b, c, d = v[start + i], v[start + m], v[start + half + i], v[start + half + m]
                first, second = secants[half + i], secants[half + m]
                for j in range(SIDE):
                    x, y, z, w = a[j], b[j], c[j] * first, d[j] * second
                    a[j] = x + z
                    d[j] = x - z
                    b[j] = y + w
                    c[j] = y - w
        n *= 2


@jit
def _untangle(v: Any, out: Any, norm: Any) -> None:
    """out[j, f] <- norm[f] * v[reversed f, j]: right order, scaled, transposed."""
    for f0 in range(0, SIDE, 8):
        for j0 in range(0, SIDE, 8):
            for f in range(f0, f0 + 8):
                row, scale = v[REVERSED[f]], norm[f]
                for j in range(j0, j0 + 8):
                    out[j, f] = row[j] * scale


@jit
def _scale_rows(v: Any, out: Any, norm: Any) -> None:
    """out[f, :] <- norm[f] * v[reversed f, :]."""
    for f in range(SIDE):
        source, target, scale = v[REVERSED[f]], out[f], norm[f]
        for j in range(SIDE):
            target[j] = source[j] * scale


@jit
def _copy(v: Any, out: Any) -> None:
    for f in range(SIDE):
        source, target = v[f], out[f]
        for j in range(SIDE):
            target[j] = source[j]


@jit
def _tangle(v: Any, out: Any, norm: Any) -> None:
    """out[reversed f, :] <- norm[f] * v[f, :]."""
    for f in range(SIDE):
        source, target, scale = v[f], out[REVERSED[f]], norm[f]
        for j in range(SIDE):
            target[j] = source[j] * scale


@jit
def _transpose(v: Any, out: Any) -> None:
    for i0 in range(0, SIDE, 8):
        for j0 in range(0, SIDE, 8):
            for i in range(i0, i0 + 8):
                row = v[i]
                for j in range(j0, j0 + 8):
                    out[j, i] = row[j]
