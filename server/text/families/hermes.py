"""Hermes and Qwen: ``<tool_call>`` and ``</tool_call>`` around a JSON object. Also what models are
told to write whose template knows no tools.
"""

import json
from collections.abc import Sequence

from server.text.families.calls import Calls, JsonCallReader
from server.text.families.family import NewCallId, Spell, Tool
from server.text.families.json_call import any_of, call_schema, json_rule
from server.text.families.marked_text import MarkedText
from server.text.families.parts import Content, Part, PartReader

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    name = "hermes"
    signs = (OPEN,)
    markers = (OPEN, CLOSE)
    arguments_as_text = False
    reads_every_text = False

    def reader(self, new_call_id: NewCallId, tools: Sequence[Tool]) -> PartReader:
        return _Reader(Calls(new_call_id))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, spell: Spell) -> str:
        schema = any_of(
            [call_schema(t.name, t.parameters, argument_key="arguments") for t in tools]
        )
        more = r'("\n" call)*' if parallel else ""
        return (
            f"calls: call {more}\n"
            f'call: {spell(OPEN)} "\\n" body "\\n" {spell(CLOSE)}\n'
            f"body: {json_rule(schema)}\n"
        )

    def instructions(self, tools: Sequence[Tool]) -> str:
        """A system message for models whose own template cannot present tools."""
        listed = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
        return (
            f"You can call these functions, given as JSON:\n{listed}\n\nTo call one, answer with\n"
            f'{OPEN}\n{{"name": <its name>, "arguments": <a JSON object>}}\n{CLOSE}'
        )


class _Reader:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._text = MarkedText()
        self._call: JsonCallReader | None = None
        self._after = ""  # between the object and the closing marker

    def push(self, text: str) -> list[Part]:
        self._text.push(text)
        return self._text.read(self._advance)

    def finish(self) -> list[Part]:
        rest = self._text.take_all()
        if self._call is None:
            return self._content(rest)
        parts: list[Part] = []
        self._read_call(self._call, rest, parts)
        self._end_call(self._call, parts)
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Read up to the next marker; False when there is none yet."""
        call = self._call
        if call is None:
            before, marker = self._text.take_until((OPEN,))
            parts += self._content(before)
            if marker is not None:
                self._call, self._after = JsonCallReader(self._calls), ""
            return marker is not None
        inside, marker = self._text.take_until((CLOSE,))
        self._read_call(call, inside, parts)
        if marker is None:
            return False
        if call.in_string:
            self._read_call(call, marker, parts)
        else:
            self._end_call(call, parts)
        return True

    def _read_call(self, call: JsonCallReader, text: str, parts: list[Part]) -> None:
        more, after = call.push(text)
        parts += more
        self._after += after

    def _end_call(self, call: JsonCallReader, parts: list[Part]) -> None:
        self._call = None
        parts += call.finish(otherwise=OPEN)
        if call.name is None:
            parts += self._content(self._after)

    def _content(self, text: str) -> list[Part]:
        """Nothing but white space between and after calls is no content."""
        if not text or (self._calls.count and not text.strip()):
            return []
        return [Content(text)]
