"""Attention of a sequence's newest token to its whole context, straight from the paged cache.

One pass over the cache, where gathering blocks first would read and write it once more. The
softmax runs over runs of ``RUN`` keys and is rescaled from one to the next (Milakov and Gimelshein,
arXiv:1805.02867). Runs begin at multiples of ``RUN``, so a result depends on the sequence's own
tokens alone, whatever its batch-mates and however many threads there are.

What a block holds beside these keys and values, and where, the caller knows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from engine.cpu.products import MOST_SUMS, ROW_STEP, add_weighted_rows, dot_rows, soften
from engine.cpu.values import (
    ELEMENT_BYTES,
    FLOAT32,
    FORMATS,
    fetch_early,
    load,
    load_integer,
    store,
)
from engine.cpu.vectors import LANES
from engine.kvcache.storage import LayerCache

RUN = 256
_TOKENS = 4  # keys of a register block
_QUERIES = MOST_SUMS // _TOKENS
_BLOCKS_AHEAD = 2
_EARLY_BYTES = 4096  # of the next block; the processor itself goes on from there


def serves(cache: LayerCache) -> bool:
    """Whether kernels can read this cache."""
    rows = cache.token_rows
    return (
        rows.device.type == "cpu"
        and rows.dtype in FORMATS
        and serves_rows(cache.width, cache.block_tokens)
    )


def serves_rows(width: int, block_tokens: int) -> bool:
    return width % ROW_STEP == 0 and block_tokens % LANES == 0 and RUN % block_tokens == 0


@dataclass(frozen=True, slots=True)
class Shape:
    """``queries`` share the keys; values are the first ``value_width`` elements of their rows."""

    queries: int
    key_width: int
    value_width: int
    block_tokens: int
    format: int

    @property
    def key_bytes(self) -> int:
        return self.key_width * ELEMENT_BYTES[self.format]

    @property
    def block_bytes(self) -> int:
        """Of the keys of one block."""
        return self.block_tokens * self.key_bytes

    @property
    def scratch_floats(self) -> int:
        """Of one thread: scores, sums, three numbers for each query."""
        return self.queries * (RUN + self.value_width + 4)


def attend_to_context(shape: Shape) -> Any:
    """For kernels: ``(rotated, context, table, blocks, stride, values, scale, scratch, out)``.

    ``rotated`` are the queries' rows; block b's keys are at ``blocks + b * stride``, its values
    ``values`` bytes further, as far from each other as keys are. Addresses and bytes throughout,
    ``out`` is (queries, value width).
    """
    queries, width, block_tokens = shape.queries, shape.value_width, shape.block_tokens
    scores_bytes, block_bytes, format_ = 4 * RUN, shape.block_bytes, shape.format
    early = min(block_bytes, _EARLY_BYTES)
    score, rescale, mix = _score(shape), _rescale(shape), _mix(shape)

    @njit(inline="always")
    def attend(
        rotated: int,
        context: int,
        table: int,
        blocks: int,
        stride: int,
        values: int,
        scale: float,
        scratch: int,
        out: int,
    ) -> None:
        sums = scratch + queries * scores_bytes
        states = sums + queries * 4 * width
        for query in range(queries):
            store(states, 4 * query, np.float32(-np.inf), FLOAT32)
            store(states, 4 * query + 1, np.float32(0.0), FLOAT32)
        for d in range(queries * width):
            store(sums, d, np.float32(0.0), FLOAT32)
        last = (context - 1) // block_tokens
        for first in range(0, context, RUN):
            count = min(RUN, context - first)
            for t in range(0, count, block_tokens):
                number = (first + t) // block_tokens
                keys = blocks + load_integer(table, number) * stride
                following = blocks + load_integer(table, min(number + _BLOCKS_AHEAD, last)) * stride
                fetch_early(following, early)
                fetch_early(keys + values, early)
                score(rotated, keys, scratch + 4 * t)
            rescale(scratch, sums, states, scale, count)
            for t in range(0, count, block_tokens):
                block = load_integer(table, (first + t) // block_tokens)
                tokens = min(block_tokens, count - t)
                mix(scratch + 4 * t, blocks + block * stride + values, tokens, sums)
        for query in range(queries):
            share = np.float32(1.0) / load(states, 4 * query + 1, FLOAT32)
            for d in range(query * width, (query + 1) * width):
                store(out, d, load(sums, d, FLOAT32) * share, format_)

    return attend


def rotate_row(width: int, format_: int) -> Any:
    """For kernels: ``(source, cos, sin, target)``, a head's row turned to its position.

    ``source`` and ``target`` may be the same.
    """
    half = width // 2

    @njit(inline="always")
    def rotate(source: int, cos: int, sin: int, target: int) -> None:
        for d in range(half):
            low, high = load(source, d, format_), load(source, half + d, format_)
            c, s = load(cos, d, format_), load(sin, half + d, format_)
            store(target, d, low * c - high * s, format_)
            store(target, half + d, high * c + low * s, format_)

    return rotate


def _score(shape: Shape) -> Any:
    """Products of all queries with the keys of one block."""
    queries, width, block_tokens = shape.queries, shape.key_width, shape.block_tokens
    row_bytes, scores_bytes, format_ = shape.key_bytes, 4 * RUN, shape.format
    most, whole, rest = _register_blocks(queries)

    @njit(inline="always")
    def score(rotated: int, keys: int, scores: int) -> None:
        for token in range(0, block_tokens, _TOKENS):
            key, place = keys + token * row_bytes, scores + 4 * token
            for query in range(0, whole, most):
                dot_rows(
                    rotated + query * row_bytes, row_bytes, key, row_bytes, width,
                    place + query * scores_bytes, scores_bytes, format_, most, _TOKENS,
                )  # fmt: skip
            if whole < queries:
                dot_rows(
                    rotated + whole * row_bytes, row_bytes, key, row_bytes, width,
                    place + whole * scores_bytes, scores_bytes, format_, rest, _TOKENS,
                )  # fmt: skip

    return score


def _rescale(shape: Shape) -> Any:
    """One run's scores made weights, and the sums so far brought to the same maximum."""
    queries, width, scores_bytes = shape.queries, shape.value_width, 4 * RUN

    @njit(inline="always")
    def rescale(scores: int, sums: int, states: int, scale: float, count: int) -> None:
        padded = (count + 15) // 16 * 16
        for query in range(queries):
            mine, state = scores + query * scores_bytes, states + 16 * query
            for t in range(count, padded):
                store(mine, t, np.float32(-np.inf), FLOAT32)
            soften(mine, padded, scale, state)
            factor = load(state, 2, FLOAT32)
            for d in range(query * width, (query + 1) * width):
                store(sums, d, load(sums, d, FLOAT32) * factor, FLOAT32)

    return rescale


def _mix(shape: Shape) -> Any:
    """Values of one block added to all queries' sums by their weights."""
    queries, width, format_ = shape.queries, shape.value_width, shape.format
    size, row_bytes = ELEMENT_BYTES[format_], shape.key_bytes
    scores_bytes, sums_bytes = 4 * RUN, 4 * width
    most, whole, rest = _register_blocks(queries)
    part = next(vectors for vectors in (4, 2) if width % (LANES * vectors) == 0)

    @njit(inline="always")
    def mix(weights: int, values: int, tokens: int, sums: int) -> None:
        for d in range(0, width, LANES * part):
            value, place = values + d * size, sums + 4 * d
            for query in range(0, whole, most):
                add_weighted_rows(
                    weights + query * scores_bytes, scores_bytes, value, row_bytes, tokens,
                    place + query * sums_bytes, sums_bytes, format_, most, part,
                )  # fmt: skip
            if whole < queries:
                add_weighted_rows(
                    weights + whole * scores_bytes, scores_bytes, value, row_bytes, tokens,
                    place + whole * sums_bytes, sums_bytes, format_, rest, part,
                )  # fmt: skip

    return mix


def _register_blocks(queries: int) -> tuple[int, int, int]:
    """Queries of a block, queries in whole blocks, queries of the last one (at least 1)."""
    most = min(queries, _QUERIES)
    return most, queries // most * most, max(queries % most, 1)
