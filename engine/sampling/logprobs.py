"""Log-probabilities of chosen tokens and of the best alternatives, for the rows that ask.

They describe the distribution after penalties, bias and masks, before temperature and truncation.

Shape suffixes: R rows of the batch   L rows that ask   V vocabulary   K alternatives
    E tokens that rows name
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from engine.sampling.ordering import largest
from protocol.requests import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTokens:
    """Tokens that some rows ask for by name, one entry each, in place of the best alternatives."""

    rows: list[int]  # (E,)
    ids: list[int]  # (E,)
    rows_E: Tensor
    ids_E: Tensor


def token_logprobs(
    logits_LV: Tensor, chosen_L: Tensor, counts: Sequence[int], named: NamedTokens | None = None
) -> list[TokenLogprobs]:
    """One entry per row with ``counts[row]`` alternatives, fewer where fewer are possible; rows in
    ``named`` have the named tokens instead, possible or not.
    """
    total_L = logits_LV.logsumexp(-1)
    chosen_logits_L = logits_LV.gather(1, chosen_L[:, None])[:, 0]
    chosen: list[float] = (chosen_logits_L - total_L).tolist()  # host sync
    found = _likeliest(logits_LV, total_L, chosen, counts)
    if named is not None:
        values_E = logits_LV[named.rows_E, named.ids_E] - total_L[named.rows_E]
        of_row: dict[int, list[tuple[int, float]]] = {row: [] for row in named.rows}
        for row, token_id, value in zip(named.rows, named.ids, values_E.tolist(), strict=True):
            of_row[row].append((token_id, value))
        for row, tokens in of_row.items():
            tokens.sort(key=lambda token: (-token[1], token[0]))
            found[row] = TokenLogprobs(chosen[row], tuple(tokens))
    return found


def _likeliest(
    logits_LV: Tensor, total_L: Tensor, chosen: Sequence[float], counts: Sequence[int]
) -> list[TokenLogprobs]:
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
