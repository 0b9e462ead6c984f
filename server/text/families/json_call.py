"""One call written as a JSON object, read character by character: its name, then its arguments.

Invariant: the arguments come out as the very characters that the model wrote, as soon as the name
is known. What is no such object gives no name, and ``raw`` has all of it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from runtime.grammars import WHITE_SPACE

Expect = Literal["object", "key", "colon", "value", "more", "nothing"]
ARGUMENT_KEYS = ("arguments", "parameters")


class JsonCall:
    """Feed characters to ``push`` while ``open``. ``name`` is set when it has been read; then
    ``take`` gives the arguments so far.
    """

    __slots__ = (
        "_arguments",
        "_depth",
        "_escaped",
        "_expect",
        "_key",
        "_taken",
        "_token",
        "in_string",
        "name",
        "raw",
    )

    def __init__(self) -> None:
        self.name: str | None = None
        self.raw = ""
        self.in_string = False
        self._expect: Expect = "object"
        self._depth = 0
        self._escaped = False
        self._key = ""
        self._token = ""  # the key or value that is being read
        self._arguments = ""
        self._taken = 0

    @property
    def open(self) -> bool:
        return self._expect != "nothing"

    def push(self, text: str) -> str:
        """Read ``text`` up to the end of the object; what is left of it."""
        for position, character in enumerate(text):
            if not self.open:
                return text[position:]
            self.raw += character
            self._read(character)
        return ""

    def take(self) -> str:
        """Arguments since the last call; call it only once ``name`` is known."""
        taken = self._arguments[self._taken :]
        self._taken = len(self._arguments)
        return taken

    def complete(self) -> None:
        """There is no more: a call without arguments has empty ones."""
        self._expect = "nothing"
        if not self._arguments:
            self._arguments = "{}"

    def _read(self, character: str) -> None:
        match self._expect:
            case "object":
                if character == "{":
                    self._expect, self._depth = "key", 1
                elif not character.isspace():
                    self._expect = "nothing"
            case "key":
                self._read_key(character)
            case "colon":
                if character == ":":
                    self._expect, self._token = "value", ""
            case "value":
                self._read_value(character)
            case "more":
                if character == ",":
                    self._expect, self._token = "key", ""
                elif character == "}":
                    self.complete()
            case "nothing":
                pass

    def _read_key(self, character: str) -> None:
        if not self._token:
            if character == '"':
                self._token, self.in_string = character, True
            elif character == "}":
                self.complete()
            elif not character.isspace():
                self._expect = "nothing"
            return
        self._token += character
        self._step_string(character)
        if not self.in_string:
            self._key = _decoded(self._token)
            self._expect = "colon"

    def _read_value(self, character: str) -> None:
        if not self._token and character.isspace():
            return
        closes = not self.in_string and character in "}]"
        if not self.in_string and self._depth == 1 and (character == "," or closes):
            self._end_value()  # a number or word ends where the next thing begins
            self._read(character)
            return
        self._token += character
        self._stream(character)
        if self.in_string:
            self._step_string(character)
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self._depth += 1
        elif closes:
            self._depth -= 1
        if not self.in_string and self._depth == 1 and character in '"}]':
            self._end_value()

    def _stream(self, character: str) -> None:
        """Arguments are shown while they are written, unless they are a string that holds them."""
        if self._key in ARGUMENT_KEYS and self._token[0] != '"':
            self._arguments += character

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _decoded(self._token) or None
        elif self._key in ARGUMENT_KEYS and self._token.startswith('"'):
            self._arguments = _decoded(self._token)
        self._expect, self._token = "more", ""

    def _step_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self.in_string = False


def _decoded(token: str) -> str:
    try:
        value = json.loads(token)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""


def call_schema(name: str, parameters: object, *, argument_key: str) -> dict[str, object]:
    """The JSON schema of a call that ``JsonCall`` reads, name first."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, argument_key: parameters},
        "required": ["name", argument_key],
        "additionalProperties": False,
    }


def json_rule(schema: Mapping[str, object], *, lenient: bool = True) -> str:
    """What a Lark rule says to mean JSON of ``schema``. ``lenient`` leaves keywords that cannot be
    enforced to the model, since tools are described with more than can be.
    """
    guided = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE, "lenient": lenient}}
    return f"%json {json.dumps(guided)}"


def any_of(schemas: Sequence[dict[str, object]]) -> dict[str, object]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
