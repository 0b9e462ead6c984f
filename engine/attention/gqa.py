"""Attention with grouped KV heads over the paged cache: first form."""

# Shape suffixes: N tokens   H query heads   G KV heads   D head width   S context tokens

import torch
from torch import Tensor
from torch.nn import functional

from engine.batch import ForwardBatch
from engine.kvcache.storage import LayerCache


def gqa_attention(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    *,
    cache: LayerCache,
    batch: ForwardBatch,
    scale: float,
) -> Tensor:
    """Store the new keys and values, then attend causally to each sequence's context: (N, H, D)."""
    if batch.num_tokens == 0:
        return q_NHD
    cache.write_gqa(k_NGD, v_NGD, batch.slot_mapping)
    repeats = q_NHD.shape[1] // k_NGD.shape[1]
    out, start = [], 0
    for row, (length, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        num_blocks = cache.layout.blocks_for(context)
        kv = cache.blocks[batch.block_tables[row, :num_blocks]]
        kv = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
        k, v = kv.repeat_interleave(repeats, 1)
        q = q_NHD[start : start + length].transpose(0, 1)
        mask = torch.ones(length, context, dtype=torch.bool, device=q.device)
        mask = mask.tril(context - length)
        attended = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, scale=scale
        )
        out.append(attended[0].transpose(0, 1))
        start += length
    return torch.cat(out)
