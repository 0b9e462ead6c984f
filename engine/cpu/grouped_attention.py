"""Decode attention with grouped KV heads (Llama, Mixtral, Qwen3-MoE) on the paged cache.

Norms and rotates queries and the new key, stores the new key and value, and attends. A work item
is a sequence and a KV head, and nobody else touches what it stores.
"""

# Shape suffixes: N sequences, one token each   S heads of queries, keys and values
# H query heads   W head width

from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import GqaConfig
from engine.cpu.paged_attention import (
    Shape,
    attend_to_context,
    rotate_row,
    serves_rows,
)
from engine.cpu.rows import norm_row
from engine.cpu.threads import Kernel, end_item, first_item, own_part
from engine.cpu.values import FORMATS, bits_of, float_of, load, load_integer, store
from engine.kvcache.storage import LayerCache
from engine.layers.rope import Rotation

SHARED_ELEMENTS = 2**17  # of keys and values: below, waking threads takes longer than the work


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the norms over a query's and a key's own width (Qwen3)."""

    query_W: Tensor
    key_W: Tensor
    epsilon: float


def prepare(config: GqaConfig, block_tokens: int, dtype: torch.dtype) -> None:
    """Compile for attention of these sizes."""
    if serves_rows(config.head_width, block_tokens):
        queries, width = config.num_heads // config.num_kv_heads, config.head_width
        _kernel(Shape(queries, width, width, block_tokens, FORMATS[dtype]))


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
    rotated yet; it is overwritten.
    """
    num_sequences, num_rows, width = qkv_NSW.shape
    queries = num_rows // cache.heads - 2
    shape = Shape(queries, width, width, cache.block_tokens, FORMATS[qkv_NSW.dtype])
    plan = cache.plans.get(batch, partial(plan_decode, shape=shape, cache=cache))
    out_NHW = qkv_NSW.new_empty((num_sequences, queries * cache.heads, width))
    _kernel(shape)(
        qkv_NSW.data_ptr(),
        cache.token_rows.data_ptr(),
        batch.block_tables.data_ptr(),
        plan.context_N.data_ptr(),
        rotation.cos_N1W.data_ptr(),
        rotation.sin_N1W.data_ptr(),
        out_NHW.data_ptr(),
        plan.scratch.data_ptr(),
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
class DecodePlan:
    """What all layers of a step share."""

    context_N: Tensor
    scratch: Tensor
    threads: int


def plan_decode(batch: ForwardBatch, *, shape: Shape, cache: LayerCache) -> DecodePlan:
    threads = torch.get_num_threads()
    elements = sum(batch.context_lens) * cache.heads * shape.key_width
    return DecodePlan(
        context_N=torch.tensor(batch.context_lens),
        scratch=torch.empty(threads * shape.scratch_floats),
        threads=threads if elements > SHARED_ELEMENTS else 1,
    )


@cache
def _kernel(shape: Shape) -> Kernel:
    queries, width, format_ = shape.queries, shape.key_width, shape.format
    row_bytes, block_bytes, block_tokens = shape.key_bytes, shape.block_bytes, shape.block_tokens
    scratch_bytes = 4 * shape.scratch_floats
    attend, rotate = attend_to_context(shape), rotate_row(width, format_)
    norm = norm_row(width, format_)

    def decode(arguments: Any) -> None:
        heads, query_norm, key_norm = arguments[9], arguments[12], arguments[13]
        scale, epsilon = float_of(arguments[11]), float_of(arguments[14])
        scratch, stride = own_part(arguments[7], scratch_bytes), 2 * heads * block_bytes
        for item in range(first_item(arguments[8] * heads), end_item(arguments[8] * heads)):
            sequence, head = item // heads, item % heads
            context = load_integer(arguments[3], sequence)
            table = arguments[2] + 8 * sequence * arguments[10]
            cos, sin = arguments[4] + sequence * row_bytes, arguments[5] + sequence * row_bytes
            qkv = arguments[0] + sequence * heads * (queries + 2) * row_bytes
            blocks = arguments[1] + head * block_bytes

            block = load_integer(table, (context - 1) // block_tokens)
            newest = blocks + block * stride + (context - 1) % block_tokens * row_bytes
            key = qkv + (heads * queries + head) * row_bytes
            if key_norm:
                norm(key, key_norm, epsilon, key)
            rotate(key, cos, sin, newest)
            for d in range(width):
                value = load(key + heads * row_bytes, d, format_)
                store(newest + heads * block_bytes, d, value, format_)
            mine = qkv + head * queries * row_bytes
            for query in range(queries):
                if query_norm:
                    one = mine + query * row_bytes
                    norm(one, query_norm, epsilon, one)
                rotate(mine + query * row_bytes, cos, sin, mine + query * row_bytes)
            attend(
                mine, context, table, blocks, stride, heads * block_bytes, scale, scratch,
                arguments[6] + item * queries * row_bytes,
            )  # fmt: skip

    return Kernel(decode, astuple(shape))
