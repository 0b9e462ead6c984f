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


class SteadyText(Protocol):
    """A stream whose tokens have nothing more to say than their text, each the same way, so that
    ``server.step_writer`` can write them. That one asks, and gives back what it was lent when a
    token comes of which this is not true, or when it is told to.
    """

    around: tuple[bytes, bytes]
    """What comes before and after the text of each token, quoted as JSON."""

    @property
    def delivered_at(self) -> float:
        """When the last tokens were delivered, monotonic seconds."""
        ...

    def lend(self, recall: Callable[[], None]) -> int | None:
        """A file descriptor to write chunks of HTTP/1.1 to, good until it is given back; None if
        the socket is not to be had now. ``recall`` is called when it is wanted back, and must
        give it back at once.
        """
        ...

    def give_back(self, tokens: int, at: float, unsent: bytes) -> None:
        """``tokens`` were written meanwhile, the last of them ``at`` that time, but for the end of
        their bytes, ``unsent``.
        """
        ...


Deliver = Callable[[TokenChunk], "bool | SteadyText"]
"""Takes the next tokens, at once and without waiting; False when no more of them are wanted. With a
``SteadyText`` the next may be written without it, until that has been given back.
"""


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
