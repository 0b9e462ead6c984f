"""Attention of many new tokens to their contexts, for CPUs that add products of bf16 pairs.

Two kernels a layer. The first lays each context's keys and values out for products, from wherever
they are. The second takes some tokens' queries of all heads that share a KV head, and passes the
keys those can see in runs of ``RUN``, with the softmax rescaled from one to the next (Dao et al.,
arXiv:2205.14135), so that scores are never in memory that is not in a near cache.

Runs begin at multiples of ``RUN`` and sums are made in the order of the keys, so a token's result
is the same bits in whatever chunks its sequence comes, beside whichever others, on any number of
threads. What a model does to queries and keys before is not known here.
"""

# Shape suffixes: N new tokens   H query heads   D key width   V value width   I items   T tiles
# S tokens of all contexts, each padded to whole tiles

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.batch import ForwardBatch
from engine.cpu.causal_products import copy_word, pair_rows, weigh
from engine.cpu.packed_weights import MOST_ROWS, TILE, TILE_PAIR_BYTES, add_block, multiply_block
from engine.cpu.threads import Kernel, end_item, first_item, own_part
from engine.cpu.values import (
    BFLOAT16,
    FLOAT32,
    bits_of,
    float_of,
    load,
    load_integer,
    store,
)
from engine.cpu.vectors import LANES, has_bf16_dot

RUN = 256
_ITEM_ROWS = 8 * MOST_ROWS  # queries of an item, over tokens and heads: they share what is read
_SCORES_BYTES = 4 * (RUN + LANES)
_WEIGHTS_BYTES = 2 * (RUN + LANES)
_STATE_BYTES = 16
_SHARED_COST = 2**16  # of products of rows; below, waking threads takes longer than the work
_LOG2_E = 1.4426950408889634


def serves(device: torch.device, dtype: torch.dtype, key_width: int, value_width: int) -> bool:
    """Whether kernels here can attend with rows of these widths."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and key_width % TILE == 0
        and value_width % TILE == 0
        and has_bf16_dot()
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """``queries`` heads share a KV head. The last ``shared_width`` elements of a key are the same
    for all KV heads, and lie elsewhere than the others.
    """

    queries: int
    key_width: int
    shared_width: int
    value_width: int

    @property
    def tokens(self) -> int:
        """New tokens of an item."""
        return max(1, _ITEM_ROWS // self.queries)

    @property
    def rows(self) -> int:
        return self.tokens * self.queries

    @property
    def scratch_bytes(self) -> int:
        """Of one thread: scores, weights, queries, sums, states."""
        row = _SCORES_BYTES + _WEIGHTS_BYTES + 2 * self.key_width + 4 * self.value_width
        return self.rows * (row + _STATE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalPlan:
    """What all layers of a step share."""

    rows_S: Tensor  # int64: where in its memory each context token's row is; -1: padding
    tiles_T2: Tensor  # int64: the first tile of the same context, and how many that has
    items_I6: Tensor  # int64: cost before it, first row, tokens, position, the context's two
    cost: int  # of all items, for one KV head
    keys: Tensor  # room for what is laid out
    values: Tensor
    nothing: Tensor  # a row of padding
    scratch: Tensor
    threads: int


def plan_chunks(
    batch: ForwardBatch, rows_of_contexts: Sequence[Tensor], shape: Shape, kv_heads: int
) -> CausalPlan:
    """``rows_of_contexts`` names each sequence's rows, by token."""
    tiles: list[tuple[int, int]] = []
    items: list[tuple[int, ...]] = []
    padded: list[Tensor] = []
    row = cost = 0
    for rows_C, length, context in zip(
        rows_of_contexts, batch.query_lens, batch.context_lens, strict=True
    ):
        first, count = len(tiles), -(-context // TILE)
        tiles += [(first, count)] * count
        padded += [rows_C, rows_C.new_full((count * TILE - context,), -1)]
        for start in range(0, length, shape.tokens):
            tokens, position = min(shape.tokens, length - start), context - length + start
            items.append((cost, row + start, tokens, position, first, count))
            cost += tokens * (position + tokens)
        row += length
    threads = torch.get_num_threads() if cost * kv_heads > _SHARED_COST else 1
    num_keys = len(tiles) * TILE * kv_heads
    return CausalPlan(
        rows_S=torch.cat(padded),
        tiles_T2=torch.tensor(tiles),
        items_I6=torch.tensor(items),
        cost=cost,
        keys=torch.empty(num_keys * shape.key_width, dtype=torch.bfloat16),
        values=torch.empty(num_keys * shape.value_width, dtype=torch.bfloat16),
        nothing=torch.zeros(max(shape.key_width, shape.value_width), dtype=torch.bfloat16),
        scratch=torch.empty(threads * shape.scratch_bytes, dtype=torch.uint8),
        threads=threads,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows in memory: of token t and head h at ``address + t * token_bytes + h * head_bytes``."""

    address: int
    token_bytes: int
    head_bytes: int

    @classmethod
    def of(cls, x_NHD: Tensor) -> "Rows":
        """Of a tensor that the caller keeps."""
        token, head, _ = x_NHD.stride()
        size = x_NHD.element_size()
        return cls(address=x_NHD.data_ptr(), token_bytes=token * size, head_bytes=head * size)


def attend(
    q: Rows,
    keys: Rows,
    shared: Rows,
    values: Rows,
    out: Rows,
    *,
    plan: CausalPlan,
    shape: Shape,
    kv_heads: int,
    scale: float,
) -> None:
    """Fill ``out``. Tokens of it and of ``q`` are the batch's; of the others, the plan's rows.

    ``kv_heads`` is at most what the plan has room for; what they do not share of the last
    ``shared_width`` elements of keys is not read.
    """
    threads = plan.threads
    _lay_kernel(shape)(
        keys.address, keys.token_bytes, keys.head_bytes,
        shared.address, shared.token_bytes,
        values.address, values.token_bytes, values.head_bytes,
        plan.rows_S.data_ptr(), plan.tiles_T2.data_ptr(), plan.tiles_T2.shape[0], kv_heads,
        plan.keys.data_ptr(), plan.values.data_ptr(), plan.nothing.data_ptr(), threads=threads,
    )  # fmt: skip
    _attend_kernel(shape)(
        q.address, q.token_bytes, q.head_bytes,
        plan.keys.data_ptr(), plan.values.data_ptr(),
        plan.items_I6.data_ptr(), plan.items_I6.shape[0], plan.cost, kv_heads,
        bits_of(scale * _LOG2_E), plan.scratch.data_ptr(),
        out.address, out.token_bytes, out.head_bytes, threads=threads,
    )  # fmt: skip


def prepare(shape: Shape) -> None:
    """Compile for attention of these sizes."""
    _lay_kernel(shape)
    _attend_kernel(shape)


@cache
def _lay_kernel(shape: Shape) -> Kernel:
    own_words, shared_words = (shape.key_width - shape.shared_width) // 2, shape.shared_width // 2
    key_bytes, value_bytes = 2 * shape.key_width, 2 * shape.value_width
    parts = shape.value_width // TILE

    def lay(arguments: Any) -> None:
        heads, nothing = arguments[11], arguments[14]
        for number in range(first_item(heads * arguments[10]), end_item(heads * arguments[10])):
            tile, head = number // heads, number % heads
            first = load_integer(arguments[9], 2 * tile)
            tiles = load_integer(arguments[9], 2 * tile + 1)
            mine = (first * heads + head * tiles) * TILE  # rows before this head of the context
            rows = arguments[8] + 8 * tile * TILE
            target = arguments[12] + (mine + (tile - first) * TILE) * key_bytes
            for token in range(TILE):
                row = load_integer(rows, token)
                source = arguments[0] + row * arguments[1] + head * arguments[2]
                shared = arguments[3] + row * arguments[4]
                if row < 0:
                    source = shared = nothing
                for word in range(own_words):
                    copy_word(source, word, target, word * TILE + token)
                for word in range(shared_words):
                    copy_word(shared, word, target, (own_words + word) * TILE + token)
            values = arguments[5] + head * arguments[7]
            for pair in range(TILE // 2):
                row = load_integer(rows, 2 * pair)
                above = values + row * arguments[6] if row >= 0 else nothing
                row = load_integer(rows, 2 * pair + 1)
                below = values + row * arguments[6] if row >= 0 else nothing
                for part in range(parts):
                    place = (part * tiles + tile - first) * (TILE // 2) + pair
                    at = arguments[13] + mine * value_bytes + place * TILE_PAIR_BYTES
                    pair_rows(above + 2 * TILE * part, below + 2 * TILE * part, at)

    return Kernel(lay, astuple(shape))


@cache
def _attend_kernel(shape: Shape) -> Kernel:
    queries, most_rows, scratch_bytes = shape.queries, shape.rows, shape.scratch_bytes
    key_bytes, value_bytes = 2 * shape.key_width, 2 * shape.value_width
    key_words, width = shape.key_width // 2, shape.value_width
    parts, sums_bytes = width // TILE, 4 * width
    score, mix = _score(shape), _mix(shape)

    def attend(arguments: Any) -> None:
        heads, cost, scale = arguments[8], arguments[7], float_of(arguments[9])
        scores = own_part(arguments[10], scratch_bytes)
        weights = scores + most_rows * _SCORES_BYTES
        mine = weights + most_rows * _WEIGHTS_BYTES
        sums = mine + most_rows * key_bytes
        states = sums + most_rows * sums_bytes
        from_cost, to_cost = first_item(heads * cost), end_item(heads * cost)
        for number in range(heads * arguments[6]):
            head, item = number // arguments[6], arguments[5] + number % arguments[6] * 48
            before = head * cost + load_integer(item, 0)
            if before < from_cost or before >= to_cost:
                continue  # another thread's
            token, rows = load_integer(item, 1), load_integer(item, 2) * queries
            position = load_integer(item, 3)
            first, tiles = load_integer(item, 4), load_integer(item, 5)
            place = (first * heads + head * tiles) * TILE
            keys, values = arguments[3] + place * key_bytes, arguments[4] + place * value_bytes
            for row in range(rows):
                query = arguments[0] + (token + row // queries) * arguments[1]
                query += (head * queries + row % queries) * arguments[2]
                for word in range(key_words):
                    copy_word(query, word, mine + row * key_bytes, word)
                store(states, 4 * row, np.float32(-1e30), FLOAT32)
                store(states, 4 * row + 1, np.float32(0.0), FLOAT32)
            for d in range(rows * width):
                store(sums, d, np.float32(0.0), FLOAT32)

            last = position + rows // queries
            for run in range(0, last, RUN):
                seen = min(RUN, last - run)  # by the last row
                lowest = max(0, run - position) * queries  # the first row that sees any
                score(mine, keys + run * key_bytes, scores, rows, position - run, seen)
                for row in range(lowest, rows):
                    visible = min(seen, position - run + row // queries + 1)
                    weigh(
                        scores + row * _SCORES_BYTES, visible, seen, scale,
                        states + row * _STATE_BYTES, weights + row * _WEIGHTS_BYTES,
                    )  # fmt: skip
                    factor = load(states, 4 * row + 2, FLOAT32)
                    for d in range(row * width, (row + 1) * width):
                        store(sums, d, load(sums, d, FLOAT32) * factor, FLOAT32)
                for part in range(parts):
                    value = values + (part * tiles * TILE + run) // 2 * TILE_PAIR_BYTES
                    total = sums + part * 4 * TILE
                    mix(weights, value, total, lowest, rows, position - run, seen)

            for row in range(rows):
                share = np.float32(1.0) / load(states, 4 * row + 1, FLOAT32)
                at = arguments[11] + (token + row // queries) * arguments[12]
                at += (head * queries + row % queries) * arguments[13]
                for d in range(width):
                    store(at, d, load(sums, row * width + d, FLOAT32) * share, BFLOAT16)

    return Kernel(attend, astuple(shape))


def _score(shape: Shape) -> Any:
    """Products of queries with the keys of a run, tile by tile; of those that see any of it."""
    queries, key_bytes, pairs = shape.queries, 2 * shape.key_width, shape.key_width // 2

    @njit(inline="always")
    def score(mine: int, keys: int, scores: int, rows: int, position: int, seen: int) -> None:
        for key in range(0, seen, TILE):
            lowest = max(0, key - position) * queries
            blocks = (rows - lowest + MOST_ROWS - 1) // MOST_ROWS
            for block in range(blocks):
                row = lowest + (rows - lowest) * block // blocks
                count = lowest + (rows - lowest) * (block + 1) // blocks - row
                multiply_block(
                    mine + row * key_bytes, key_bytes, count, keys + key * key_bytes, pairs,
                    scores + row * _SCORES_BYTES + 4 * key, _SCORES_BYTES, FLOAT32,
                )  # fmt: skip

    return score


def _mix(shape: Shape) -> Any:
    """Values of a run added by their weights, 32 elements of them."""
    queries, sums_bytes = shape.queries, 4 * shape.value_width

    @njit(inline="always")
    def mix(
        weights: int, values: int, sums: int, lowest: int, rows: int, position: int, seen: int
    ) -> None:
        blocks = (rows - lowest + MOST_ROWS - 1) // MOST_ROWS
        for block in range(blocks):
            row = lowest + (rows - lowest) * block // blocks
            count = lowest + (rows - lowest) * (block + 1) // blocks - row
            visible = min(seen, position + (row + count - 1) // queries + 1)
            add_block(
                weights + row * _WEIGHTS_BYTES, _WEIGHTS_BYTES, count, values,
                (visible + 3) // 4 * 2, sums + row * sums_bytes, sums_bytes,
            )  # fmt: skip

    return mix
