"""Decode attention on a paged cache of latents (DeepSeek-V2, arXiv:2405.04434, section 2.1).

The key and value expansions are absorbed into the query and the output, so a cached row is key and
value of all heads. A step is four kernels: absorb, rotate and store, attend, expand. A result
depends on the sequence's own tokens alone.
"""

# Shape suffixes: N sequences, one token each   H heads   X H * (P + R)   P un-roped width
# R roped width   C latent width   V value width   W row width, C + R   I, O in and out features

from dataclasses import astuple
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import MlaConfig
from engine.cpu.grouped_attention import plan_decode
from engine.cpu.paged_attention import Shape, attend_to_context, rotate_row, serves_rows
from engine.cpu.products import ROW_STEP
from engine.cpu.threads import Kernel, end_item, first_item, own_part
from engine.cpu.tiles import TILE, TILE_FLOATS, TILE_ROWS, tile_products
from engine.cpu.values import (
    ELEMENT_BYTES,
    FLOAT32,
    FORMATS,
    bits_of,
    float_of,
    load,
    load_integer,
    store,
)
from engine.kvcache.storage import LayerCache
from engine.layers.rope import Rotation

_MOST_QUERIES = 16  # heads of a work item


def serves_heads(config: MlaConfig) -> bool:
    """Whether the kernels can multiply by expansions of these sizes."""
    widths = (config.nope_width, config.latent_width, config.value_width)
    return all(width % ROW_STEP == 0 for width in widths)


def prepare(config: MlaConfig, block_tokens: int, dtype: torch.dtype) -> None:
    """Compile for attention of these sizes."""
    latent, width = config.latent_width, config.latent_width + config.rope_width
    if serves_heads(config) and serves_rows(width, block_tokens):
        format_ = FORMATS[dtype]
        _heads_kernel(config.nope_width, latent, format_)
        _heads_kernel(latent, config.value_width, format_)
        _store_kernel(width, latent, format_)
        _attend_kernel(Shape(_queries(config.num_heads), width, latent, block_tokens, format_))


def _queries(heads: int) -> int:
    """Of a work item: the most that divide the heads evenly."""
    return max(count for count in range(1, _MOST_QUERIES + 1) if heads % count == 0)


def latent_decode(
    q_NX: Tensor,
    latent_NC: Tensor,
    key_NR: Tensor,
    rotation: Rotation,
    cache: LayerCache,
    batch: ForwardBatch,
    *,
    w_uk_HCP: Tensor,
    w_uv_HVC: Tensor,
    scale: float,
) -> Tensor:
    """(N, H, V) for a batch whose sequences bring one token each; stores their rows.

    ``q_NX`` has all heads' un-roped parts, then all their roped parts, as the projection made them;
    ``latent_NC`` is normed; ``key_NR`` is not rotated yet. Rows may be any distance apart.
    """
    heads, latent, nope = w_uk_HCP.shape
    queries = _queries(heads)
    shape = Shape(queries, cache.width, latent, cache.block_tokens, FORMATS[q_NX.dtype])
    plan = cache.plans.get(batch, partial(plan_decode, shape=shape, cache=cache))
    num_sequences, size = len(q_NX), q_NX.element_size()
    q_NHW = q_NX.new_empty((num_sequences, heads, cache.width))
    mixed_NHC = q_NX.new_empty((num_sequences, heads, latent))
    out_NHV = q_NX.new_empty((num_sequences, heads, w_uv_HVC.shape[1]))
    q_nope_NHP = q_NX[:, : heads * nope].view(-1, heads, nope)
    _multiply_heads(q_nope_NHP, w_uk_HCP, q_NHW)
    _store_kernel(cache.width, latent, shape.format)(
        q_NX[:, heads * nope :].data_ptr(),
        q_NX.stride(0) * size,
        latent_NC.data_ptr(),
        latent_NC.stride(0) * size,
        key_NR.data_ptr(),
        key_NR.stride(0) * size,
        rotation.cos_N1W.data_ptr(),
        rotation.sin_N1W.data_ptr(),
        cache.token_rows.data_ptr(),
        batch.slot_mapping.data_ptr(),
        q_NHW.data_ptr(),
        heads,
        num_sequences,
    )
    _attend_kernel(shape)(
        q_NHW.data_ptr(),
        cache.token_rows.data_ptr(),
        batch.block_tables.data_ptr(),
        plan.context_N.data_ptr(),
        mixed_NHC.data_ptr(),
        plan.scratch.data_ptr(),
        num_sequences,
        heads // queries,
        batch.block_tables.shape[1],
        bits_of(scale),
        threads=plan.threads,
    )
    _multiply_heads(mixed_NHC, w_uv_HVC, out_NHV)
    return out_NHV


def _multiply_heads(x_NHI: Tensor, weight_HOI: Tensor, out_NHO: Tensor) -> None:
    """Each head's rows times its own matrix, into the first O elements of ``out``'s rows."""
    size = x_NHI.element_size()
    heads, outputs, length = weight_HOI.shape
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * TILE_FLOATS)
    _heads_kernel(length, outputs, FORMATS[x_NHI.dtype])(
        x_NHI.data_ptr(),
        x_NHI.stride(0) * size,
        x_NHI.stride(1) * size,
        weight_HOI.data_ptr(),
        out_NHO.data_ptr(),
        out_NHO.stride(0) * size,
        out_NHO.stride(1) * size,
        x_NHI.shape[0],
        heads,
        scratch.data_ptr(),
        threads=threads,
    )


@cache
def _heads_kernel(length: int, outputs: int, format_: int) -> Kernel:
    row_bytes, tiles = length * ELEMENT_BYTES[format_], -(-outputs // TILE)
    size, scratch_bytes = ELEMENT_BYTES[format_], 4 * TILE_FLOATS
    multiply = tile_products(length, format_)

    def heads(arguments: Any) -> None:
        x, x_stride, weights, out = arguments[0], arguments[1], arguments[3], arguments[4]
        products, items = own_part(arguments[9], scratch_bytes), arguments[8] * tiles
        for item in range(first_item(items), end_item(items)):
            head, first = item // tiles, item % tiles * TILE
            units = min(TILE, outputs - first)
            weight = weights + (head * outputs + first) * row_bytes
            for row in range(0, arguments[7], TILE_ROWS):
                rows = min(TILE_ROWS, arguments[7] - row)
                left = x + row * x_stride + head * arguments[2]
                multiply(left, x_stride, rows, weight, units, products)
                for number in range(rows):
                    place = out + (row + number) * arguments[5] + head * arguments[6] + first * size
                    for d in range(units):
                        store(place, d, load(products, number * TILE + d, FLOAT32), format_)

    return Kernel(heads, (length, outputs, format_))


@cache
def _store_kernel(width: int, latent: int, format_: int) -> Kernel:
    """New rows into the cache, and every head's roped part of the query behind its absorbed one."""
    size = ELEMENT_BYTES[format_]
    roped = width - latent
    rotate = rotate_row(roped, format_)

    def store_rows(arguments: Any) -> None:
        heads = arguments[11]
        for n in range(first_item(arguments[12]), end_item(arguments[12])):
            cos = arguments[6] + n * roped * size
            sin = arguments[7] + n * roped * size
            row = arguments[8] + load_integer(arguments[9], n) * width * size
            source = arguments[2] + n * arguments[3]
            for d in range(latent):
                store(row, d, load(source, d, format_), format_)
            rotate(arguments[4] + n * arguments[5], cos, sin, row + latent * size)
            for head in range(heads):
                query = arguments[0] + n * arguments[1] + head * roped * size
                target = arguments[10] + ((n * heads + head) * width + latent) * size
                rotate(query, cos, sin, target)

    return Kernel(store_rows, (width, latent, format_))


@cache
def _attend_kernel(shape: Shape) -> Kernel:
    scratch_bytes, block_bytes = 4 * shape.scratch_floats, shape.block_bytes
    queries_bytes = shape.queries * shape.key_bytes
    out_bytes = shape.queries * shape.value_width * ELEMENT_BYTES[shape.format]
    attend = attend_to_context(shape)

    def decode(arguments: Any) -> None:
        groups, scale = arguments[7], float_of(arguments[9])
        scratch, items = own_part(arguments[5], scratch_bytes), arguments[6] * groups
        for item in range(first_item(items), end_item(items)):
            sequence = item // groups
            context = load_integer(arguments[3], sequence)
            table = arguments[2] + 8 * sequence * arguments[8]
            attend(
                arguments[0] + item * queries_bytes, context, table, arguments[1], block_bytes, 0,
                scale, scratch, arguments[4] + item * out_bytes,
            )  # fmt: skip

    return Kernel(decode, astuple(shape))
