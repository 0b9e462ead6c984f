"""Guards around tokenising, the one part of reading a request that costs real time."""

from collections.abc import Mapping, Sequence
from functools import partial

import anyio.to_thread

from protocol.errors import ContextLengthExceeded
from server.openai.answer import Services
from server.text.long_text_process import Job, run_job
from server.text.long_texts import LONG_CHARS
from server.text.model_text import ChatPrompt

# No text worth serving has more characters per token on average (long runs of spaces come close).
_MAX_CHARS_PER_TOKEN = 32
_INLINE_CHARS = 16_384  # about 4 ms of tokenising; longer texts leave the event loop


def check_length(chars: int, *, max_model_len: int, param: str) -> None:
    """Refuse before tokenising what can never fit.

    Raises:
        ContextLengthExceeded
    """
    if chars > max_model_len * _MAX_CHARS_PER_TOKEN:
        raise ContextLengthExceeded(
            f"{param}: {chars} characters cannot fit this model's context of {max_model_len} tokens"
        )


async def tokenise(job: Job, services: Services, *, chars: int, param: str) -> ChatPrompt:
    """Here; in a thread when it would hold up every other stream; or, when not even that could be
    left to callers, in a process of its own.

    Raises:
        InvalidRequest: the model's template does not accept it, or it takes too long.
        Overloaded: too many such texts wait.
    """
    if chars <= _INLINE_CHARS:
        return run_job(job, services.text)
    if chars <= LONG_CHARS or services.long_texts is None:
        return await anyio.to_thread.run_sync(partial(run_job, job, services.text))
    return await services.long_texts.tokenise(job, param=param)


def truncated(
    ids: Sequence[int], keep: int | None, *, max_tokens: int | None, max_model_len: int
) -> Sequence[int]:
    """The last ``keep`` of ``ids``: all where it is None, and where it is -1 as many as leave room
    for ``max_tokens``, or for one token.
    """
    if keep is None:
        return ids
    return ids[-(keep if keep > 0 else max(1, max_model_len - (max_tokens or 1))) :]


def text_length(value: object) -> int:
    """Characters of all texts inside ``value``."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + text_length(child) for key, child in value.items())
    return sum(map(text_length, value)) if isinstance(value, list | tuple) else 0
