"""Register blocks: dot products of a few rows with a few rows, weighted sums of rows, softmax.

How a result is added up depends on the length of the rows alone: not on how many rows share a
block, nor on which place a row has in it. Rows are any rows in memory: weights, queries, blocks
of the cache.
"""

from typing import Any

from numba import types
from numba.extending import intrinsic

from engine.cpu import vectors
from engine.cpu.values import ELEMENT_BYTES
from engine.cpu.vectors import FLOAT, LANES, VECTOR

ROW_STEP = 2 * LANES  # the length of rows must be a multiple of it
MOST_SUMS = 16  # rows times columns of one block


@intrinsic(prefer_literal=True)
def dot_rows(
    typing_context: Any,
    left: Any,
    left_stride: Any,
    right: Any,
    right_stride: Any,
    length: Any,
    out: Any,
    out_stride: Any,
    format_: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """``out[i, j] = sum(left[i] * right[j])``, float32, for ``rows`` times ``columns`` rows.

    Addresses and strides are in bytes, ``length`` in elements. Format, rows and columns are
    constants; rows times columns is at most ``MOST_SUMS``.
    """
    chosen, num_rows, num_columns = (item.literal_value for item in (format_, rows, columns))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, left_stride, right, right_stride, length, out, out_stride, *_ = arguments
        sums = _dot_products(
            builder,
            [vectors.place(builder, left, left_stride, i) for i in range(num_rows)],
            [vectors.place(builder, right, right_stride, j) for j in range(num_columns)],
            length,
            chosen,
        )
        total = vectors.fold(builder, sums)
        for i in range(num_rows):
            lanes = range(i * num_columns, (i + 1) * num_columns)
            row = vectors.shuffle(builder, total, total, lanes)
            at = vectors.place(builder, out, out_stride, i)
            builder.store(row, vectors.pointer(builder, at, row.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, format_, rows, columns), generate


@intrinsic(prefer_literal=True)
def add_weighted_rows(
    typing_context: Any,
    weights: Any,
    weights_stride: Any,
    values: Any,
    values_stride: Any,
    count: Any,
    out: Any,
    out_stride: Any,
    format_: Any,
    rows: Any,
    width: Any,
) -> Any:
    """``out[i] += sum over t below count of weights[i, t] * values[t]``, in the order of t.

    Weights and out are float32, values in the format. Addresses and strides are in bytes. Format,
    rows and ``width``, in vectors of 16 elements, are constants.
    """
    chosen, num_rows, num_vectors = (item.literal_value for item in (format_, rows, width))
    step = LANES * ELEMENT_BYTES[chosen]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, weights_stride, values, values_stride, count, out, out_stride, *_ = arguments
        weight_rows = [vectors.place(builder, weights, weights_stride, i) for i in range(num_rows)]
        places = []
        for i in range(num_rows):
            row = vectors.place(builder, out, out_stride, i)
            for j in range(num_vectors):
                at = builder.add(row, vectors.index(4 * LANES * j))
                places.append(vectors.pointer(builder, at, VECTOR))

        def body(t: Any, sums: Any) -> Any:
            row = builder.add(values, builder.mul(t, values_stride))
            parts = [
                vectors.load(builder, builder.add(row, vectors.index(step * j)), chosen)
                for j in range(num_vectors)
            ]
            found = []
            for i, weight_row in enumerate(weight_rows):
                at = builder.add(weight_row, builder.mul(t, vectors.index(4)))
                weight = builder.load(vectors.pointer(builder, at, FLOAT), align=4)
                weight = vectors.spread(builder, weight)
                for j, part in enumerate(parts):
                    total = sums[i * num_vectors + j]
                    found.append(vectors.multiply_add(builder, weight, part, total))
            return found

        before = [builder.load(at, align=4) for at in places]
        for at, total in zip(places, vectors.loop(builder, count, 1, before, body), strict=True):
            builder.store(total, at, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, format_, rows, width), generate


@intrinsic
def soften(typing_context: Any, scores: Any, count: Any, scale: Any, state: Any) -> Any:
    """One run of an online softmax: a score becomes ``exp(scale * score - maximum so far)``.

    ``count`` float32 scores, a multiple of 16; -inf becomes 0. ``state`` is three float32: the
    maximum so far, the sum so far (both are updated), and what earlier results are to be
    multiplied by (set). It begins as (-inf, 0, -).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, count, scale, state = arguments
        scale = vectors.spread(builder, scale)

        def at(k: Any) -> Any:
            place = builder.add(scores, builder.mul(k, vectors.index(4)))
            return vectors.pointer(builder, place, VECTOR)

        def state_at(number: int) -> Any:
            return vectors.pointer(builder, builder.add(state, vectors.index(4 * number)), FLOAT)

        def maximum(k: Any, values: Any) -> Any:
            score = builder.fmul(builder.load(at(k), align=4), scale)
            return [vectors.larger(builder, values[0], score)]

        old = vectors.spread(builder, builder.load(state_at(0), align=4))
        (largest,) = vectors.loop(builder, count, LANES, [old], maximum)
        largest = vectors.fold(builder, [largest], lambda a, b: vectors.larger(builder, a, b))
        largest = vectors.spread(builder, vectors.lane(builder, largest, 0))

        def soften_lanes(k: Any, values: Any) -> Any:
            place = at(k)
            score = builder.fmul(builder.load(place, align=4), scale)
            weight = vectors.exp(builder, builder.fsub(score, largest))
            builder.store(weight, place, align=4)
            return [builder.fadd(values[0], weight)]

        nothing = vectors.constant(0.0)
        (sums,) = vectors.loop(builder, count, LANES, [nothing], soften_lanes)
        total = vectors.lane(builder, vectors.fold(builder, [sums]), 0)
        factor = vectors.lane(builder, vectors.exp(builder, builder.fsub(old, largest)), 0)
        before = builder.load(state_at(1), align=4)
        builder.store(vectors.lane(builder, largest, 0), state_at(0), align=4)
        builder.store(builder.fadd(builder.fmul(before, factor), total), state_at(1), align=4)
        builder.store(factor, state_at(2), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), generate


@intrinsic(prefer_literal=True)
def gate_rows(
    typing_context: Any,
    gates: Any,
    values: Any,
    count: Any,
    out: Any,
    format_: Any,
    out_format: Any,
) -> Any:
    """``out = silu(gates) * values``, element by element; ``count`` is a multiple of 16."""
    chosen, chosen_out = format_.literal_value, out_format.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        gates, values, count, out, *_ = arguments
        one, nothing = vectors.constant(1.0), vectors.constant(0.0)

        def body(k: Any, _: Any) -> Any:
            offset = builder.mul(k, vectors.index(ELEMENT_BYTES[chosen]))
            gate = vectors.load(builder, builder.add(gates, offset), chosen)
            value = vectors.load(builder, builder.add(values, offset), chosen)
            positive = builder.fcmp_ordered(">", gate, nothing)
            shrunk = builder.select(positive, builder.fsub(nothing, gate), gate)
            power = vectors.exp(builder, shrunk)  # of -|gate|, which cannot overflow
            share = builder.fdiv(builder.select(positive, one, power), builder.fadd(one, power))
            found = builder.fmul(builder.fmul(gate, share), value)
            offset = builder.mul(k, vectors.index(ELEMENT_BYTES[chosen_out]))
            vectors.store(builder, builder.add(out, offset), found, chosen_out)
            return []

        vectors.loop(builder, count, LANES, [], body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, format_, out_format), generate


def _dot_products(builder: Any, left: Any, right: Any, length: Any, format_: int) -> Any:
    """One vector per pair (i, j), row by row, whose lanes are still to be added."""
    in_pairs = format_ != 0 and vectors.has_bf16_dot()

    def operand(row: Any, k: Any) -> Any:
        at = builder.add(row, builder.mul(k, vectors.index(ELEMENT_BYTES[format_])))
        return vectors.load_pairs(builder, at) if in_pairs else vectors.load(builder, at, format_)

    def body(k: Any, sums: Any) -> Any:
        columns, found = [operand(row, k) for row in right], []
        for i, row in enumerate(left):
            mine = operand(row, k)
            for j, column in enumerate(columns):
                total = sums[i * len(columns) + j]
                if in_pairs:
                    found.append(vectors.add_pair_products(builder, total, mine, column))
                else:
                    found.append(vectors.multiply_add(builder, mine, column, total))
        return found

    zeros = [vectors.constant(0.0)] * (len(left) * len(right))
    return vectors.loop(builder, length, 2 * LANES if in_pairs else LANES, zeros, body)
