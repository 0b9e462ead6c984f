"""From a checked HTTP request to what workers need: sampling, stop conditions, token budget.

A field that the caller leaves out takes the model authors' recommendation, then the neutral value.
"""

import secrets
from collections.abc import Sequence
from typing import TypeVar

from protocol.errors import ContextLengthExceeded, InvalidRequest
from protocol.requests import ReasoningLimit, SamplingParams, StopConditions
from server.openai.schema import GenerationRequest
from server.text.model_text import GenerationDefaults

N = TypeVar("N", int, float)

_SEED_MASK = 2**63 - 1
_MAX_ID_DIGITS = 9
_COLDEST = 0.01  # below, logits over temperature leave the range of floats; 0 itself is greedy


def token_budget(*, prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """How many tokens may be generated: ``max_tokens``, or else all that the context has left.

    Raises:
        ContextLengthExceeded: the prompt leaves no room, or less than was asked for.
    """
    left = max_model_len - prompt_tokens
    if max_tokens is None and left >= 1:
        return left
    if max_tokens is None or left < 1:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens, but this model's context has room for "
            f"{max_model_len}, prompt and answer together: shorten the prompt"
        )
    if max_tokens > left:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but this "
            f"model's context has room for {max_model_len}, prompt and answer together: shorten "
            f"the prompt, or ask for at most {left} tokens"
        )
    return max_tokens


def check_token_ids(prompt: Sequence[int], *, vocab_size: int, param: str) -> None:
    if not prompt:
        raise InvalidRequest(f"{param}: must not be empty", param=param)
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InvalidRequest(f"{param}: token ids must be 0 to {vocab_size - 1}", param=param)


def sampling_params(
    request: GenerationRequest,
    defaults: GenerationDefaults,
    *,
    seed: int,
    choice: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
    reasoning_limit: ReasoningLimit | None,
    vocab_size: int,
) -> SamplingParams:
    """
    Raises:
        InvalidRequest: a key of ``logit_bias``, or one of ``logprob_token_ids``, is no token id.
    """
    named = tuple(dict.fromkeys(request.logprob_token_ids or ()))
    if named:
        check_token_ids(named, vocab_size=vocab_size, param="logprob_token_ids")
    temperature = _given(request.temperature, defaults.temperature)
    if 0 < temperature < _COLDEST:
        temperature = _COLDEST
    return SamplingParams(
        temperature=temperature,
        top_k=max(0, _given(request.top_k, defaults.top_k)),  # -1 is another spelling of off
        top_p=_given(request.top_p, defaults.top_p),
        min_p=_given(request.min_p, defaults.min_p),
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        seed=seed,
        choice=choice,
        logprobs=logprobs,
        logprob_token_ids=named,
        prompt_logprobs=prompt_logprobs,
        reasoning_limit=reasoning_limit,
        grammar=grammar,
    )


def request_seed(request: GenerationRequest) -> int:
    """63 bits: the caller's, so that a repeated request repeats its answer, or random ones."""
    return secrets.randbits(63) if request.seed is None else request.seed & _SEED_MASK


def stop_conditions(
    request: GenerationRequest,
    defaults: GenerationDefaults,
    *,
    max_tokens: int,
    vocab_size: int,
) -> StopConditions:
    """
    Raises:
        InvalidRequest: ``min_tokens`` or ``stop_token_ids`` does not fit.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: must be at most the {max_tokens} tokens that may be generated",
            param="min_tokens",
        )
    asked = tuple(request.stop_token_ids or ())
    if asked:
        check_token_ids(asked, vocab_size=vocab_size, param="stop_token_ids")
    ends = () if request.ignore_eos else defaults.end_token_ids
    stop_token_ids = tuple(dict.fromkeys((*ends, *asked)))
    return StopConditions(
        max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop_token_ids
    )


def _given(value: N | None, default: N) -> N:
    return default if value is None else value


def _logit_bias(asked: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in asked.items():
        if (
            not (key.isascii() and key.isdigit() and len(key) <= _MAX_ID_DIGITS)
            or int(key) >= vocab_size
        ):
            raise InvalidRequest(
                f"logit_bias: keys must be token ids, 0 to {vocab_size - 1}", param="logit_bias"
            )
        bias[int(key)] = value
    return bias
