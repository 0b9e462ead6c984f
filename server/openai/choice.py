"""One choice of one answer: its request to the workers, and its text as the tokens come back.

Invariant: text is released once and in order, never half a character, never part of a stop string;
``completion_tokens`` counts the tokens up to the one that ended the choice, that one included.
"""

from typing import NamedTuple

from protocol.errors import EngineError
from protocol.messages import FinishReason, PrefillTimes
from protocol.requests import GenerateRequest, TokenLogprobs
from server.generation import Deliver, Generator, TokenChunk
from server.openai.schema import GenerationRequest
from server.text.detokenizer import detokenizer
from server.text.stop_strings import StopStrings
from server.text.tokenizer import TextTokenizer


class Token(NamedTuple):
    """A token of the visible text with its probabilities, for the ``logprobs`` of an answer.

    Nothing precedes a prompt's first token, so that one has none.
    """

    token_id: int
    logprobs: TokenLogprobs | None


class Reasoned(NamedTuple):
    """The tokens around reasoning, and whether the prompt has ended with the first of them."""

    open: int | None
    close: int
    begun: bool


class Choice:
    """``index`` is the choice's place in the answer. Feed chunks to ``accept`` until
    ``finish_reason`` is set; then the text is complete, and nothing more may be fed.
    """

    __slots__ = (
        "_detokenizer",
        "_hides_stop_token",
        "_keeps_token_ids",
        "_only_prompt",
        "_plain",
        "_reasoned",
        "_reasoning",
        "_stop_token_ids",
        "_stops",
        "cached_tokens",
        "completion_tokens",
        "delivered_at",
        "finish_reason",
        "index",
        "prompt_logprobs",
        "reasoning_tokens",
        "request",
        "times",
        "token_ids",
        "tokens",
    )

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        asked: GenerationRequest,
        stops: tuple[str, ...],
        tokenizer: TextTokenizer,
        *,
        only_prompt: bool = False,
        shown_ids: frozenset[int] = frozenset(),
        reasoned: Reasoned | None = None,
    ) -> None:
        """``only_prompt``: the prompt's probabilities are wanted, and no text. ``shown_ids`` stay
        in the text although they are control tokens.
        """
        self.index = index
        self.request = request
        include_stop = bool(asked.include_stop_str_in_output)
        self._stops = StopStrings(stops, include_in_output=include_stop) if stops else None
        self._hides_stop_token = not include_stop
        self._keeps_token_ids = bool(asked.return_token_ids)
        self._only_prompt = only_prompt
        self._stop_token_ids = frozenset(request.stop.stop_token_ids)
        self._detokenizer = detokenizer(
            tokenizer,
            skip_special_tokens=asked.skip_special_tokens is not False,
            shown_ids=shown_ids,
        )
        self._reasoned = reasoned
        self._reasoning = reasoned is not None and reasoned.begun
        self._plain = not (
            stops
            or only_prompt
            or self._keeps_token_ids
            or reasoned is not None
            or request.sampling.logprobs is not None
        )
        self.reasoning_tokens = 0
        self.completion_tokens = 0
        self.delivered_at = 0.0  # when its last tokens came, monotonic; 0: none has come
        self.cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.times: PrefillTimes | None = None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
        self.tokens: list[Token] = []  # since they were last taken
        self.token_ids: list[int] = []  # likewise, and only when the caller wants them

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return None if self._stops is None else self._stops.matched

    @property
    def only_spells(self) -> bool:
        """Nothing is done with its tokens but to spell them, and no character is open."""
        return self._plain and self._detokenizer.between_characters

    def accept(self, chunk: TokenChunk) -> str:
        """The text that may be shown now; empty while a character or stop string is open."""
        if self._plain and self.completion_tokens and chunk.finish_reason is None:
            # Neither the first chunk nor the last of text that nothing is to be done with: for
            # most of all tokens, and so worth a way of its own.
            self.completion_tokens += len(chunk.token_ids)
            return "".join(map(self._detokenizer.push, chunk.token_ids))
        if chunk.times is not None:
            self.times = chunk.times
        self.cached_tokens += chunk.cached_tokens
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs
        if self._only_prompt:
            self.finish_reason = "length"
            return ""
        text = ""
        last = len(chunk.token_ids) - 1
        for position, token_id in enumerate(chunk.token_ids):
            self.completion_tokens += 1
            if self._reasoned is not None:
                self._count_reasoning(token_id, self._reasoned)
            if self._keeps_token_ids:
                self.token_ids.append(token_id)
            if (
                chunk.finish_reason == "stop"
                and position == last
                and self._hides_stop_token
                and token_id in self._stop_token_ids
            ):
                break
            if chunk.logprobs is not None:
                self.tokens.append(Token(token_id, chunk.logprobs[position]))
            text += self._release(self._detokenizer.push(token_id))
            if self.finish_reason is not None:  # a stop string; what follows was never asked for
                return text
        if chunk.finish_reason is not None:
            text += self._release(self._detokenizer.finish())
            if self.finish_reason is None:
                self.finish_reason = chunk.finish_reason
                text += self._stops.finish() if self._stops else ""
        return text

    def _release(self, text: str) -> str:
        stops = self._stops
        if stops is None or not text or self.completion_tokens < self.request.stop.min_tokens:
            return text
        text = stops.push(text)
        if stops.matched is not None:
            self.finish_reason = "stop"
        return text

    def _count_reasoning(self, token_id: int, reasoned: Reasoned) -> None:
        """Both markers count as reasoning."""
        if token_id == reasoned.open and self.completion_tokens == 1:
            self._reasoning = True
        self.reasoning_tokens += self._reasoning
        if token_id == reasoned.close:
            self._reasoning = False

    def prompt_tokens(self) -> list[Token]:
        """The prompt's own tokens with their probabilities, if these were asked for."""
        if self.prompt_logprobs is None:
            return []
        return list(map(Token, self.request.prompt_token_ids, (None, *self.prompt_logprobs)))

    def take_tokens(self) -> list[Token]:
        taken, self.tokens = self.tokens, []
        return taken

    def take_token_ids(self) -> list[int]:
        taken, self.token_ids = self.token_ids, []
        return taken


async def run_choice(
    choice: Choice,
    generator: Generator,
    *,
    deadline_s: float,
    deliver: Deliver,
) -> None:
    """Generate the choice; ``deliver`` must have the choice accept every chunk.

    Raises:
        ServingError: the generator's; what was delivered before stays delivered.
    """
    await generator.generate(choice.request, deliver, deadline_s=deadline_s)
    if choice.finish_reason is None:
        raise EngineError("the token stream ended without a finish reason")
