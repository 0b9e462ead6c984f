"""Products with bf16 weights that lie in the order in which they are read.

A tile is 32 outputs, and of it lies pair after pair of inputs, so one pass over memory serves up to
12 rows, whose sums stay in registers; more rows pass a tile again while a cache has it. A sum is
made by one lane in the order of the inputs, whichever rows are beside it: so a row's result is the
same bits in every batch, and for any number of threads.
"""

# Shape suffixes: N rows   I input features   O output features   T tiles of outputs
# P pairs of inputs   J outputs of a tile

from functools import cache, partial
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from engine.cpu import vectors
from engine.cpu.threads import Kernel, end_item, first_item
from engine.cpu.values import BFLOAT16, ELEMENT_BYTES, FLOAT32
from engine.cpu.vectors import LANES

TILE_VECTORS = 2
TILE = TILE_VECTORS * LANES  # outputs
INPUT_STEP = 4  # inputs that one turn of the loop reads: two pairs
MOST_ROWS = (
    12  # 24 sums, two vectors of weights and one of a row are nearly all registers there are
)
_PAIR_BYTES = 4
TILE_PAIR_BYTES = TILE * _PAIR_BYTES
_OUT_BYTES = 2 * TILE
_SHARED_BYTES = 2**16  # of weights; below, waking threads takes longer than the work


def serves(weight_OI: Tensor) -> bool:
    """Whether these weights can be packed, and this machine multiplies them."""
    return serves_as(weight_OI.device, weight_OI.dtype, weight_OI.shape[1])


def serves_as(device: torch.device, dtype: torch.dtype, in_features: int) -> bool:
    """``serves``, for weights that are not there yet."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and in_features % INPUT_STEP == 0
        and vectors.has_bf16_dot()
    )


def pack(weight_OI: Tensor) -> Tensor:
    """(T, P, J, 2): the weights in the order of the kernel, with zeros up to a whole tile."""
    out_features, in_features = weight_OI.shape
    tiles = -(-out_features // TILE)
    packed_TPJ2 = weight_OI.new_empty((tiles, in_features // 2, TILE, 2))
    whole = out_features // TILE
    _put(packed_TPJ2[:whole], weight_OI[: whole * TILE])
    if whole < tiles:
        rest_JI = weight_OI.new_zeros((TILE, in_features))
        rest_JI[: out_features - whole * TILE] = weight_OI[whole * TILE :]
        _put(packed_TPJ2[whole:], rest_JI)
    return packed_TPJ2


def in_tiles(weight_OI: Tensor) -> Tensor:
    """The same bytes in the order of ``pack``, under the shape of the weight; O is a multiple of
    ``TILE``. For weights that are to be replaced one by one in a tensor of many.
    """
    assert weight_OI.shape[0] % TILE == 0
    return pack(weight_OI).view(weight_OI.shape)


def _put(packed_TPJ2: Tensor, weight_OI: Tensor) -> None:
    tiles, pairs = packed_TPJ2.shape[:2]
    packed_TPJ2.copy_(weight_OI.view(tiles, TILE, pairs, 2).transpose(1, 2))


def multiply(x_NI: Tensor, packed_TPJ2: Tensor, out_features: int) -> Tensor:
    """``x @ weight.T``, (N, O), of the weight that ``pack`` was given; sums are float32."""
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    tiles, pairs = packed_TPJ2.shape[:2]
    num_rows = x_NI.shape[0]
    out_NO = x_NI.new_empty((num_rows, tiles * TILE))
    threads = torch.get_num_threads() if packed_TPJ2.nbytes > _SHARED_BYTES else 1
    _kernel()(
        x_NI.data_ptr(), 2 * x_NI.stride(0), num_rows,
        packed_TPJ2.data_ptr(), tiles, pairs,
        out_NO.data_ptr(), 2 * tiles * TILE, threads=threads,
    )  # fmt: skip
    return out_NO if tiles * TILE == out_features else out_NO[:, :out_features].contiguous()


def prepare() -> None:
    """Compile; one kernel serves all sizes."""
    if vectors.has_bf16_dot():
        _kernel()


@cache
def _kernel() -> Kernel:
    def multiply_tiles(arguments: Any) -> None:
        x, stride, num_rows = arguments[0], arguments[1], arguments[2]
        weights, tiles, pairs = arguments[3], arguments[4], arguments[5]
        blocks = (num_rows + MOST_ROWS - 1) // MOST_ROWS
        for tile in range(first_item(tiles), end_item(tiles)):
            weight = weights + tile * pairs * TILE_PAIR_BYTES
            out = arguments[6] + tile * _OUT_BYTES
            for block in range(blocks):
                row = num_rows * block // blocks
                rows = num_rows * (block + 1) // blocks - row
                multiply_block(
                    x + row * stride, stride, rows, weight, pairs,
                    out + row * arguments[7], arguments[7], BFLOAT16,
                )  # fmt: skip

    return Kernel(multiply_tiles, (TILE, INPUT_STEP, MOST_ROWS))


@intrinsic(prefer_literal=True)
def multiply_block(
    typing_context: Any,
    left: Any,
    left_stride: Any,
    rows: Any,
    weight: Any,
    pairs: Any,
    out: Any,
    out_stride: Any,
    out_format: Any,
) -> Any:
    """1 to ``MOST_ROWS`` rows times one tile of ``pairs`` (even). Strides are in bytes, and the
    format of the results is a constant.
    """
    generate = partial(_generate_block, out_format.literal_value, False)
    return types.void(*[types.int64] * 7, out_format), generate


@intrinsic
def add_block(
    typing_context: Any,
    left: Any,
    left_stride: Any,
    rows: Any,
    weight: Any,
    pairs: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """As ``multiply_block`` to float32, added to what is in ``out``."""
    return types.void(*[types.int64] * 7), partial(_generate_block, FLOAT32, True)


def _generate_block(
    out_format: int, adds: bool, context: Any, builder: Any, signature: Any, arguments: Any
) -> Any:
    left, left_stride, rows, weight, pairs, out, out_stride = arguments[:7]
    after = builder.append_basic_block("multiply.end")
    choice = builder.switch(rows, after)
    for count in range(1, MOST_ROWS + 1):
        case = builder.append_basic_block(f"multiply.{count}")
        choice.add_case(vectors.index(count), case)
        builder.position_at_end(case)
        places = [vectors.place(builder, left, left_stride, i) for i in range(count)]
        targets = []
        for row in range(count):
            at = vectors.place(builder, out, out_stride, row)
            for part in range(TILE_VECTORS):
                offset = vectors.index(ELEMENT_BYTES[out_format] * LANES * part)
                targets.append(builder.add(at, offset))
        before = [
            vectors.load(builder, at, out_format) if adds else vectors.constant(0.0)
            for at in targets
        ]
        for at, total in zip(targets, _sums(builder, places, weight, pairs, before), strict=True):
            vectors.store(builder, at, total, out_format)
        builder.branch(after)
    builder.position_at_end(after)
    return context.get_dummy_value()


def _sums(builder: Any, rows: list[Any], weight: Any, pairs: Any, before: list[Any]) -> list[Any]:
    """Of each row in turn the vectors of the tile's outputs, added to ``before``."""

    def add_pair(k: Any, sums: list[Any]) -> list[Any]:
        at = builder.add(weight, builder.mul(k, vectors.index(TILE_PAIR_BYTES)))
        parts = [
            vectors.load_pairs(builder, builder.add(at, vectors.index(_PAIR_BYTES * LANES * part)))
            for part in range(TILE_VECTORS)
        ]
        found = []
        for i, row in enumerate(rows):
            mine = _spread_pair(builder, builder.add(row, builder.mul(k, vectors.index(4))))
            for part, weights in enumerate(parts):
                total = sums[i * TILE_VECTORS + part]
                found.append(vectors.add_pair_products(builder, total, mine, weights))
        return found

    def body(k: Any, sums: Any) -> list[Any]:
        return add_pair(builder.add(k, vectors.index(1)), add_pair(k, sums))

    return vectors.loop(builder, pairs, INPUT_STEP // 2, before, body)


def _spread_pair(builder: Any, address: Any) -> Any:
    """Two elements of a row, in all lanes."""
    word = builder.load(vectors.pointer(builder, address, ir.IntType(32)), align=2)
    lanes = builder.insert_element(
        ir.Constant(vectors.WORDS, ir.Undefined), word, ir.Constant(ir.IntType(32), 0)
    )
    return builder.bitcast(vectors.shuffle(builder, lanes, lanes, [0] * LANES), vectors.PAIRS)
