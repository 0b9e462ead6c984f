"""Pieces of causal attention: rows laid out for products, and scores made weights.

For CPUs that add products of bf16 pairs (``vectors.has_bf16_dot``). What is laid out has the order
of ``packed_weights``: of keys a tile is 32 of them, with pairs of their elements; of values a tile
is 32 of their elements, with pairs of tokens. All addresses and strides are in bytes.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.cpu import vectors
from engine.cpu.vectors import FLOAT, LANES, VECTOR

# Of a score that is not to be seen. Finite, as it is subtracted from others, and far below all.
_HIDDEN = -1e30
_WORD = ir.IntType(32)
_ROW = ir.VectorType(ir.IntType(16), 2 * LANES)


@intrinsic
def copy_word(
    typing_context: Any, source: Any, number: Any, target: Any, target_number: Any
) -> Any:
    """Two bf16 elements: word ``number`` of ``source`` as word ``target_number`` of ``target``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, number, target, target_number = arguments
        read = builder.add(source, builder.mul(number, vectors.index(4)))
        written = builder.add(target, builder.mul(target_number, vectors.index(4)))
        word = builder.load(vectors.pointer(builder, read, _WORD), align=2)
        builder.store(word, vectors.pointer(builder, written, _WORD), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def pair_rows(typing_context: Any, first: Any, second: Any, target: Any) -> Any:
    """32 elements of each of two rows, element beside element, as 128 bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, target = arguments
        above, below = (
            builder.load(vectors.pointer(builder, at, _ROW), align=2) for at in (first, second)
        )
        order = [lane for element in range(2 * LANES) for lane in (element, 2 * LANES + element)]
        both = vectors.shuffle(builder, above, below, order)
        builder.store(both, vectors.pointer(builder, target, both.type), align=2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def weigh(
    typing_context: Any,
    scores: Any,
    visible: Any,
    padded: Any,
    scale: Any,
    state: Any,
    weights: Any,
) -> Any:
    """One run of an online softmax of one row, to base 2: a weight is
    ``2 ** (scale * score - maximum so far)``, as bf16.

    Of the float32 ``scores`` the first ``visible`` count, at least 1; all further weights up to
    ``padded`` are 0. ``scores`` and ``weights`` have room for 16 more. ``state`` is as that of
    ``products.soften``, and begins as (-1e30, 0, -).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, visible, padded, scale, state, weights = arguments
        scale = vectors.spread(builder, scale)
        whole = builder.and_(visible, vectors.index(-LANES))
        last = _seen(builder, scores, whole, visible)

        def score(k: Any) -> Any:
            place = builder.add(scores, builder.mul(k, vectors.index(4)))
            return builder.load(vectors.pointer(builder, place, VECTOR), align=4)

        def state_at(number: int) -> Any:
            return vectors.pointer(builder, builder.add(state, vectors.index(4 * number)), FLOAT)

        def greater(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        def maximum(k: Any, values: Any) -> Any:
            return [greater(values[0], score(k))]

        def weight(score: Any, k: Any) -> Any:
            found = vectors.exp2(builder, vectors.multiply_add(builder, score, scale, lowered))
            place = builder.add(weights, builder.mul(k, vectors.index(2)))
            vectors.store_rounded(builder, place, found)
            return found

        (largest,) = vectors.loop(builder, whole, LANES, [last], maximum)
        largest = vectors.fold(builder, [largest], greater)
        largest = builder.fmul(vectors.spread(builder, vectors.lane(builder, largest, 0)), scale)
        old = vectors.spread(builder, builder.load(state_at(0), align=4))
        largest = greater(old, largest)
        lowered = builder.fneg(largest)

        def weigh_lanes(k: Any, values: Any) -> Any:
            return [builder.fadd(values[0], weight(score(k), k))]

        nothing = vectors.constant(0.0)
        (sums,) = vectors.loop(builder, whole, LANES, [nothing], weigh_lanes)
        sums = builder.fadd(sums, weight(last, whole))
        after = builder.add(whole, vectors.index(LANES))

        def clear(k: Any, _: Any) -> Any:
            at = builder.add(weights, builder.mul(builder.add(k, after), vectors.index(2)))
            vectors.store_rounded(builder, at, nothing)
            return []

        vectors.loop(builder, builder.sub(padded, after), LANES, [], clear)
        total = vectors.lane(builder, vectors.fold(builder, [sums]), 0)
        factor = vectors.exp2(builder, builder.fsub(old, largest))
        factor = vectors.lane(builder, factor, 0)
        before = builder.load(state_at(1), align=4)
        builder.store(vectors.lane(builder, largest, 0), state_at(0), align=4)
        builder.store(builder.fadd(builder.fmul(before, factor), total), state_at(1), align=4)
        builder.store(factor, state_at(2), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float32, *[types.int64] * 2), generate


def _seen(builder: Any, scores: Any, whole: Any, visible: Any) -> Any:
    """The 16 scores from ``whole`` on, hidden from ``visible`` on."""
    place = builder.add(scores, builder.mul(whole, vectors.index(4)))
    score = builder.load(vectors.pointer(builder, place, VECTOR), align=4)
    count = builder.trunc(builder.sub(visible, whole), _WORD)
    one = builder.insert_element(
        ir.Constant(vectors.WORDS, ir.Undefined), count, ir.Constant(_WORD, 0)
    )
    counts = vectors.shuffle(builder, one, one, [0] * LANES)
    lanes = ir.Constant(vectors.WORDS, list(range(LANES)))
    return builder.select(builder.icmp_signed("<", lanes, counts), score, vectors.constant(_HIDDEN))
