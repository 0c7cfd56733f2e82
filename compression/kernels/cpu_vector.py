"""Explicit vector instructions for numba: LLVM's vectorizer gives up on rows of 64 that might overlap.

Each function works on a fixed number of neighbouring elements without bounds checks. The vectors are LLVM's
generic ones, so the same code becomes SSE, AVX or NEON, whatever the machine has.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types

from dtrain.compression.kernels.cpu_tools import machine_code

LANES = 16  # elements per step of fold_step and scan_step
WORD = 64  # elements per call of mask_at_least
_F32, _I32 = ir.FloatType(), ir.IntType(32)


def vector_pointer(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: ir.VectorType
) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def load_vector(builder: Any, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 4
    return value


def store_vector(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, pointer).align = 4


def _splat(builder: Any, value: Any, vector: ir.VectorType) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


def _magnitudes(builder: Any, floats: Any, count: int) -> Any:
    vector = ir.VectorType(_I32, count)
    return builder.and_(builder.bitcast(floats, vector), ir.Constant(vector, [0x7FFFFFFF] * count))


def _raise_lanes(builder: Any, pointer: Any, magnitudes: Any) -> None:
    lanes = load_vector(builder, pointer)
    store_vector(
        builder, builder.select(builder.icmp_signed(">", magnitudes, lanes), magnitudes, lanes), pointer
    )


@machine_code
def fold_step(_context: Any, values: Any, i: Any, source: Any, j: Any, lanes: Any, k: Any, decay: Any) -> Any:
    """16 times: values[i] <- values[i] * decay + source[j]; lanes[k] <- max(lanes[k], bits of |values[i]|)."""
    signature = types.void(values, i, source, j, lanes, k, types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, ints = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
        kinds = signature.args
        value = vector_pointer(context, builder, kinds[0], arguments[0], arguments[1], floats)
        source = vector_pointer(context, builder, kinds[2], arguments[2], arguments[3], floats)
        lanes = vector_pointer(context, builder, kinds[4], arguments[4], arguments[5], ints)
        scaled = builder.fmul(load_vector(builder, value), _splat(builder, arguments[6], floats))
        folded = builder.fadd(scaled, load_vector(builder, source))
        store_vector(builder, folded, value)
        _raise_lanes(builder, lanes, _magnitudes(builder, folded, LANES))
        return context.get_dummy_value()

    del decay
    return signature, generate


@machine_code
def scan_step(_context: Any, values: Any, i: Any, lanes: Any, k: Any) -> Any:
    """16 times: lanes[k] <- max(lanes[k], bits of |values[i]|)."""
    signature = types.void(values, i, lanes, k)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, ints = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
        value = vector_pointer(context, builder, signature.args[0], arguments[0], arguments[1], floats)
        lanes = vector_pointer(context, builder, signature.args[2], arguments[2], arguments[3], ints)
        _raise_lanes(builder, lanes, _magnitudes(builder, load_vector(builder, value), LANES))
        return context.get_dummy_value()

    return signature, generate


@machine_code
def mask_at_least(_context: Any, values: Any, i: Any, cut: Any) -> Any:
    """A u64 whose bit b says whether the bits of |values[i + b]| are at least `cut` (i32), for 64 elements."""
    signature = types.uint64(values, i, types.int32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, ints = ir.VectorType(_F32, WORD), ir.VectorType(_I32, WORD)
        pointer = vector_pointer(context, builder, signature.args[0], arguments[0], arguments[1], floats)
        magnitudes = _magnitudes(builder, load_vector(builder, pointer), WORD)
        above = builder.icmp_signed(">=", magnitudes, _splat(builder, arguments[2], ints))
        return builder.bitcast(above, ir.IntType(64))

    del cut
    return signature, generate


@machine_code
def spread_fields(_context: Any, word: Any, width: Any, out: Any, i: Any) -> Any:
    """out[i + j] <- the j-th field of `width` <= 8 bits of a u64, for j = 0 to 7; out is an i32 array."""
    signature = types.void(types.uint64, types.int64, out, i)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, ints = ir.VectorType(ir.IntType(64), 8), ir.VectorType(_I32, 8)
        word, width, out, i = arguments
        shifts = builder.mul(_splat(builder, width, wide), ir.Constant(wide, list(range(8))))
        ones = builder.shl(ir.Constant(ir.IntType(64), 1), width)
        mask = _splat(builder, builder.sub(ones, ir.Constant(ir.IntType(64), 1)), wide)
        fields = builder.and_(builder.lshr(_splat(builder, word, wide), shifts), mask)
        pointer = vector_pointer(context, builder, signature.args[2], out, i, ints)
        store_vector(builder, builder.trunc(fields, ints), pointer)
        return context.get_dummy_value()

    del word, width
    return signature, generate


@machine_code
def join_fields(_context: Any, values: Any, i: Any, width: Any) -> Any:
    """A u64 of the low `width` <= 8 bits of values[i + j] (i32), j = 0 to 7, the j-th from bit j * width on."""
    signature = types.uint64(values, i, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, ints, count = ir.VectorType(ir.IntType(64), 8), ir.VectorType(_I32, 8), 8
        values, i, width = arguments
        loaded = builder.zext(
            load_vector(builder, vector_pointer(context, builder, signature.args[0], values, i, ints)), wide
        )
        ones = builder.shl(ir.Constant(ir.IntType(64), 1), width)
        mask = _splat(builder, builder.sub(ones, ir.Constant(ir.IntType(64), 1)), wide)
        shifts = builder.mul(_splat(builder, width, wide), ir.Constant(wide, list(range(8))))
        joined = builder.shl(builder.and_(loaded, mask), shifts)
        while count > 1:
            count //= 2
            order = ir.Constant(ir.VectorType(_I32, 8), [(j + count) % 8 for j in range(8)])
            joined = builder.or_(joined, builder.shuffle_vector(joined, joined, order))
        return builder.extract_element(joined, ir.Constant(_I32, 0))

    del width
    return signature, generate


@machine_code
def clear_row(_context: Any, values: Any, i: Any) -> Any:
    """values[i : i + 64] <- 0."""
    signature = types.void(values, i)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats = ir.VectorType(_F32, WORD)
        pointer = vector_pointer(context, builder, signature.args[0], arguments[0], arguments[1], floats)
        store_vector(builder, ir.Constant(floats, [0.0] * WORD), pointer)
        return context.get_dummy_value()

    return signature, generate


@machine_code
def stream_row(_context: Any, values: Any, i: Any, address: Any) -> Any:
    """Copy values[i : i + 64] to `address`, a multiple of 32, past the caches: it won't be read again soon.

    `fence` must follow before another thread may read it.
    """
    signature = types.void(values, i, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats = ir.VectorType(_F32, 8)
        source = vector_pointer(context, builder, signature.args[0], arguments[0], arguments[1], floats)
        target = builder.inttoptr(arguments[2], floats.as_pointer())
        hint = builder.module.add_metadata([ir.Constant(_I32, 1)])
        for step in range(WORD // 8):
            at = [ir.Constant(_I32, step)]
            store = builder.store(load_vector(builder, builder.gep(source, at)), builder.gep(target, at))
            store.align = 32
            store.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return signature, generate


@machine_code
def fence(_context: Any) -> Any:
    """Make every store before it visible before any after it."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@machine_code
def prefetch_row(_context: Any, _address: Any) -> Any:
    """Ask for the 256 bytes from `address`, which are soon to be read."""
    signature = types.void(types.int64)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, locality, data = ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)
        for line in range(0, 256, 64):
            place = builder.inttoptr(builder.add(arguments[0], ir.Constant(ir.IntType(64), line)), pointer)
            builder.call(function, [place, read, locality, data])
        return context.get_dummy_value()

    return signature, generate
