"""Causal attention of one sequence's new tokens to its whole context."""

# Shape suffixes: L new tokens   S context tokens   H query heads   G KV heads
# R query heads of a KV head, H / G   D key width   V value width   Q queries of a block

import torch
from torch import Tensor
from torch.nn import functional

# Queries of all heads that share a KV head are one product's rows, so a block is a large enough
# product at 64 queries; a longer one spends more of it above the diagonal.
QUERY_BLOCK = 64


def causal_attention(q_LHD: Tensor, k_GSD: Tensor, v_GSV: Tensor, scale: float) -> Tensor:
    """(L, H, V). The L queries are the last of the S context tokens."""
    if q_LHD.device.type == "cpu":
        return _by_query_blocks(q_LHD, k_GSD, v_GSV, scale)
    length, context = q_LHD.shape[0], k_GSD.shape[1]
    mask_LS = None
    if length < context:
        mask_LS = torch.ones(length, context, dtype=torch.bool, device=q_LHD.device)
        mask_LS = mask_LS.tril(context - length)
    out_1HLV = functional.scaled_dot_product_attention(
        q_LHD.transpose(0, 1)[None],
        k_GSD[None],
        v_GSV[None],
        attn_mask=mask_LS,
        is_causal=mask_LS is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1HLV[0].transpose(0, 1)


def _by_query_blocks(q_LHD: Tensor, k_GSD: Tensor, v_GSV: Tensor, scale: float) -> Tensor:
    """Twice as fast as torch's fused kernel here in bfloat16, which multiplies in float32."""
    length, heads, _ = q_LHD.shape
    groups, context, value_width = v_GSV.shape
    q_GRLD = q_LHD.view(length, groups, -1, q_LHD.shape[2]).permute(1, 2, 0, 3)
    keys_GDS = k_GSD.transpose(1, 2)
    nothing = q_LHD.new_zeros(1)
    later_QQ = q_LHD.new_full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu(1)
    out_LHV = q_LHD.new_empty(length, heads, value_width)
    for start in range(0, length, QUERY_BLOCK):
        count = min(QUERY_BLOCK, length - start)
        visible = context - length + start + count
        q = q_GRLD[:, :, start : start + count].flatten(1, 2)
        scores = torch.baddbmm(nothing, q, keys_GDS[:, :, :visible], beta=0, alpha=scale)
        scores.view(heads, count, visible)[:, :, visible - count :] += later_QQ[:count, :count]
        out = torch.bmm(scores.softmax(-1), v_GSV[:, :visible])
        out_LHV[start : start + count] = out.view(heads, count, value_width).transpose(0, 1)
    return out_LHV
