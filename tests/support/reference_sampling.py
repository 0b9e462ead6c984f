"""Sampling of one row, written straight from the definitions, in float64 numpy."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocol.requests import GenerateRequest

Floats = npt.NDArray[np.float64]


def adjusted(logits: Floats, request: GenerateRequest, output_ids: Sequence[int]) -> Floats:
    """Logits after penalties, bias and masked stop tokens."""
    params, x = request.sampling, logits.astype(np.float64).copy()
    for token in set(request.prompt_token_ids) | set(output_ids):
        x[token] = (
            x[token] / params.repetition_penalty
            if x[token] > 0
            else x[token] * params.repetition_penalty
        )
    for token in set(output_ids):
        x[token] -= params.frequency_penalty * list(output_ids).count(token)
        x[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output_ids) < request.stop.min_tokens:
        x[list(request.stop.stop_token_ids)] = -np.inf
    return x


def probabilities(x: Floats) -> Floats:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def distribution(x: Floats, request: GenerateRequest) -> Floats:
    """What the next token is drawn from."""
    params = request.sampling
    p = probabilities(x / params.temperature)
    p[p < params.min_p * p.max()] = 0
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -p))
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    dropped = order[before >= params.top_p]
    p[dropped[dropped != order[0]]] = 0
    return np.asarray(p / p.sum())
