"""Log-probabilities of the prompts' own tokens, for the requests that ask for them.

A prompt token's is read off the row before it. Invariant: however long a chunk is, at most
``ROWS_AT_ONCE`` rows of logits exist at a time, because a row is as wide as the vocabulary.

Shape suffixes: R rows of a step   D hidden   V vocabulary   F final chunks   S rows scored at once
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.sampling.logprobs import token_logprobs
from prefill.scheduler import Chunk
from protocol.requests import TokenLogprobs

ROWS_AT_ONCE = 64

Logits = Callable[[Tensor], Tensor]  # (R, D) to (R, V)


def rows_of(wanted: Sequence[Chunk], chunks: Sequence[Chunk], x_RD: Tensor) -> Tensor:
    """Those of ``x_RD``, the rows of ``chunks``, that belong to the ``wanted`` ones of them."""
    if len(wanted) == len(chunks):
        return x_RD
    refs = {chunk.ref for chunk in wanted}
    pieces = torch.split(x_RD, [chunk.num_rows for chunk in chunks])
    kept = [piece for piece, chunk in zip(pieces, chunks, strict=True) if chunk.ref in refs]
    return torch.cat(kept) if kept else x_RD[:0]


@torch.inference_mode()
def score_step(
    x_RD: Tensor, chunks: Sequence[Chunk], counts: Sequence[int | None], logits: Logits
) -> tuple[Tensor, list[list[TokenLogprobs]]]:
    """Logits (F, V) of the final chunks' last tokens, and each chunk's part of its prompt's scores.

    ``counts`` has for each chunk how many alternatives to report, or None: such a chunk has one
    row in ``x_RD`` if it is final and else none; the others have a row for every token.
    """
    last_rows: list[int] = []
    scores: list[list[TokenLogprobs]] = []
    row = 0
    for chunk, count in zip(chunks, counts, strict=True):
        first, row = row, row + chunk.num_rows
        if chunk.final:
            last_rows.append(row - 1)
        scores.append([] if count is None else _score(x_RD[first:row], chunk, count, logits))
    return logits(x_RD[last_rows]), scores


def _score(x_RD: Tensor, chunk: Chunk, count: int, logits: Logits) -> list[TokenLogprobs]:
    scores: list[TokenLogprobs] = []
    next_ids = torch.tensor(chunk.next_token_ids, dtype=torch.int64, device=x_RD.device)
    for start in range(0, len(next_ids), ROWS_AT_ONCE):
        ids_S = next_ids[start : start + ROWS_AT_ONCE]
        rows_SV = logits(x_RD[start : start + len(ids_S)])
        scores += token_logprobs(rows_SV, ids_S, [count] * len(ids_S))
    return scores
