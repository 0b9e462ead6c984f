"""Decode attention with grouped KV heads, straight from the paged cache.

Rotates queries and the new key, stores the new key and value, and attends, in one pass over the
cache; gathering blocks first would read and write it once more. A work item is a sequence and a
KV head, and nobody else touches what it stores.

The softmax runs over runs of ``RUN`` keys and is rescaled from one to the next (Milakov and
Gimelshein, arXiv:1805.02867). Runs begin at multiples of ``RUN``, so a sequence's result depends
on its own tokens alone, whatever its batch-mates and however many threads there are.
"""

# Shape suffixes: N sequences, one token each   S heads of queries, keys and values
# H query heads   W head width   M blocks of a table

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.batch import ForwardBatch
from engine.cpu.products import MOST_SUMS, ROW_STEP, add_weighted_rows, dot_rows, soften
from engine.cpu.threads import Kernel, end_item, first_item, own_part
from engine.cpu.values import (
    ELEMENT_BYTES,
    FLOAT32,
    FORMATS,
    bits_of,
    fetch_early,
    float_of,
    load,
    load_integer,
    store,
)
from engine.cpu.vectors import LANES
from engine.kvcache.storage import LayerCache
from engine.layers.rope import Rotation

RUN = 256
_TOKENS = 4  # keys of a register block
_QUERIES = MOST_SUMS // _TOKENS
_SHARED_ELEMENTS = 2**17  # of keys and values: below, waking threads takes longer than the work


def serves(cache: LayerCache) -> bool:
    """Whether the kernel can read this cache."""
    rows = cache.token_rows
    return (
        rows.device.type == "cpu"
        and rows.dtype in FORMATS
        and cache.keys_and_values
        and cache.width % ROW_STEP == 0
        and RUN % cache.block_tokens == 0
        and cache.block_tokens % 16 == 0
    )


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms over a query's and a key's own width (Qwen3)."""

    query_W: Tensor
    key_W: Tensor
    epsilon: float


def grouped_decode(
    qkv_NSW: Tensor,
    rotation: Rotation,
    cache: LayerCache,
    batch: ForwardBatch,
    *,
    scale: float,
    norms: HeadNorms | None = None,
) -> Tensor:
    """(N, H, W) for a batch whose sequences bring one token each; stores their keys and values.

    ``qkv_NSW`` is contiguous: query heads, then key heads, then value heads, neither normed nor
    rotated yet.
    """
    num_sequences, num_rows, width = qkv_NSW.shape
    queries = num_rows // cache.heads - 2
    out_NHW = qkv_NSW.new_empty((num_sequences, queries * cache.heads, width))
    plan = cache.plans.get(batch, partial(_plan, queries=queries, width=width, heads=cache.heads))
    _kernel(queries, width, cache.block_tokens, FORMATS[qkv_NSW.dtype])(
        qkv_NSW.data_ptr(),
        cache.token_rows.data_ptr(),
        batch.block_tables.data_ptr(),
        plan.context_N.data_ptr(),
        rotation.cos_N1W.data_ptr(),
        rotation.sin_N1W.data_ptr(),
        out_NHW.data_ptr(),
        plan.workspace.data_ptr(),
        num_sequences,
        cache.heads,
        batch.block_tables.shape[1],
        bits_of(scale),
        norms.query_W.data_ptr() if norms else 0,
        norms.key_W.data_ptr() if norms else 0,
        bits_of(norms.epsilon) if norms else 0,
        threads=plan.threads,
    )
    return out_NHW


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    context_N: Tensor
    workspace: Tensor
    threads: int


def _plan(batch: ForwardBatch, *, queries: int, width: int, heads: int) -> _Plan:
    threads = torch.get_num_threads()
    shared = sum(batch.context_lens) * heads * width > _SHARED_ELEMENTS
    return _Plan(
        context_N=torch.tensor(batch.context_lens),
        workspace=torch.empty(threads * _workspace_floats(queries, width)),
        threads=threads if shared else 1,
    )


def _workspace_floats(queries: int, width: int) -> int:
    """Of one thread: scores, sums, one row, rotated queries, three numbers for each query."""
    return queries * (RUN + 2 * width + 4) + width + 16


@cache
def _kernel(queries: int, width: int, block_tokens: int, format_: int) -> Kernel:
    """For ``queries`` query heads of a KV head."""
    size = ELEMENT_BYTES[format_]
    row_bytes, scores_bytes, sums_bytes = width * size, 4 * RUN, 4 * width
    block_bytes = block_tokens * row_bytes
    workspace_bytes = 4 * _workspace_floats(queries, width)
    rotate = _rotate(width, format_)
    score = _score(queries, width, block_tokens, format_)
    rescale = _rescale(queries, width)
    mix = _mix(queries, width, format_)

    def attend(arguments: Any) -> None:
        blocks, heads = arguments[1], arguments[9]
        scale, epsilon = float_of(arguments[11]), float_of(arguments[14])
        scores = own_part(arguments[7], workspace_bytes)
        sums = scores + queries * scores_bytes
        states = sums + queries * sums_bytes
        row = states + queries * 16
        rotated = row + sums_bytes
        for item in range(first_item(arguments[8] * heads), end_item(arguments[8] * heads)):
            sequence, head = item // heads, item % heads
            context = load_integer(arguments[3], sequence)
            table = arguments[2] + 8 * sequence * arguments[10]
            cos, sin = arguments[4] + sequence * row_bytes, arguments[5] + sequence * row_bytes
            qkv = arguments[0] + sequence * heads * (queries + 2) * row_bytes
            last_block = (context - 1) // block_tokens

            keys = blocks + (2 * load_integer(table, last_block) * heads + head) * block_bytes
            newest = keys + (context - 1) % block_tokens * row_bytes
            source = qkv + (heads * queries + head) * row_bytes
            rotate(source, cos, sin, arguments[13], epsilon, row, newest)
            for d in range(width):
                value = load(source + heads * row_bytes, d, format_)
                store(newest + heads * block_bytes, d, value, format_)
            for query in range(queries):
                source = qkv + (head * queries + query) * row_bytes
                rotate(source, cos, sin, arguments[12], epsilon, row, rotated + query * row_bytes)
                store(states, 4 * query, np.float32(-np.inf), FLOAT32)
                store(states, 4 * query + 1, np.float32(0.0), FLOAT32)
            for d in range(queries * width):
                store(sums, d, np.float32(0.0), FLOAT32)

            for first in range(0, context, RUN):
                count = min(RUN, context - first)
                for t in range(0, count, block_tokens):
                    number = (first + t) // block_tokens
                    keys = blocks + (2 * load_integer(table, number) * heads + head) * block_bytes
                    following = load_integer(table, min(number + 1, last_block))
                    fetch_early(blocks + (2 * following * heads + head) * block_bytes, block_bytes)
                    fetch_early(keys + heads * block_bytes, block_bytes)
                    score(rotated, keys, scores + 4 * t)
                rescale(scores, sums, states, scale, count)
                for t in range(0, count, block_tokens):
                    block = load_integer(table, (first + t) // block_tokens)
                    values = blocks + (2 * block * heads + heads + head) * block_bytes
                    mix(scores + 4 * t, values, min(block_tokens, count - t), sums)
            out = arguments[6] + item * queries * row_bytes
            for query in range(queries):
                share = np.float32(1.0) / load(states, 4 * query + 1, FLOAT32)
                for d in range(query * width, (query + 1) * width):
                    store(out, d, load(sums, d, FLOAT32) * share, format_)

    return Kernel(attend)


def _rotate(width: int, format_: int) -> Any:
    """A head's row normed, if there is a norm, and turned to its position."""
    half = width // 2

    @njit(inline="always")
    def rotate(
        source: int, cos: int, sin: int, norm: int, epsilon: float, row: int, target: int
    ) -> None:
        total = np.float32(0.0)
        for d in range(width):
            element = load(source, d, format_)
            store(row, d, element, FLOAT32)
            total += element * element
        if norm:
            factor = np.float32(1.0) / np.float32(math.sqrt(total / width + epsilon))
            for d in range(width):
                store(row, d, load(row, d, FLOAT32) * factor * load(norm, d, format_), FLOAT32)
        for d in range(half):
            low, high = load(row, d, FLOAT32), load(row, half + d, FLOAT32)
            c, s = load(cos, d, format_), load(sin, half + d, format_)
            store(target, d, low * c - high * s, format_)
            store(target, half + d, high * c + low * s, format_)

    return rotate


def _score(queries: int, width: int, block_tokens: int, format_: int) -> Any:
    """Products of all queries with the keys of one block."""
    row_bytes, scores_bytes = width * ELEMENT_BYTES[format_], 4 * RUN
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


def _rescale(queries: int, width: int) -> Any:
    """One run's scores made weights, and the sums so far brought to the same maximum."""
    scores_bytes = 4 * RUN

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


def _mix(queries: int, width: int, format_: int) -> Any:
    """Values of one block added to all queries' sums by their weights."""
    size = ELEMENT_BYTES[format_]
    row_bytes, scores_bytes, sums_bytes = width * size, 4 * RUN, 4 * width
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
