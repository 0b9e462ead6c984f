"""Kimi K2: control tokens around a section of calls; a call is named ``functions.NAME:NUMBER``,
which is also its id.
"""

import json
from collections.abc import Sequence

from server.text.families.calls import Calls
from server.text.families.family import NewCallId, Spell, Tool
from server.text.families.json_call import json_rule
from server.text.families.marked_text import MarkedText
from server.text.families.parts import Content, Part, PartReader

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
PREFIX = "functions."


class KimiK2:
    name = "kimi_k2"
    signs = (SECTION_BEGIN,)
    markers = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENT_BEGIN)
    arguments_as_text = True
    reads_every_text = False

    def reader(self, new_call_id: NewCallId, tools: Sequence[Tool]) -> PartReader:
        return _Reader(Calls(new_call_id))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, spell: Spell) -> str:
        rules = [
            f"tool_{i}: {json.dumps(f'{PREFIX}{tool.name}:')} /[0-9]{{1,2}}/ "
            f"{spell(ARGUMENT_BEGIN)} arguments_{i}\n"
            f"arguments_{i}: {json_rule(tool.parameters)}\n"
            for i, tool in enumerate(tools)
        ]
        one_of = " | ".join(f"tool_{i}" for i in range(len(tools)))
        return (
            f"calls: {spell(SECTION_BEGIN)} call{'+' if parallel else ''} {spell(SECTION_END)}\n"
            f"call: {spell(CALL_BEGIN)} ({one_of}) {spell(CALL_END)}\n" + "".join(rules)
        )


class _Reader:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = MarkedText()
        self._wanted: tuple[str, ...] = (SECTION_BEGIN,)
        self._header = ""

    def push(self, text: str) -> list[Part]:
        self._text.push(text)
        return self._text.read(self._advance)

    def finish(self) -> list[Part]:
        rest = self._text.take_all()
        if self._wanted == (SECTION_BEGIN,):
            return [Content(rest)] if rest else []
        return self._calls.arguments(rest) if self._wanted == (CALL_END,) else []

    def _advance(self, parts: list[Part]) -> bool:
        before, marker = self._text.take_until(self._wanted)
        if self._wanted == (SECTION_BEGIN,):
            parts += [Content(before)] if before else []
        elif self._wanted == (CALL_END,):
            parts += self._calls.arguments(before)
        elif self._wanted == (ARGUMENT_BEGIN,):
            self._header += before
        if marker is None:
            return False
        if marker == CALL_BEGIN:
            self._wanted, self._header = (ARGUMENT_BEGIN,), ""
        elif marker == ARGUMENT_BEGIN:
            call_id = self._header.strip()
            name = call_id.removeprefix(PREFIX).rpartition(":")[0] or call_id
            parts.append(self._calls.begin(name, call_id))
            self._wanted = (CALL_END,)
        elif marker == SECTION_END:
            self._wanted = (SECTION_BEGIN,)
        else:
            self._wanted = (CALL_BEGIN, SECTION_END)
        return True
