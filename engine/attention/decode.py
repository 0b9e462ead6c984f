"""Decode attention over the paged cache: one new token per sequence, all sequences at once."""

# Shape suffixes: B sequences   H query heads   T tiles of all sequences   X tiles times KV heads
# R query heads of a KV head   S keys of a tile   D row width   K kinds of row

import torch
from torch import Tensor

from engine.attention.plan import DecodePlan
from engine.attention.tile import attend
from engine.kvcache.storage import LayerCache


def decode_attention(q_BHD: Tensor, cache: LayerCache, plan: DecodePlan, scale: float) -> Tensor:
    """(B, H, D): softmax-weighted values (for mla whole rows) of each sequence's context.

    A sequence's result is the same bits whatever its batch-mates are.
    """
    num_sequences, heads, width = q_BHD.shape
    torch.index_select(cache.block_rows, 0, plan.gather_rows, out=plan.gathered)
    rows_KXSD = plan.gathered.view(cache.row_kinds, -1, plan.width, width)
    q_THD = q_BHD if plan.owner_T is None else q_BHD.index_select(0, plan.owner_T)
    q_XRD = q_THD.reshape(rows_KXSD.shape[1], -1, width)
    out_XRD, scores_TGRS = attend(q_XRD, rows_KXSD[0], rows_KXSD[-1], plan.mask_T11S, scale)
    out_THD = out_XRD.view(-1, heads, width)
    if not plan.parts_B:
        return out_THD[:num_sequences]
    log_sums_TH = scores_TGRS.logsumexp(-1).view(-1, heads)
    return _join(out_THD.float(), log_sums_TH, plan.parts_B).to(q_BHD.dtype)


def _join(out_THD: Tensor, log_sums_TH: Tensor, parts_B: tuple[Tensor, ...]) -> Tensor:
    """Each sequence's tiles weighted by their share of the softmax, added in order.

    A sequence of one tile keeps its bits: its share is exactly one, and the others exactly zero.
    """
    out_THD = torch.cat((out_THD, torch.zeros_like(out_THD[:1])))
    log_sums_TH = torch.cat((log_sums_TH, torch.full_like(log_sums_TH[:1], -torch.inf)))
    log_sums = [log_sums_TH.index_select(0, tile_B) for tile_B in parts_B]
    largest_BH = torch.stack(log_sums).amax(0)
    shares = [(log_sum_BH - largest_BH).exp().unsqueeze(-1) for log_sum_BH in log_sums]
    sum_BHD, total_BH1 = out_THD.index_select(0, parts_B[0]) * shares[0], shares[0]
    for tile_B, share_BH1 in zip(parts_B[1:], shares[1:], strict=True):
        sum_BHD = torch.addcmul(sum_BHD, out_THD.index_select(0, tile_B), share_BH1)
        total_BH1 = total_BH1 + share_BH1
    return sum_BHD / total_BH1
