"""Attention with grouped KV heads for steps that bring chunks, on the paged cache.

Norms and rotates queries and new keys, stores new keys and values, and attends to what the cache
then holds. Where a token's key and value lie is read from the batch alone.
"""

# Shape suffixes: N tokens   S heads of queries, keys and values   H query heads   W head width
# B sequences   J blocks of a sequence   C context tokens

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import GqaConfig
from engine.cpu import causal_attention
from engine.cpu.causal_attention import CausalPlan, Rows, Shape, plan_chunks
from engine.cpu.grouped_attention import HeadNorms
from engine.cpu.paged_attention import rotate_row
from engine.cpu.rows import norm_row
from engine.cpu.threads import Kernel, end_item, first_item
from engine.cpu.values import BFLOAT16, bits_of, float_of, load, load_integer, store
from engine.kvcache.storage import LayerCache
from engine.layers.rope import Rotation

_SIZE = 2  # bytes of an element
_SHARED_ELEMENTS = 2**15  # below, waking threads takes longer than the work


def serves(cache: LayerCache) -> bool:
    """Whether kernels can read this cache."""
    rows = cache.token_rows
    return causal_attention.serves(rows.device, rows.dtype, cache.width, cache.width)


def prepare(config: GqaConfig, dtype: torch.dtype) -> None:
    """Compile for attention of these sizes."""
    width = config.head_width
    if causal_attention.serves(torch.device("cpu"), dtype, width, width):
        causal_attention.prepare(_shape(config.num_heads // config.num_kv_heads, width))
        _store_kernel(width)


def grouped_prefill(
    qkv_NSW: Tensor,
    rotation: Rotation,
    cache: LayerCache,
    batch: ForwardBatch,
    *,
    scale: float,
    norms: HeadNorms | None = None,
) -> Tensor:
    """(N, H, W); stores the tokens' keys and values. The arguments are those of
    ``grouped_attention.grouped_decode``, for any batch with tokens.
    """
    num_tokens, num_rows, width = qkv_NSW.shape
    queries = num_rows // cache.heads - 2
    heads, row_bytes, shape = queries * cache.heads, width * _SIZE, _shape(queries, width)
    plan = cache.plans.get(batch, partial(_plan, shape=shape, cache=cache))
    _store_kernel(width)(
        qkv_NSW.data_ptr(),
        heads,
        cache.heads,
        num_tokens,
        rotation.cos_N1W.data_ptr(),
        rotation.sin_N1W.data_ptr(),
        cache.token_rows.data_ptr(),
        batch.slot_mapping.data_ptr(),
        cache.block_tokens,
        norms.query_W.data_ptr() if norms else 0,
        norms.key_W.data_ptr() if norms else 0,
        bits_of(norms.epsilon) if norms else 0,
        threads=torch.get_num_threads() if qkv_NSW.numel() > _SHARED_ELEMENTS else 1,
    )
    out_NHW = qkv_NSW.new_empty((num_tokens, heads, width))
    head_bytes = cache.block_tokens * row_bytes
    address = cache.token_rows.data_ptr()
    keys = Rows(address=address, token_bytes=row_bytes, head_bytes=head_bytes)
    values = replace(keys, address=address + cache.heads * head_bytes)
    causal_attention.attend(
        Rows.of(qkv_NSW),
        keys,
        keys,
        values,
        Rows.of(out_NHW),
        plan=plan,
        shape=shape,
        kv_heads=cache.heads,
        scale=scale,
    )
    return out_NHW


def _shape(queries: int, width: int) -> Shape:
    return Shape(queries=queries, key_width=width, shared_width=0, value_width=width)


def _plan(batch: ForwardBatch, *, shape: Shape, cache: LayerCache) -> CausalPlan:
    return plan_chunks(batch, list(_rows_of_contexts(batch, cache)), shape, cache.heads)


def _rows_of_contexts(batch: ForwardBatch, cache: LayerCache) -> Iterator[Tensor]:
    """Where the keys of each sequence's first head are among the cache's rows: (C,)."""
    tokens = cache.block_tokens
    offset_1T = torch.arange(tokens)[None]
    for table_J, context in zip(batch.block_tables, batch.context_lens, strict=True):
        block_J1 = table_J[: -(-context // tokens), None]
        yield (block_J1 * (2 * cache.heads * tokens) + offset_1T).flatten()[:context]


@cache
def _store_kernel(width: int) -> Kernel:
    row_bytes = width * _SIZE
    rotate, norm = rotate_row(width, BFLOAT16), norm_row(width, BFLOAT16)

    def store_rows(arguments: Any) -> None:
        heads, kv_heads, block_tokens = arguments[1], arguments[2], arguments[8]
        query_norm, key_norm, epsilon = arguments[9], arguments[10], float_of(arguments[11])
        head_bytes = block_tokens * row_bytes
        for n in range(first_item(arguments[3]), end_item(arguments[3])):
            cos, sin = arguments[4] + n * row_bytes, arguments[5] + n * row_bytes
            query = arguments[0] + n * (heads + 2 * kv_heads) * row_bytes
            for _ in range(heads):
                if query_norm:
                    norm(query, query_norm, epsilon, query)
                rotate(query, cos, sin, query)
                query += row_bytes
            slot = load_integer(arguments[7], n)
            block = slot // block_tokens * 2 * kv_heads * head_bytes
            target = arguments[6] + block + slot % block_tokens * row_bytes
            for head in range(kv_heads):
                key = query + head * row_bytes
                if key_norm:
                    norm(key, key_norm, epsilon, key)
                rotate(key, cos, sin, target)
                for d in range(width):
                    value = load(key + kv_heads * row_bytes, d, BFLOAT16)
                    store(target + kv_heads * head_bytes, d, value, BFLOAT16)
                target += head_bytes

    return Kernel(store_rows, width)
