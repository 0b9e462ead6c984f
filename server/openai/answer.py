"""One answer, whichever endpoint asked for it: its identity, its choices, and how it is spelt.

The endpoints differ in what they read and in the shape they write; ``server.openai.endpoint`` runs
any answer. Nothing here waits or sends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import orjson

from server.generation import Generator, ServedModel
from server.openai.choice import Choice
from server.openai.logprobs import LogprobsShape
from server.openai.part_events import ReadAnswer, message_of
from server.openai.schema import GenerationRequest
from server.openai.usage import usage_of
from server.page.records import Records
from server.settings import LimitSettings
from server.spans import SpanExporter
from server.structured.compiler import GrammarCompiler
from server.text.families.parts import Content, Part
from server.text.long_texts import LongTexts
from server.text.model_text import ModelText
from server.text.tokenizer import TextTokenizer

Kind = Literal["chat", "completions", "responses", "messages"]


class Events(Protocol):
    """Writes one streamed answer. ``opening`` comes before a choice's first text, ``finish`` after
    its last, ``usage`` after all choices where the caller asked for it.
    """

    def opening(self, choice: Choice) -> bytes: ...
    def text(self, choice: Choice, text: str) -> bytes: ...
    def finish(self, choice: Choice) -> bytes: ...
    def usage(self) -> bytes: ...

    def around_text(self, choice: Choice) -> tuple[bytes, bytes] | None:
        """What ``text`` writes before and after the JSON of its text, where that is all that it
        does and always the same.
        """
        ...


class Form(Protocol):
    """How another API than chat and completions writes an answer that was planned as a chat."""

    @property
    def kind(self) -> Kind: ...

    def body(self, answer: "Answer", texts: Sequence[str]) -> bytes: ...
    def events(self, answer: "Answer") -> Events: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Where spans go, and what they are made of."""

    exporter: SpanExporter
    records: Records


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What every request needs of the gateway."""

    generator: Generator
    text: ModelText
    limits: LimitSettings
    grammars: GrammarCompiler
    long_texts: LongTexts | None = None  # None: they are read in a thread
    spans: Spans | None = None  # None: nobody collects them
    records: Records | None = None  # of what attempts went through


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """``choices`` are ordered by index: all of the first prompt, then all of the second.

    ``echoes`` has each choice's prompt as text, where the answer is to begin with it.
    """

    kind: Kind
    id: str
    created: int  # Unix seconds
    model: ServedModel
    asked: GenerationRequest
    choices: Sequence[Choice]
    choices_per_prompt: int
    tokenizer: TextTokenizer
    logprobs: Sequence[LogprobsShape] | None
    echoes: Sequence[str] | None = None
    read: ReadAnswer | None = None  # None: all text is content
    form: Form | None = None  # None: that of ``kind``
    ignored: tuple[str, ...] = ()

    def usage(self) -> dict[str, Any]:
        return usage_of(self.choices, choices_per_prompt=self.choices_per_prompt)

    def most_tokens(self) -> int:
        """Prompts and the longest answers that were asked for."""
        longest = sum(choice.request.stop.max_tokens for choice in self.choices)
        return self._prompt_tokens() + longest

    def used_tokens(self) -> int:
        return self._prompt_tokens() + sum(choice.completion_tokens for choice in self.choices)

    def _prompt_tokens(self) -> int:
        firsts = self.choices[:: self.choices_per_prompt]
        return sum(len(choice.request.prompt_token_ids) for choice in firsts)

    def echo(self, choice: Choice) -> str:
        return "" if self.echoes is None else self.echoes[choice.index]

    def take_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Those of the tokens since the last call, in the endpoint's shape; None if not asked."""
        if self.logprobs is None:
            return None
        shape = self.logprobs[choice.index]
        tokens = choice.take_tokens()
        return shape.chat(tokens) if self.kind == "chat" else shape.completion(tokens)

    def echo_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Those of an echoed prompt's own tokens; to be taken once, before all others."""
        if self.logprobs is None or self.echoes is None:
            return None
        return self.logprobs[choice.index].completion(choice.prompt_tokens())

    def body(self, texts: Sequence[str]) -> bytes:
        """The whole answer at once; ``texts`` has one entry for each choice."""
        if self.form is not None:
            return self.form.body(self, texts)
        choices = [self._choice(c, text) for c, text in zip(self.choices, texts, strict=True)]
        kind = "chat.completion" if self.kind == "chat" else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model.id}
        whole: dict[str, Any] = {**head, "choices": choices, "usage": self.usage()}
        if self.kind == "chat":
            first = self.choices[0]
            if self.asked.return_token_ids:
                whole["prompt_token_ids"] = first.request.prompt_token_ids
            whole |= self._prompt_logprobs(first)
        return orjson.dumps(whole)

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        if self.asked.prompt_logprobs is None:
            return {}
        shape = LogprobsShape(self.tokenizer, as_token_ids=False)
        return {"prompt_logprobs": shape.prompt(choice.prompt_tokens())}

    def finish_reason(self, choice: Choice) -> str | None:
        return choice.finish_reason if self.read is None else self.read.finish_reason(choice)

    def parts(self, choice: Choice, text: str) -> list[Part]:
        """Of the next piece of the choice's text, and all that is left once it has ended."""
        if self.read is None:
            return [Content(text)] if text else []
        parts = self.read.push(choice, text)
        return parts if choice.finish_reason is None else [*parts, *self.read.finish(choice)]

    def _message(self, choice: Choice, text: str) -> dict[str, Any]:
        if self.read is None:
            return {"role": "assistant", "content": text, "refusal": None}
        return message_of(self.parts(choice, text))

    def _choice(self, choice: Choice, text: str) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": choice.index}
        if self.kind == "chat":
            shown["message"] = self._message(choice, text)
        else:
            shown["text"] = self.echo(choice) + text
        echoed = self.echo_logprobs(choice)
        shown["logprobs"] = _joined(echoed, self.take_logprobs(choice))
        shown["finish_reason"] = self.finish_reason(choice)
        if self.asked.return_token_ids:
            shown["token_ids"] = choice.take_token_ids()
            if self.kind == "completions":
                shown["prompt_token_ids"] = choice.request.prompt_token_ids
        if self.kind == "completions":
            shown |= self._prompt_logprobs(choice)
        return shown


def _joined(first: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or then is None:
        return then
    return {name: [*first[name], *then[name]] for name in then}
