"""Scalars inside a kernel: elements in memory by address, whatever their format.

Only compiled kernels call these. A format is one of ``FLOAT32`` and ``BFLOAT16``; a bf16 is the
upper half of a float32, and is rounded to nearest, ties to even.
"""

import struct
from functools import lru_cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

FLOAT32, BFLOAT16 = 0, 1
FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
ELEMENT_BYTES = {FLOAT32: 4, BFLOAT16: 2}

# Sums may be reordered when a kernel is compiled, never when it runs: no flag makes a result
# depend on anything but the arguments.
FAST_MATH = {"reassoc", "contract", "nsz"}

_LINE_BYTES = 64  # of a cache line; longer ones are asked for more than once
_HALF, _WORD, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic(prefer_literal=True)
def load(typing_context: Any, address: Any, number: Any, format_: Any) -> Any:
    """Element ``number`` after ``address``, as float32."""
    chosen = format_.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, index, _ = arguments
        if chosen == FLOAT32:
            return builder.load(_element(builder, base, index, _FLOAT), align=4)
        half = builder.load(_element(builder, base, index, _HALF), align=2)
        word = builder.shl(builder.zext(half, _WORD), ir.Constant(_WORD, 16))
        return builder.bitcast(word, _FLOAT)

    return types.float32(types.int64, types.int64, format_), generate


@intrinsic(prefer_literal=True)
def store(typing_context: Any, address: Any, number: Any, value: Any, format_: Any) -> Any:
    """Put a float32 as element ``number`` after ``address``. NaN may become infinity."""
    chosen = format_.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        base, index, number, _ = arguments
        if chosen == FLOAT32:
            builder.store(number, _element(builder, base, index, _FLOAT), align=4)
        else:
            word = builder.bitcast(number, _WORD)
            odd = builder.and_(builder.lshr(word, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 1))
            rounded = builder.add(builder.add(word, ir.Constant(_WORD, 0x7FFF)), odd)
            half = builder.trunc(builder.lshr(rounded, ir.Constant(_WORD, 16)), _HALF)
            builder.store(half, _element(builder, base, index, _HALF), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, format_), generate


@intrinsic
def load_integer(typing_context: Any, address: Any, number: Any) -> Any:
    """The int64 that is element ``number`` after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = arguments
        return builder.load(_element(builder, address, number, ir.IntType(64)), align=8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store_integer(typing_context: Any, address: Any, number: Any, value: Any) -> Any:
    """Put an int64 as element ``number`` after ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number, value = arguments
        builder.store(value, _element(builder, address, number, ir.IntType(64)), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def fetch_early(typing_context: Any, address: Any, num_bytes: Any) -> Any:
    """Ask for ``num_bytes`` (a constant) of memory that will be read soon, from any address.

    Into the outer caches: the innermost has room for few requests on the way, and waits.
    """
    chosen = num_bytes.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.PointerType(ir.IntType(8))
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
            function = ir.Function(builder.module, kind, name)
        read, far, data = (ir.Constant(_WORD, value) for value in (0, 1, 1))
        for offset in range(0, chosen, _LINE_BYTES):
            at = builder.add(arguments[0], ir.Constant(ir.IntType(64), offset))
            builder.call(function, [builder.inttoptr(at, pointer), read, far, data])
        return context.get_dummy_value()

    return types.void(types.int64, num_bytes), generate


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 whose bits an integer argument of a kernel carries (``bits_of``)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], _WORD), _FLOAT)

    return types.float32(types.int64), generate


@lru_cache
def bits_of(value: float) -> int:
    """``value`` as an argument of a kernel, which takes integers only."""
    bits: int = struct.unpack("=i", struct.pack("=f", value))[0]
    return bits


def _element(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    pointer = builder.inttoptr(address, ir.PointerType(kind))
    return builder.gep(pointer, [index], source_etype=kind)
