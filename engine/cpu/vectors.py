"""Vectors of 16 float32 as LLVM instructions, for register blocks to be made of.

A machine with narrower registers has them split by LLVM. Lanes are added in one fixed order:
halves, then quarters, and so on.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from engine.cpu.values import FLOAT32

LANES = 16

FLOAT = ir.FloatType()
INDEX = ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types
    """llvmlite knows no bfloat, but it only prints types, and LLVM reads what it prints."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
_ROUNDED = ir.VectorType(_BFloat(), LANES)


@cache
def has_bf16_dot() -> bool:
    """Whether this CPU adds products of bf16 pairs in one instruction (AVX512-BF16)."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16", False))


def constant(value: float) -> Any:
    return ir.Constant(VECTOR, [value] * LANES)


def _words(value: int) -> Any:
    return ir.Constant(WORDS, [value] * LANES)


def index(value: int) -> Any:
    return ir.Constant(INDEX, value)


def place(builder: Any, address: Any, stride: Any, number: int) -> Any:
    return builder.add(address, builder.mul(stride, index(number)))


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(kind))


def load(builder: Any, address: Any, format_: int) -> Any:
    """16 elements as float32."""
    if format_ == FLOAT32:
        return builder.load(pointer(builder, address, VECTOR), align=4)
    halves = builder.load(pointer(builder, address, HALVES), align=2)
    words = builder.shl(builder.zext(halves, WORDS), _words(16))
    return builder.bitcast(words, VECTOR)


def store(builder: Any, address: Any, vector: Any, format_: int) -> None:
    """bf16 is rounded to nearest, ties to even; NaN may become infinity."""
    if format_ != FLOAT32:
        words = builder.bitcast(vector, WORDS)
        odd = builder.and_(builder.lshr(words, _words(16)), _words(1))
        words = builder.add(builder.add(words, _words(0x7FFF)), odd)
        vector = builder.trunc(builder.lshr(words, _words(16)), HALVES)
    builder.store(vector, pointer(builder, address, vector.type), align=2)


def load_pairs(builder: Any, address: Any) -> Any:
    """32 bf16 elements, for ``add_pair_products``."""
    return builder.load(pointer(builder, address, PAIRS), align=2)


def store_rounded(builder: Any, address: Any, vector: Any) -> None:
    """As bf16 by the instruction of CPUs with ``has_bf16_dot``: as ``store``, but what is too
    small for a normal number becomes 0, and NaN stays NaN.
    """
    rounded = _call(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", vector, result=_ROUNDED)
    builder.store(rounded, pointer(builder, address, _ROUNDED), align=2)


def multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", left, right, total)


def add_pair_products(builder: Any, total: Any, left: Any, right: Any) -> Any:
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total, left, right)


def larger(builder: Any, left: Any, right: Any) -> Any:
    return _call(builder, f"llvm.maxnum.v{LANES}f32", left, right)


def _call(builder: Any, name: str, *operands: Any, result: Any = VECTOR) -> Any:
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        function = ir.Function(builder.module, kind, name)
    return builder.call(function, operands)


def spread(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    one = builder.insert_element(
        ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    return shuffle(builder, one, one, [0] * LANES)


def shuffle(builder: Any, left: Any, right: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(left, right, mask)


def fold(
    builder: Any, vectors: Sequence[Any], combine: Callable[[Any, Any], Any] | None = None
) -> Any:
    """Each of up to 16 vectors reduced over its lanes, in the lane of its number: by default
    their sums.
    """
    combine = combine or builder.fadd
    vectors, distance = list(vectors), LANES // 2
    while distance:
        if len(vectors) % 2:
            vectors.append(vectors[-1])
        near = [lane for lane in range(2 * LANES) if lane % (2 * distance) < distance]
        far = [lane + distance for lane in near]
        vectors = [
            combine(shuffle(builder, a, b, near), shuffle(builder, a, b, far))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        distance //= 2
    (reduced,) = vectors
    return reduced


def lane(builder: Any, vector: Any, number: int) -> Any:
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), number))


def exp(builder: Any, x: Any) -> Any:
    """Of lanes that are at most 0, within two units in the last place; 0 below -87, NaN of NaN.

    Cephes' expf: ln 2 in two parts, so that the rest is exact, and a polynomial for the rest.
    """
    bounded = larger(builder, x, constant(-88.0))  # and no NaN: its power must fit an integer
    power = _call(
        builder, f"llvm.rint.v{LANES}f32", builder.fmul(bounded, constant(1.4426950408889634))
    )
    rest = multiply_add(builder, power, constant(-0.693359375), bounded)
    rest = multiply_add(builder, power, constant(2.12194440e-4), rest)
    series = constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        series = multiply_add(builder, series, rest, constant(factor))
    series = multiply_add(builder, series, builder.fmul(rest, rest), rest)
    series = builder.fadd(series, constant(1.0))
    exponent = builder.add(builder.fptosi(power, WORDS), _words(127))
    scale = builder.bitcast(builder.shl(exponent, _words(23)), VECTOR)
    kept = builder.fcmp_ordered(">", x, constant(-87.0))
    value = builder.select(kept, builder.fmul(series, scale), constant(0.0))
    # A damaged key must spoil its request, which is noticed, and not be left out in silence.
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


def exp2(builder: Any, x: Any) -> Any:
    """Powers of two on CPUs with ``has_bf16_dot``, within 3e-6 of their size, which is far below
    the rounding of a bf16; 1 of 0, and not a number of what is not finite.

    The whole part is put into the exponent by one instruction, which also goes to 0 and infinity.
    """
    power = _call(builder, f"llvm.rint.v{LANES}f32", x)
    rest = builder.fsub(x, power)
    series = constant(0.009582853033)  # the least largest error from -0.5 to 0.5, with 1 at 0
    for factor in (0.05590642468, 0.2402409861, 0.6931241934, 1.0):
        series = multiply_add(builder, series, rest, constant(factor))
    everywhere, as_set = ir.Constant(ir.IntType(16), -1), ir.Constant(ir.IntType(32), 4)
    return _call(
        builder, "llvm.x86.avx512.mask.scalef.ps.512", series, power, constant(0.0), everywhere,
        as_set,
    )  # fmt: skip


def loop(
    builder: Any,
    end: Any,
    step: int,
    first: Sequence[Any],
    body: Callable[[Any, Sequence[Any]], Sequence[Any]],
) -> list[Any]:
    """``for k in range(0, end, step): values = body(k, values)``, the values in registers."""
    entry = builder.basic_block
    head, inside, after = (
        builder.append_basic_block(name) for name in ("loop.head", "loop.body", "loop.end")
    )
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(INDEX)
    values = [builder.phi(value.type) for value in first]
    builder.cbranch(builder.icmp_signed("<", k, end), inside, after)
    builder.position_at_end(inside)
    following = body(k, values)
    further = builder.add(k, index(step))
    leaving = builder.basic_block
    builder.branch(head)
    for phi, before, again in zip(
        [k, *values], [index(0), *first], [further, *following], strict=True
    ):
        phi.add_incoming(before, entry)
        phi.add_incoming(again, leaving)
    builder.position_at_end(after)
    return values
