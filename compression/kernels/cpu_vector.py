"""Explicit vector instructions for numba: LLVM's vectorizer gives up on rows of 64 that might overlap.

Each function works on a fixed number of neighbouring elements without bounds checks. The vectors are LLVM's generic
ones, so the same code becomes SSE, AVX or NEON, whatever the machine has.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

LANES = 16  # elements per step of fold_step and scan_step
WORD = 64  # elements per call of mask_at_least
_F32, _I32 = ir.FloatType(), ir.IntType(32)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: ir.VectorType) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _load(builder: Any, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 4
    return value


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer).align = 4


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


def _magnitudes(builder: Any, floats: Any, count: int) -> Any:
    vector = ir.VectorType(_I32, count)
    return builder.and_(builder.bitcast(floats, vector), ir.Constant(vector, [0x7FFFFFFF] * count))


def _raise_lanes(builder: Any, pointer: Any, magnitudes: Any) -> None:
    lanes = _load(builder, pointer)
    _store(builder, builder.select(builder.icmp_signed(">", magnitudes, lanes), magnitudes, lanes), pointer)


@intrinsic  # type: ignore[untyped-decorator]
def fold_step(_context: Any, values: Any, i: Any, source: Any, j: Any, lanes: Any, k: Any, decay: Any) -> Any:
    """16 times: values[i] <- values[i] * decay + source[j]; lanes[k] <- max(lanes[k], bits of |values[i]|)."""
    signature = types.void(values, i, source, j, lanes, k, types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, ints = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
        kinds = signature.args
        value = _pointer(context, builder, kinds[0], arguments[0], arguments[1], floats)
        source = _pointer(context, builder, kinds[2], arguments[2], arguments[3], floats)
        lanes = _pointer(context, builder, kinds[4], arguments[4], arguments[5], ints)
        scaled = builder.fmul(_load(builder, value), _splat(builder, arguments[6], floats))
        folded = builder.fadd(scaled, _load(builder, source))
        _store(builder, folded, value)
        _raise_lanes(builder, lanes, _magnitudes(builder, folded, LANES))
        return context.get_dummy_value()

    del decay
    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def scan_step(_context: Any, values: Any, i: Any, lanes: Any, k: Any) -> Any:
    """16 times: lanes[k] <- max(lanes[k], bits of |values[i]|)."""
    signature = types.void(values, i, lanes, k)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, ints = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
        value = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], floats)
        lanes = _pointer(context, builder, signature.args[2], arguments[2], arguments[3], ints)
        _raise_lanes(builder, lanes, _magnitudes(builder, _load(builder, value), LANES))
        return context.get_dummy_value()

    return signature, generate


@intrinsic  # type: ignore[untyped-decorator]
def mask_at_least(_context: Any, values: Any, i: Any, cut: Any) -> Any:
    """A u64 whose bit b says whether the bits of |values[i + b]| are at least `cut` (i32), for 64 elements."""
    signature = types.uint64(values, i, types.int32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, ints = ir.VectorType(_F32, WORD), ir.VectorType(_I32, WORD)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], floats)
        magnitudes = _magnitudes(builder, _load(builder, pointer), WORD)
        above = builder.icmp_signed(">=", magnitudes, _splat(builder, arguments[2], ints))
        return builder.bitcast(above, ir.IntType(64))

    del cut
    return signature, generate

