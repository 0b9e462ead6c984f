"""Token counts of an answer, as clients are billed by them."""

from collections.abc import Sequence

from server.openai.choice import Choice

Usage = dict[str, int | dict[str, int]]


def usage_of(choices: Sequence[Choice], *, choices_per_prompt: int) -> Usage:
    """A prompt counts once, however many choices continue it."""
    firsts = choices[::choices_per_prompt]
    prompt_tokens = sum(len(choice.request.prompt_token_ids) for choice in firsts)
    completion_tokens = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in choices)},
    }
