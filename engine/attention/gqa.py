"""Attention with grouped KV heads (Ainslie et al., arXiv:2305.13245) over the paged cache."""

# Shape suffixes: N tokens   H query heads   G KV heads   D head width   L new tokens of a sequence
# S context tokens

from functools import partial

import torch
from torch import Tensor

from engine.attention.decode import decode_attention
from engine.attention.plan import SequencePlan, plan_step
from engine.attention.prefill import causal_attention
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
    """Store the new keys and values, then attend causally to each sequence's context: (N, H, D).

    In a decode-only batch a sequence's result is the same bits whatever its batch-mates are.
    """
    if batch.num_tokens == 0:
        return q_NHD
    plan = cache.plans.get(batch, partial(plan_step, cache=cache, query_heads=q_NHD.shape[1]))
    cache.write((k_NGD, v_NGD), plan.write_rows_KN)
    if plan.decode is not None:
        return decode_attention(q_NHD, cache, plan.decode, scale)
    parts = [
        _attend_chunk(q_NHD, k_NGD, v_NGD, cache=cache, sequence=sequence, scale=scale)
        for sequence in plan.sequences
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_chunk(
    q_NHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    *,
    cache: LayerCache,
    sequence: SequencePlan,
    scale: float,
) -> Tensor:
    tokens = sequence.tokens
    if sequence.gather_rows is None:
        k_GSD, v_GSD = k_NGD[tokens].transpose(0, 1), v_NGD[tokens].transpose(0, 1)
    else:
        gathered = cache.block_rows.index_select(0, sequence.gather_rows)
        rows_KGSD = gathered.view(2, cache.heads, -1, cache.width)[:, :, : sequence.context]
        k_GSD, v_GSD = rows_KGSD.unbind()
    return causal_attention(q_NHD[tokens], k_GSD.contiguous(), v_GSD.contiguous(), scale)
