"""Which experts a token goes to, and with what weight. Row-wise maths on logical experts.

A row's result depends on that row alone, whatever its batch-mates. Scores and weights are fp32.
Ranks, slots and replicas are unknown here.

Shape suffixes: T tokens   E experts   G expert groups   M experts in a group   K chosen experts
"""

import torch
from torch import Tensor

_EPSILON = 1e-20


def softmax_top_k(logits_TE: Tensor, k: int, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The k experts of the highest softmax probability (Mixtral, Qwen3-MoE).

    Returns:
        Expert ids (T, K) int64, most probable first, and their weights (T, K) fp32: the
        probabilities over all experts, or with ``renormalise`` divided by their sum over the k.
    """
    probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
    weights_TK, ids_TK = torch.topk(probabilities_TE, k, dim=-1)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK


def group_limited_top_k(
    logits_TE: Tensor,
    bias_E: Tensor,
    k: int,
    *,
    num_groups: int,
    kept_groups: int,
    scaling: float,
    renormalise: bool = True,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's choice (arXiv 2412.19437, 2.1.2): the bias steers it, the weights ignore it.

    A group scores the sum of its two best biased experts; experts outside the ``kept_groups``
    best groups cannot be chosen. Weights are the unbiased sigmoid scores, normalised over the k
    when ``renormalise``, times ``scaling``.

    Returns:
        Expert ids (T, K) int64, best biased score first, and weights (T, K) fp32.
    """
    scores_TE = _sigmoid(logits_TE.float())
    biased_TE = scores_TE + bias_E.float()
    if kept_groups < num_groups:
        biased_TGM = biased_TE.reshape(-1, num_groups, biased_TE.shape[1] // num_groups)
        group_scores_TG = biased_TGM.topk(2, dim=-1).values.sum(dim=-1)
        kept_TL = group_scores_TG.topk(kept_groups, dim=-1).indices
        dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool)
        dropped_TG.scatter_(-1, kept_TL, value=False)
        biased_TE = biased_TGM.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    ids_TK = biased_TE.topk(k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + _EPSILON)
    return ids_TK, weights_TK * scaling


def every_expert(num_tokens: int, num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All experts with weight one: a dense FFN that is cut into experts along its hidden width.

    Returns:
        Expert ids (T, E) int64, ascending, and weights (T, E) fp32. Both are views of one row.
    """
    ids_E = torch.arange(num_experts, device=device)
    weights_E = torch.ones(num_experts, device=device)
    return ids_E.expand(num_tokens, -1), weights_E.expand(num_tokens, -1)


def _sigmoid(logits_TE: Tensor) -> Tensor:
    # torch.sigmoid rounds differently in its vector loop and in its scalar tail: a row's scores
    # would depend on where in the batch it is.
    return 1 / (1 + torch.exp(-logits_TE))
