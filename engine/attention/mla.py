"""Multi-head latent attention over a cache of latents (DeepSeek-V2, arXiv:2405.04434, 2.1).

The cache holds one row per token, cat(latent, roped key), for all heads. Decode absorbs the key
and value expansions into the query and the output, so that the rows are keys and values of one
shared head. Prefill expands the rows instead, which is a third of the work for many queries.
"""

# Shape suffixes: N tokens   H heads   P un-roped width   R roped width   C latent width
# V value width   W row width, C + R   L new tokens of a sequence   S context tokens

from functools import cache as cached
from functools import partial

import torch
from torch import Tensor

from engine.attention.decode import decode_attention
from engine.attention.plan import SequencePlan, plan_step
from engine.attention.prefill import causal_attention
from engine.batch import ForwardBatch
from engine.exact import Product, RowTiles, cancelling
from engine.kvcache.storage import LayerCache

EXPAND_HEAD_TOKENS = 128 * 1024  # expanded keys and values held at a time, in tokens times heads


def mla_attention(
    q_nope_NHP: Tensor,
    q_rope_NHR: Tensor,
    latent_NC: Tensor,
    k_rope_NR: Tensor,
    *,
    w_uk_HPC: Tensor,
    w_uv_HVC: Tensor,
    cache: LayerCache,
    batch: ForwardBatch,
    scale: float,
) -> Tensor:
    """Store the new rows, then attend causally to each sequence's context: (N, H, V).

    ``latent_NC`` is normed. In a decode-only batch a sequence's result is the same bits whatever
    its batch-mates are.
    """
    if batch.num_tokens == 0:
        return q_nope_NHP.new_empty((0, *w_uv_HVC.shape[:2]))
    plan = cache.plans.get(batch, partial(plan_step, cache=cache, query_heads=q_nope_NHP.shape[1]))
    rows_NW = torch.cat((latent_NC, k_rope_NR), -1)
    cache.write((rows_NW,), plan.write_rows_KN)
    if plan.decode is not None:
        absorbed_NHC = _multiply_heads(q_nope_NHP, w_uk_HPC)
        q_NHW = torch.cat((absorbed_NHC, q_rope_NHR), -1)
        mixed_NHW = decode_attention(q_NHW, cache, plan.decode, scale)
        return _multiply_heads(mixed_NHW[..., : latent_NC.shape[-1]], w_uv_HVC.transpose(1, 2))
    q_NHD = torch.cat((q_nope_NHP, q_rope_NHR), -1)
    return torch.cat(
        [
            _attend_chunk(
                q_NHD[sequence.tokens],
                _context_rows(rows_NW, cache, sequence),
                w_uk_HPC=w_uk_HPC,
                w_uv_HVC=w_uv_HVC,
                scale=scale,
            )
            for sequence in plan.sequences
        ]
    )


def _multiply_heads(x_NHI: Tensor, weight_HIO: Tensor) -> Tensor:
    """Each head's rows times its own matrix: (N, H, O), rows independent of each other."""
    tiles = _tiles_of(
        tuple(weight_HIO.shape), weight_HIO.dtype, weight_HIO.device, torch.get_num_threads()
    )
    x_HNI = x_NHI.transpose(0, 1).contiguous()
    return tiles.multiply(x_HNI, partial(torch.bmm, mat2=weight_HIO)).transpose(0, 1)


@cached
def _tiles_of(
    shape_HIO: tuple[int, int, int], dtype: torch.dtype, device: torch.device, _num_threads: int
) -> RowTiles:
    num_heads, in_features, out_features = shape_HIO

    def probe(num_rows: int) -> tuple[Tensor, Product]:
        x_HNI, weight_HOI = cancelling(
            (num_heads, num_rows, in_features), (num_heads, out_features, in_features)
        )
        weight_HIO = weight_HOI.to(device=device, dtype=dtype).transpose(1, 2)
        return x_HNI.to(device=device, dtype=dtype), partial(torch.bmm, mat2=weight_HIO)

    return RowTiles(probe)


def _context_rows(rows_NW: Tensor, cache: LayerCache, sequence: SequencePlan) -> Tensor:
    if sequence.gather_rows is None:
        return rows_NW[sequence.tokens]
    gathered = cache.block_rows.index_select(0, sequence.gather_rows)
    return gathered.view(-1, cache.width)[: sequence.context]


def _attend_chunk(
    q_LHD: Tensor, rows_SW: Tensor, *, w_uk_HPC: Tensor, w_uv_HVC: Tensor, scale: float
) -> Tensor:
    """Expand as many heads at a time as memory is meant for."""
    num_heads, latent_width = w_uk_HPC.shape[0], w_uk_HPC.shape[2]
    latent_SC, rope_SR = rows_SW[:, :latent_width].contiguous(), rows_SW[:, latent_width:]
    step = max(1, EXPAND_HEAD_TOKENS // rows_SW.shape[0])
    parts = []
    for start in range(0, num_heads, step):
        heads = slice(start, start + step)
        nope_HSP = torch.matmul(latent_SC, w_uk_HPC[heads].transpose(1, 2))
        rope_HSR = rope_SR.expand(nope_HSP.shape[0], -1, -1)
        value_HSV = torch.matmul(latent_SC, w_uv_HVC[heads].transpose(1, 2))
        key_HSD = torch.cat((nope_HSP, rope_HSR), -1)
        parts.append(causal_attention(q_LHD[:, heads], key_HSD, value_HSV, scale))
    return torch.cat(parts, dim=1)
