"""The events of a streamed answer as bytes.

Everything but the text is constant for a choice and is rendered once; an event is then two joins
and one ``orjson`` call, because at thousands of tokens a second every object counts.
"""

from functools import cache, partial
from typing import Any

import orjson

from server.openai.answer import Answer
from server.openai.choice import Choice
from server.openai.part_events import delta_of
from server.text.families.parts import Part

_END = b"\n\n"


class AnswerEvents:
    """Renders ``Answer`` piece by piece; ``[DONE]`` and errors are ``server.openai.sse``'s."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        asked = answer.asked
        self._chat = answer.kind == "chat"
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = {"id": answer.id, "object": kind, "created": answer.created}
        self._head = b"data: " + orjson.dumps({**head, "model": answer.model.id})[:-1]
        self._before_value = b',"delta":' if self._chat else b',"text":'
        self._tail = b',"usage":null}' + _END if asked.include_usage else b"}" + _END
        self._plain = not (
            answer.logprobs is not None
            or asked.return_token_ids
            or asked.continuous_usage
            or answer.read is not None
        )
        self._content = b'{"content":%b}' if self._chat else b"%b"

    def opening(self, choice: Choice) -> bytes:
        """What comes before the first text: the role, or the prompt that is to be echoed."""
        prompt_ids = (
            choice.request.prompt_token_ids if self._answer.asked.return_token_ids else None
        )
        if self._chat:
            more = b"" if prompt_ids is None else b',"prompt_token_ids":' + orjson.dumps(prompt_ids)
            return self._event(choice, b'{"role":"assistant","content":""}', top_level=more)
        echo = self._answer.echo(choice)
        if not echo and prompt_ids is None:
            return b""
        more = b"" if prompt_ids is None else b',"prompt_token_ids":' + orjson.dumps(prompt_ids)
        return self._event(
            choice,
            orjson.dumps(echo),
            logprobs=orjson.dumps(self._answer.echo_logprobs(choice)),
            in_choice=more,
        )

    def text(self, choice: Choice, text: str) -> bytes:
        """The next piece of text, with what belongs to its tokens."""
        if self._answer.read is not None:
            return self._parts(choice, self._answer.read.push(choice, text))
        return self._value(choice, self._content % orjson.dumps(text))

    def _parts(self, choice: Choice, parts: list[Part]) -> bytes:
        """An event each; what belongs to the tokens is in the first."""
        return b"".join(self._value(choice, delta_of(part)) for part in parts)

    def _value(self, choice: Choice, value: bytes) -> bytes:
        logprobs, more = self._of_tokens(choice)
        return self._event(choice, value, logprobs=logprobs, in_choice=more)

    def _of_tokens(self, choice: Choice) -> tuple[bytes, bytes]:
        """Probabilities and ids of the tokens since the last call."""
        more = b""
        if self._answer.asked.return_token_ids:
            more = b',"token_ids":' + orjson.dumps(choice.take_token_ids())
        return orjson.dumps(self._answer.take_logprobs(choice)), more

    def finish(self, choice: Choice) -> bytes:
        read = self._answer.read
        held = b"" if read is None else self._parts(choice, read.finish(choice))
        reason = orjson.dumps(self._answer.finish_reason(choice))
        ending = partial(self._event, choice, b"{}" if self._chat else b'""', finish_reason=reason)
        if read is not None and not held and (choice.tokens or choice.token_ids):
            logprobs, more = self._of_tokens(choice)
            return ending(logprobs=logprobs, in_choice=more)
        return held + ending()

    def around_text(self, choice: Choice) -> tuple[bytes, bytes] | None:
        if not self._plain:
            return None
        before = b'{"content":' if self._chat else b""
        before = b"".join((self._before_choice(choice), self._before_value, before))
        return before, _after_text(chat=self._chat, tail=self._tail)

    def usage(self) -> bytes:
        """The event after all others, for callers who asked for it."""
        return b"".join((self._head, b',"choices":[],"usage":', self._usage(), b"}", _END))

    def _before_choice(self, choice: Choice) -> bytes:
        return b"%b,%b%d" % (self._head, b'"choices":[{"index":', choice.index)

    def _event(
        self,
        choice: Choice,
        value: bytes,
        *,
        logprobs: bytes = b"null",
        finish_reason: bytes = b"null",
        in_choice: bytes = b"",
        top_level: bytes = b"",
    ) -> bytes:
        tail = self._tail
        if self._answer.asked.continuous_usage:
            tail = b',"usage":' + self._usage() + b"}" + _END
        parts: tuple[Any, ...] = (
            *(self._before_choice(choice), self._before_value, value),
            *(b',"logprobs":', logprobs, b',"finish_reason":', finish_reason, in_choice),
            *(b"}]", top_level, tail),
        )
        return b"".join(parts)

    def _usage(self) -> bytes:
        return orjson.dumps(self._answer.usage())


@cache
def _after_text(*, chat: bool, tail: bytes) -> bytes:
    """One object for all streams: what each stream has of its own is never in the CPU's cache."""
    return (b"}" if chat else b"") + b',"logprobs":null,"finish_reason":null}]' + tail
