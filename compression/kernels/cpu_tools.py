"""What the numba kernels share: a typed decorator and the few instructions that numba has no name for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite.ir as ir
import numba
from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

carray: Callable[..., Any] = numba.carray


def jit(function: Function) -> Function:
    """Compile without the GIL. No fast-math: every operation rounds as it is written, the same on every
    machine.
    """
    compiled: Function = njit(nogil=True, error_model="numpy")(function)
    return compiled


def jit_on_disk(function: Function) -> Function:
    """The same, and keep the machine code on disk for the next process, if there is a folder to write to."""
    try:
        compiled: Function = njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # "no locator available": neither beside the source nor in the user's cache folder
        return jit(function)
    return compiled


def machine_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """numba's `intrinsic`: the function says which instructions a call stands for; callers leave out its
    context.
    """
    compiled: Callable[..., Any] = intrinsic(function)
    return compiled


@machine_code
def count_trailing_zeros(_context: Any, _word: Any) -> Any:
    """Position of the lowest one in a nonzero u64."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@machine_code
def float_bits(_context: Any, _value: Any) -> Any:
    """The bits of an fp32 as i32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@machine_code
def bits_float(_context: Any, _value: Any) -> Any:
    """The fp32 with these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@machine_code
def claim(_context: Any, counter: Any) -> Any:
    """counter[0] and, in the same instant, counter[0] + 1 into its place: no two threads get the same number."""
    signature = types.int64(counter)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return signature, generate


@machine_code
def load_u64(_context: Any, array: Any, offset: Any) -> Any:
    """Eight bytes of a u8 array from `offset`, which need not be aligned; the caller sees to it that they
    exist.
    """
    signature = types.uint64(array, offset)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        value = builder.load(pointer)
        value.align = 1
        return value

    return signature, generate


@machine_code
def store_u64(_context: Any, array: Any, offset: Any, word: Any) -> Any:
    """Write eight bytes into a u8 array at `offset`; the caller sees to it that they exist."""
    signature = types.void(array, offset, types.uint64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        store = builder.store(arguments[2], pointer)
        store.align = 1
        return context.get_dummy_value()

    del word
    return signature, generate


@machine_code
def float_pointer(_context: Any, _address: Any) -> Any:
    """An address as a pointer to fp32, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@machine_code
def byte_pointer(_context: Any, _address: Any) -> Any:
    """An address as a pointer to u8, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), generate
