"""DeepSeek V3 and R1: control tokens around ``function``, the name, and JSON in a code fence.
V3.1 leaves out the word and the fence; both are read.
"""

import json
from collections.abc import Sequence

from server.text.families.calls import Calls
from server.text.families.family import NewCallId, Spell, Tool
from server.text.families.json_call import json_rule
from server.text.families.marked_text import MarkedText
from server.text.families.parts import Content, Part, PartReader

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE_OPEN, FENCE_CLOSE = "\n```json\n", "\n```"
KIND = "function"


class DeepseekV3:
    name = "deepseek_v3"
    signs = (CALLS_BEGIN,)
    markers = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    arguments_as_text = True
    reads_every_text = False

    def reader(self, new_call_id: NewCallId, tools: Sequence[Tool]) -> PartReader:
        return _Reader(Calls(new_call_id))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, spell: Spell) -> str:
        more = r'("\n" call)*' if parallel else ""
        rules = [
            f"tool_{i}: {json.dumps(tool.name + FENCE_OPEN)} arguments_{i}\n"
            f"arguments_{i}: {json_rule(tool.parameters)}\n"
            for i, tool in enumerate(tools)
        ]
        one_of = " | ".join(f"tool_{i}" for i in range(len(tools)))
        return (
            f"calls: {spell(CALLS_BEGIN)} call {more} {spell(CALLS_END)}\n"
            f"call: {spell(CALL_BEGIN)} {json.dumps(KIND)} {spell(SEPARATOR)} ({one_of}) "
            f"{json.dumps(FENCE_CLOSE)} {spell(CALL_END)}\n" + "".join(rules)
        )


class _Reader:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = MarkedText()
        self._wanted: tuple[str, ...] = (CALLS_BEGIN,)
        self._header = ""

    def push(self, text: str) -> list[Part]:
        self._text.push(text)
        return self._text.read(self._advance)

    def finish(self) -> list[Part]:
        rest = self._text.take_all()
        if self._wanted == (CALLS_BEGIN,):
            return [Content(rest)] if rest else []
        in_arguments = CALL_END in self._wanted
        return self._calls.arguments(rest.removesuffix(FENCE_CLOSE)) if in_arguments else []

    def _advance(self, parts: list[Part]) -> bool:
        before, marker = self._text.take_until(self._wanted)
        if self._wanted == (CALLS_BEGIN,):
            parts += [Content(before)] if before else []
        elif CALL_END in self._wanted:
            parts += self._calls.arguments(before)
        else:
            self._header += before
        if marker is None:
            return False
        self._pass(marker, parts)
        return True

    def _pass(self, marker: str, parts: list[Part]) -> None:
        match marker:
            case _ if marker in (CALLS_BEGIN, CALL_END, FENCE_CLOSE + CALL_END):
                self._wanted = (CALL_BEGIN, CALLS_END)
            case _ if marker == CALL_BEGIN:
                self._wanted, self._header = (SEPARATOR,), ""
            case _ if marker == SEPARATOR and self._header.strip() == KIND:
                self._wanted, self._header = (FENCE_OPEN,), ""
            case _ if marker in (SEPARATOR, FENCE_OPEN):
                parts.append(self._calls.begin(self._header.strip()))
                self._wanted = (FENCE_CLOSE + CALL_END, CALL_END)
            case _:
                self._wanted = (CALLS_BEGIN,)
