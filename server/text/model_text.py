"""Everything textual about the served model: tokenizer, chat template, defaults of its authors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import orjson

from protocol.errors import InvalidRequest
from server.text.chat_template import ChatMessage, ChatTemplate, TemplateOption
from server.text.families.choose import PLAIN
from server.text.families.family import Family, Tool
from server.text.families.reasoning import ReasoningMarks
from server.text.tokenizer import TextTokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that no text has a right to rely on


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's authors recommend (``generation_config.json``), used where a caller is
    silent. ``end_token_ids`` end a generation unless the caller asks to ignore them.
    """

    end_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ChatPrompt(NamedTuple):
    token_ids: list[int]
    reasons: bool  # it ends where the model's reasoning begins


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelText:
    tokenizer: TextTokenizer
    template: ChatTemplate | None  # base models have none and serve completions only
    defaults: GenerationDefaults
    family: Family = PLAIN
    reasoning: ReasoningMarks | None = None  # of a model that may reason before it answers

    def spell(self, text: str) -> str:
        """``text`` as items of a Lark grammar: text cannot spell special tokens."""
        special = self.tokenizer.special_ids
        return " ".join(
            f"<[{token_id}]>" if token_id in special else orjson.dumps(piece).decode()
            for piece, token_id in self.tokenizer.pieces_of(text)
        )

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, TemplateOption] | None = None,
        tools: Sequence[Tool] = (),
    ) -> ChatPrompt:
        """The conversation as token ids. Control tokens come from the template only: their literals
        in messages, tools and options are encoded as plain text.

        Raises:
            InvalidRequest: there is no template, or it refuses the conversation.
        """
        if self.template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; use /v1/completions", param="messages"
            )
        if tools and not self.template.takes_tools:
            messages = [{"role": "system", "content": PLAIN.instructions(tools)}, *messages]
            tools = ()
        given: dict[str, Any] = {
            "messages": list(messages),
            "options": dict(options or {}),
            "tools": [tool.definition for tool in tools],
        }
        mark: str | None = None
        texts = list(_texts(given))
        if any(map(self.tokenizer.has_control_literal, texts)):
            mark = _unused_character(texts)
            given = _marked(given, partial(self.tokenizer.mark_control_literals, mark=mark))
        text = self.template.render(
            given["messages"],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            options=given["options"],
            tools=given["tools"] or None,
        )
        reasons = self.reasoning is not None and text.rstrip().endswith(self.reasoning.open)
        return ChatPrompt(self.tokenizer.encode_rendered(text, mark=mark), reasons)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)


def _marked(value: Any, mark: Callable[[str], str]) -> Any:
    """A copy with all texts marked, names included."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, dict):
        return {mark(key): _marked(child, mark) for key, child in value.items()}
    return [_marked(child, mark) for child in value] if isinstance(value, list) else value


def _unused_character(texts: Sequence[str]) -> str:
    taken = set().union(*texts)
    return next(mark for mark in map(chr, _PRIVATE_USE) if mark not in taken)
