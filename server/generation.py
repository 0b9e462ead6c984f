"""The seam between the HTTP surface and the cluster behind it: tokens in, tokens out.

The HTTP layer turns text into a ``GenerateRequest`` and token ids into text; whoever implements
``Generator`` finds workers, retries and migrates. Neither knows how the other does it. What the
model's files say (tokenizer, template, sampling defaults) is ``server.text``'s business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from protocol.messages import FinishReason, PrefillTimes
from protocol.requests import GenerateRequest, TokenLogprobs


class TokenChunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One or more new tokens of one choice, in order and without gaps or repeats.

    A stop token that ended the request is the last of ``token_ids``. ``logprobs``, when asked for,
    has one entry per token. Only the first chunk carries ``cached_tokens``, ``times``, and where
    they were asked for ``prompt_logprobs``: an entry for each prompt token from the second on.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None  # set on the last chunk, and on no other
    cached_tokens: int = 0  # prompt tokens whose KV was not computed anew
    times: PrefillTimes | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    id: str
    max_model_len: int  # tokens, prompt and output together
    created: int  # Unix seconds, for /v1/models only


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """``reason`` is a sentence for operators; it is shown on /ready and names what is missing."""

    ready: bool
    reason: str


# Takes the next tokens, at once and without waiting; False when no more of them are wanted.
Deliver = Callable[[TokenChunk], bool]


class Generator(Protocol):
    """What the HTTP layer needs of the rest of the gateway."""

    async def generate(
        self, request: GenerateRequest, deliver: Deliver, *, deadline_s: float
    ) -> None:
        """Call ``deliver`` with the request's tokens as they come, and return after the last.

        The last chunk has a ``finish_reason``, unless ``deliver`` has answered False before: that,
        like cancelling the task, cancels the request at every worker. ``deliver`` is called
        between the tokens of other streams. A caller that cannot use tokens as fast as they come
        keeps what it must; nothing waits for it. What ``deliver`` raises is raised here.

        Raises:
            ServingError: the request has ended and holds nothing anywhere. Before the first
                chunk, other workers have already been tried where that could help.
        """
        ...

    def models(self) -> Sequence[ServedModel]:
        """The models that requests may name now; empty while no worker is known."""
        ...

    def readiness(self) -> Readiness:
        """Whether a request would be served now; answers from memory, at once."""
        ...
