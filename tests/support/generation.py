"""Builders of requests with one interesting argument."""

from collections.abc import Sequence

from protocol.ids import RequestId
from protocol.requests import DEFAULT_NAMESPACE, GenerateRequest, SamplingParams, StopConditions

GREEDY = SamplingParams(temperature=0.0)


def a_request(
    name: str = "r0",
    *,
    prompt: Sequence[int] = (1, 2, 3),
    sampling: SamplingParams = GREEDY,
    max_tokens: int = 16,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    namespace: str = DEFAULT_NAMESPACE,
    attempt: int = 0,
    caller: str = "",
    priority: int = 0,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        attempt=attempt,
        model="m",
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        stop=StopConditions(
            max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=tuple(stop_token_ids)
        ),
        namespace=namespace,
        caller=caller,
        priority=priority,
    )
