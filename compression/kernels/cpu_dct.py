"""64 x 64 DCT in numba: the butterflies of dct.py as straight-line vector code, on 8 columns at a time.

Written out in full, the 64 values of 8 columns stay in registers and the nearest cache through all six stages, and
each of the two passes reads and writes a block once. Same operations, same order, no fused multiply-add: the bits
equal those of dct.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types

from dtrain.compression import dct
from dtrain.compression.kernels.cpu_tools import jit, machine_code
from dtrain.compression.kernels.cpu_vector import load_vector, prefetch_row, store_vector, vector_pointer

SIDE = dct.SIDE
WIDTH = 8  # columns at a time
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


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
def forward(block: Any, out: Any) -> None:
    """out [64, 64] <- coefficients of block [64, 64], in dct.forward's order."""
    for column in range(0, SIDE, WIDTH):
        _dct_across(block, column, out)
    for column in range(0, SIDE, WIDTH):
        _dct_down(out, column, out)


@jit
def inverse(block: Any, out: Any) -> None:
    """out [64, 64] <- elements from the coefficients in block [64, 64]."""
    for column in range(0, SIDE, WIDTH):
        _idct_across(block, column, out)
    for column in range(0, SIDE, WIDTH):
        _idct_down(out, column, out)


def _columns(transform: Callable[[Any, list[Any]], list[Any]], across: bool) -> Any:
    """An intrinsic: columns `column` to `column` + 8 of v [64, 64] through `transform`, into the same columns of out
    or, `across`, into its rows of these numbers.
    """

    @machine_code
    def columns(_context: Any, v: Any, column: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v, column, out = arguments
            source = vector_pointer(context, builder, signature.args[0], v, column, _VECTOR)
            rows = [load_vector(builder, builder.gep(source, [_offset(row * SIDE)])) for row in range(SIDE)]
            found = transform(builder, rows)
            if across:
                column = builder.mul(column, ir.Constant(column.type, SIDE))
            target = vector_pointer(context, builder, signature.args[2], out, column, _VECTOR)
            for row in range(0, SIDE, WIDTH):
                tile = found[row : row + WIDTH]
                for i, vector in enumerate(_transposed(builder, tile) if across else tile):
                    at = i * SIDE + row if across else (row + i) * SIDE
                    store_vector(builder, vector, builder.gep(target, [_offset(at)]))
            return context.get_dummy_value()

        return types.void(v, column, out), generate

    return columns


def _offset(elements: int) -> ir.Constant:
    """In vectors; rows and columns come in whole ones."""
    return ir.Constant(ir.IntType(64), elements // WIDTH)


def _scaled(builder: Any, vector: Any, factor: float) -> Any:
    return builder.fmul(vector, ir.Constant(_VECTOR, [float(np.float32(factor))] * WIDTH))


def _dct(builder: Any, x: list[Any]) -> list[Any]:
    """As dct._dct, on a list of vectors."""
    n = len(x)
    if n == 1:
        return x
    pairs = list(zip(x[: n // 2], x[: n // 2 - 1 : -1], strict=True))
    differences = [builder.fsub(a, b) for a, b in pairs]
    even = _dct(builder, [builder.fadd(a, b) for a, b in pairs])
    odd = _dct(
        builder, [_scaled(builder, d, s) for d, s in zip(differences, dct.half_secants(n), strict=True)]
    )
    odd = [*(builder.fadd(a, b) for a, b in itertools.pairwise(odd)), odd[-1]]
    return [vector for both in zip(even, odd, strict=True) for vector in both]


def _idct(builder: Any, x: list[Any]) -> list[Any]:
    """As dct._idct, on a list of vectors."""
    n = len(x)
    if n == 1:
        return x
    odd = [x[1], *(builder.fadd(x[i], x[i - 2]) for i in range(3, n, 2))]
    even, odd = _idct(builder, x[0::2]), _idct(builder, odd)
    odd = [_scaled(builder, vector, s) for vector, s in zip(odd, dct.half_secants(n), strict=True)]
    sums = [builder.fadd(a, b) for a, b in zip(even, odd, strict=True)]
    return sums + [builder.fsub(a, b) for a, b in zip(even, odd, strict=True)][::-1]


def _forward(builder: Any, rows: list[Any]) -> list[Any]:
    return [_scaled(builder, row, norm) for row, norm in zip(_dct(builder, rows), dct.norms(), strict=True)]


def _inverse(builder: Any, rows: list[Any]) -> list[Any]:
    return _idct(builder, [_scaled(builder, row, norm) for row, norm in zip(rows, dct.norms(), strict=True)])


def _transposed(builder: Any, tile: list[Any]) -> list[Any]:
    """The 8 columns of a tile of 8 row vectors: halves of ever larger size change places."""
    size = WIDTH // 2
    while size:
        for i in range(WIDTH):
            if not i & size:
                a, b = tile[i], tile[i + size]
                low = [j if not j & size else j - size + WIDTH for j in range(WIDTH)]
                high = [j + size if not j & size else j + WIDTH for j in range(WIDTH)]
                tile = [*tile]
                tile[i], tile[i + size] = _shuffled(builder, a, b, low), _shuffled(builder, a, b, high)
        size //= 2
    return tile


def _shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), order))


_dct_across, _dct_down = _columns(_forward, across=True), _columns(_forward, across=False)
_idct_across, _idct_down = _columns(_inverse, across=True), _columns(_inverse, across=False)
