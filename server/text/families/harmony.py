"""gpt-oss: every message names a channel. ``analysis`` is reasoning, ``final`` is the answer, and a
message on ``commentary`` to ``functions.NAME`` is a call. Format: openai/harmony, docs/format.md.
"""

import json
import re
from collections.abc import Sequence
from typing import Literal

from server.text.families.calls import Calls
from server.text.families.family import NewCallId, Spell, Tool
from server.text.families.json_call import json_rule
from server.text.families.marked_text import MarkedText
from server.text.families.parts import Content, Part, PartReader, Reasoning

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.-]{1,64})")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")

Kind = Literal["content", "reasoning", "call"]


class Harmony:
    name = "harmony"
    signs = (CHANNEL,)
    markers = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
    arguments_as_text = False
    reads_every_text = True

    def reader(self, new_call_id: NewCallId, tools: Sequence[Tool]) -> PartReader:
        return _Reader(Calls(new_call_id))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, spell: Spell) -> str:
        """One call, whatever ``parallel`` says: its end is the end of the text."""
        rules = [
            f"tool_{i}: {spell(CHANNEL)} {json.dumps(f'commentary to=functions.{tool.name} ')} "
            f'{spell(CONSTRAIN)} "json" {spell(MESSAGE)} arguments_{i}\n'
            f"arguments_{i}: {json_rule(tool.parameters)}\n"
            for i, tool in enumerate(tools)
        ]
        one_of = " | ".join(f"tool_{i}" for i in range(len(tools)))
        return f"calls: {one_of}\n" + "".join(rules)


class _Reader:
    """Text without any marker is content: a prompt may have opened the final message already."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = MarkedText()
        self._header: str | None = None  # while between a message's start and its text
        self._kind: Kind = "content"

    def push(self, text: str) -> list[Part]:
        self._text.push(text)
        return self._text.read(self._advance)

    def finish(self) -> list[Part]:
        rest = self._text.take_all()
        return [] if self._header is not None else self._body(rest)

    def _advance(self, parts: list[Part]) -> bool:
        if self._header is not None:
            before, marker = self._text.take_until((MESSAGE,))
            self._header += before
            if marker is not None:
                self._open_message(parts)
            return marker is not None
        before, marker = self._text.take_until((START, CHANNEL, END, CALL, RETURN))
        parts += self._body(before)
        if marker in (START, CHANNEL):
            self._header = marker
        elif marker is not None:
            self._kind = "content"
        return marker is not None

    def _open_message(self, parts: list[Part]) -> None:
        header, self._header = self._header or "", None
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL.search(header)
        if recipient is not None:
            self._kind = "call"
            parts.append(self._calls.begin(recipient[1]))
        else:
            reasons = channel is not None and channel[1] == "analysis"
            self._kind = "reasoning" if reasons else "content"

    def _body(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._kind == "call":
            return self._calls.arguments(text)
        return [Reasoning(text) if self._kind == "reasoning" else Content(text)]
