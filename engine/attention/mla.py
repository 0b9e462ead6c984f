"""Multi-head latent attention over a cache of latents: first form."""

# Shape suffixes: N tokens   H heads   P un-roped width   R roped width   C latent   V value width

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.kvcache.storage import LayerCache


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
    """Store the new latents, then attend causally to each sequence's context: (N, H, V)."""
    if batch.num_tokens == 0:
        return q_nope_NHP.new_empty((0, *w_uv_HVC.shape[:2]))
    cache.write_mla(torch.cat((latent_NC, k_rope_NR), -1), batch.slot_mapping)
    latent_width = latent_NC.shape[-1]
    out, start = [], 0
    for row, (length, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        num_blocks = cache.layout.blocks_for(context)
        rows = cache.blocks[batch.block_tables[row, :num_blocks]].flatten(0, 1)[:context]
        rows = rows.float()
        span = slice(start, start + length)
        q = torch.einsum("nhp,hpc->nhc", q_nope_NHP[span].float(), w_uk_HPC.float())
        q = torch.cat((q, q_rope_NHR[span].float()), -1)
        scores = torch.einsum("nhc,sc->hns", q, rows) * scale
        mask = torch.ones(length, context, dtype=torch.bool, device=q.device)
        weights = scores.masked_fill(~mask.tril(context - length), -torch.inf).softmax(-1)
        mixed = torch.einsum("hns,sc->nhc", weights, rows[:, :latent_width])
        out.append(torch.einsum("nhc,hvc->nhv", mixed, w_uv_HVC.float()).to(latent_NC.dtype))
        start += length
    return torch.cat(out)
