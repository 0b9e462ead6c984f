"""Llama 3.1 and later: a bare JSON object with ``name`` and ``parameters``, perhaps behind
``<|python_tag|>``; several are separated by semicolons.
"""

from collections.abc import Sequence

from server.text.families.calls import Calls, JsonCallReader
from server.text.families.family import NewCallId, Spell, Tool
from server.text.families.json_call import any_of, call_schema, json_rule
from server.text.families.parts import Content, Part, PartReader

PYTHON_TAG = "<|python_tag|>"


class Llama3Json:
    name = "llama3_json"
    signs = (PYTHON_TAG, '"parameters"')
    markers = (PYTHON_TAG,)
    arguments_as_text = False
    reads_every_text = False

    def reader(self, new_call_id: NewCallId, tools: Sequence[Tool]) -> PartReader:
        return _Reader(Calls(new_call_id))

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, spell: Spell) -> str:
        schema = any_of(
            [call_schema(t.name, t.parameters, argument_key="parameters") for t in tools]
        )
        more = '("; " call)*' if parallel else ""
        return f"calls: call {more}\ncall: {json_rule(schema)}\n"


class _Reader:
    """A text that does not begin with an object is content to its end."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._held = ""  # before the first object
        self._is_content = False
        self._call: JsonCallReader | None = None

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        while text:
            if self._is_content:
                return [*parts, Content(text)]
            if self._call is None:
                text = self._look_for_object(text, parts)
                continue
            more, text = self._call.push(text)
            parts += more
            if not self._call.open:
                self._end_call(parts)
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._call is not None:
            self._end_call(parts)
        elif self._held.strip(" \n;"):
            parts.append(Content(self._held))
        self._held = ""
        return parts

    def _look_for_object(self, text: str, parts: list[Part]) -> str:
        """What is left of ``text`` once it is known what it begins."""
        held = self._held + text
        self._held = ""
        begun = held.lstrip(" \n;" if self._calls.count else " \n")
        if begun.startswith("{"):
            self._call = JsonCallReader(self._calls)
            return begun
        if begun.startswith(PYTHON_TAG):
            return begun.removeprefix(PYTHON_TAG)
        if PYTHON_TAG.startswith(begun):
            self._held = held
            return ""
        self._is_content = True
        return held

    def _end_call(self, parts: list[Part]) -> None:
        assert self._call is not None
        self._is_content = self._call.name is None
        parts += self._call.finish()
        self._call = None
