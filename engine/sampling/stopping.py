"""When a token ends its request. Pure; stop strings are the gateway's and not known here."""

from protocol.messages import FinishReason
from protocol.requests import StopConditions


def finish_reason(
    stop: StopConditions, token_id: int, num_output_tokens: int
) -> FinishReason | None:
    """Why the request ends with ``token_id``, which is output token ``num_output_tokens - 1``.

    A stop token among the first ``min_tokens`` does not count: the sampler masks these.
    """
    if num_output_tokens > stop.min_tokens and token_id in stop.stop_token_ids:
        return "stop"
    return "length" if num_output_tokens >= stop.max_tokens else None
