"""Attention on a paged cache of latents for steps that bring chunks.

Stores the new rows, expands those of every context to keys and values, some heads at a time, and
attends to them (``causal_attention``). What decode absorbs is expanded here because many queries
share it. A token's result depends on its own sequence alone.
"""

# Shape suffixes: N new tokens   H heads   X H * (P + R)   P un-roped width   R roped width
# C latent width   V value width   W row width, C + R   D query width, P + R   B sequences
# J blocks of a sequence   M tokens of all contexts   K pieces of packed weights

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import MlaConfig
from engine.cpu import causal_attention, packed_weights
from engine.cpu.causal_attention import CausalPlan, Rows, Shape, plan_chunks
from engine.cpu.packed_weights import TILE
from engine.cpu.paged_attention import rotate_row
from engine.cpu.threads import Kernel, end_item, first_item
from engine.cpu.values import BFLOAT16, load, load_integer, store
from engine.kvcache.storage import LayerCache
from engine.layers.rope import Rotation

EXPAND_HEAD_TOKENS = 128 * 1024  # expanded keys and values held at a time, in tokens times heads
_SIZE = 2  # bytes of an element
_SHARED_ELEMENTS = 2**15  # below, waking threads takes longer than the work


def serves(config: MlaConfig, weight: Tensor) -> bool:
    """Whether kernels can attend with heads of these sizes; ``weight`` is an expansion."""
    return (
        causal_attention.serves(
            weight.device, weight.dtype, config.nope_width + config.rope_width, config.value_width
        )
        and config.nope_width % TILE == 0
        and packed_weights.serves_as(weight.device, weight.dtype, config.latent_width)
    )


def prepare(config: MlaConfig, dtype: torch.dtype) -> None:
    """Compile for attention of these sizes."""
    if serves(config, torch.empty(0, dtype=dtype)):
        causal_attention.prepare(_shape(config.nope_width, config.rope_width, config.value_width))
        _store_kernel(config.nope_width, config.rope_width, config.latent_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expansions:
    """What makes all heads' keys and values of a latent, laid out for products."""

    heads: int
    nope_width: int
    value_width: int
    key_KPJ2: Tensor
    value_KPJ2: Tensor

    @classmethod
    def of(cls, key_HPC: Tensor, value_HVC: Tensor) -> "Expansions":
        return cls(
            heads=key_HPC.shape[0],
            nope_width=key_HPC.shape[1],
            value_width=value_HVC.shape[1],
            key_KPJ2=packed_weights.pack(key_HPC.flatten(0, 1)),
            value_KPJ2=packed_weights.pack(value_HVC.flatten(0, 1)),
        )


def latent_prefill(
    q_NX: Tensor,
    latent_NC: Tensor,
    key_NR: Tensor,
    rotation: Rotation,
    cache: LayerCache,
    batch: ForwardBatch,
    *,
    expansions: Expansions,
    scale: float,
) -> Tensor:
    """(N, H, V); stores the tokens' rows. The arguments are those of
    ``latent_attention.latent_decode``, for any batch with tokens.
    """
    num_tokens, heads, latent = len(q_NX), expansions.heads, latent_NC.shape[1]
    nope, values, roped = expansions.nope_width, expansions.value_width, key_NR.shape[1]
    shape = _shape(nope, roped, values)
    plan = cache.plans.get(batch, partial(_plan, shape=shape, cache=cache, heads=heads))
    q_NHD = q_NX.new_empty((num_tokens, heads, shape.key_width))
    _store_kernel(nope, roped, latent)(
        q_NX.data_ptr(),
        q_NX.stride(0) * _SIZE,
        latent_NC.data_ptr(),
        latent_NC.stride(0) * _SIZE,
        key_NR.data_ptr(),
        key_NR.stride(0) * _SIZE,
        rotation.cos_N1W.data_ptr(),
        rotation.sin_N1W.data_ptr(),
        cache.token_rows.data_ptr(),
        batch.slot_mapping.data_ptr(),
        q_NHD.data_ptr(),
        heads,
        num_tokens,
        threads=torch.get_num_threads() if q_NHD.numel() > _SHARED_ELEMENTS else 1,
    )
    rows_MW = cache.token_rows.index_select(0, plan.rows_M)
    latent_MC, shared_MR = rows_MW[:, :latent], rows_MW[:, latent:]
    out_NHV = q_NX.new_empty((num_tokens, heads, values))
    for first in range(0, heads, plan.heads):
        count = min(plan.heads, heads - first)
        nope_MHP = _expand(latent_MC, expansions.key_KPJ2, first, count, nope)
        value_MHV = _expand(latent_MC, expansions.value_KPJ2, first, count, values)
        causal_attention.attend(
            Rows.of(q_NHD[:, first:]),
            Rows.of(nope_MHP),
            Rows.of(shared_MR.unsqueeze(1)),
            Rows.of(value_MHV),
            Rows.of(out_NHV[:, first:]),
            plan=plan.causal,
            shape=shape,
            kv_heads=count,
            scale=scale,
        )
    return out_NHV


def _shape(nope: int, roped: int, values: int) -> Shape:
    return Shape(queries=1, key_width=nope + roped, shared_width=roped, value_width=values)


def _expand(latent_MC: Tensor, weight_KPJ2: Tensor, first: int, heads: int, width: int) -> Tensor:
    """(M, heads, width) by the part of the weight that those heads have."""
    pieces = width // TILE
    mine_KPJ2 = weight_KPJ2[first * pieces : (first + heads) * pieces]
    return packed_weights.multiply(latent_MC, mine_KPJ2, heads * width).view(-1, heads, width)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPlan:
    """What all layers of a step share."""

    causal: CausalPlan
    rows_M: Tensor  # into LayerCache.token_rows
    heads: int  # that are expanded at a time


def _plan(batch: ForwardBatch, *, shape: Shape, cache: LayerCache, heads: int) -> LatentPlan:
    rows_M = torch.cat(list(_rows_of_contexts(batch, cache.block_tokens)))
    together = min(heads, max(1, EXPAND_HEAD_TOKENS // len(rows_M)))
    places = torch.split_with_sizes(torch.arange(len(rows_M)), batch.context_lens)
    return LatentPlan(
        causal=plan_chunks(batch, places, shape, together), rows_M=rows_M, heads=together
    )


def _rows_of_contexts(batch: ForwardBatch, block_tokens: int) -> Iterator[Tensor]:
    offset_1T = torch.arange(block_tokens)[None]
    for table_J, context in zip(batch.block_tables, batch.context_lens, strict=True):
        block_J1 = table_J[: -(-context // block_tokens), None]
        yield (block_J1 * block_tokens + offset_1T).flatten()[:context]


@cache
def _store_kernel(nope: int, roped: int, latent: int) -> Kernel:
    """New rows into the cache; of every query its two parts beside each other."""
    width, rotate = nope + roped, rotate_row(roped, BFLOAT16)

    def store_rows(arguments: Any) -> None:
        heads = arguments[11]
        for n in range(first_item(arguments[12]), end_item(arguments[12])):
            cos = arguments[6] + n * roped * _SIZE
            sin = arguments[7] + n * roped * _SIZE
            slot = load_integer(arguments[9], n)
            row = arguments[8] + slot * (latent + roped) * _SIZE
            source = arguments[2] + n * arguments[3]
            for d in range(latent):
                store(row, d, load(source, d, BFLOAT16), BFLOAT16)
            rotate(arguments[4] + n * arguments[5], cos, sin, row + latent * _SIZE)
            query = arguments[0] + n * arguments[1]
            for head in range(heads):
                target = arguments[10] + (n * heads + head) * width * _SIZE
                for d in range(nope):
                    store(target, d, load(query, head * nope + d, BFLOAT16), BFLOAT16)
                turning = query + (heads * nope + head * roped) * _SIZE
                rotate(turning, cos, sin, target + nope * _SIZE)

    return Kernel(store_rows, (nope, roped, latent))
