"""Log-probabilities of chosen tokens and of the best alternatives, for the rows that ask.

They describe the distribution after penalties, bias and masks, before temperature and truncation.

Shape suffixes: R rows of the batch   L rows that ask   V vocabulary   K alternatives
"""

from collections.abc import Sequence
from math import isfinite

from torch import Tensor

from engine.sampling.ordering import largest
from protocol.requests import TokenLogprobs


def token_logprobs(
    logits_LV: Tensor, chosen_L: Tensor, counts: Sequence[int]
) -> list[TokenLogprobs]:
    """One entry per row with ``counts[row]`` alternatives, fewer where fewer are possible."""
    total_L = logits_LV.logsumexp(-1)
    chosen_logits_L = logits_LV.gather(1, chosen_L[:, None])[:, 0]
    chosen: list[float] = (chosen_logits_L - total_L).tolist()  # host sync
    most = max(counts)
    if most == 0:
        return [TokenLogprobs(logprob) for logprob in chosen]
    values_LK, ids_LK = largest(logits_LV, most)
    alternatives: list[list[float]] = (values_LK - total_L[:, None]).tolist()
    ids: list[list[int]] = ids_LK.tolist()
    return [
        TokenLogprobs(
            logprob,
            tuple(
                (token_id, value)
                for token_id, value in zip(row_ids[:count], row_values[:count], strict=True)
                if isfinite(value)
            ),
        )
        for logprob, row_ids, row_values, count in zip(
            chosen, ids, alternatives, counts, strict=True
        )
    ]
