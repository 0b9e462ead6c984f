"""What a caller wants its output to look like, from the fields that say so. Nothing compiles here.

One request has one constraint at most; fields that would give it two are refused by name.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from protocol.errors import invalid_field
from runtime.grammars import Kind
from server.structured.tags import tags_grammar
from server.text.families.family import Spell

MAX_BYTES = 64 * 1024
MAX_CHOICES = 1024
WHOLE_TEXT = ("allowed_token_ids", "bad_words")  # they hold for reasoning and calls as well
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``structures`` with ``triggers``, or ``format``, are those of the type structural_tag."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The extension: exactly one of these."""

    json: dict[str, Any] | str | bool | UnsetType | None = UNSET
    json_object: bool | UnsetType | None = UNSET
    regex: str | UnsetType | None = UNSET
    choice: list[str] | UnsetType | None = UNSET
    grammar: str | UnsetType | None = UNSET
    structural_tag: dict[str, Any] | str | UnsetType | None = UNSET


class Constraint(NamedTuple):
    """``param`` is the field to name when it cannot be used."""

    kind: Kind
    source: str
    param: str
    lenient: bool = False


def constraint_of(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None,
    *,
    spell: Spell,
    allowed_token_ids: Sequence[int] | None = None,
    bad_words: Sequence[str] | None = None,
) -> Constraint | None:
    """
    Raises:
        InvalidRequest: the fields contradict each other, or one is too large.
    """
    constraints = {
        "response_format": response_format and _of_response_format(response_format, spell),
        "structured_outputs": structured and _of_extension(structured, spell),
        "allowed_token_ids": allowed_token_ids and _only(allowed_token_ids),
        "bad_words": bad_words and _without(bad_words),
    }
    given = [(name, constraint) for name, constraint in constraints.items() if constraint]
    if len(given) > 1:
        raise invalid_field(given[1][0], f"cannot be combined with {given[0][0]}")
    return given[0][1] if given else None


def json_constraint(schema: object, *, param: str, lenient: bool = False) -> Constraint:
    """``schema`` is what came as one: true, which is any JSON, or an object."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise invalid_field(param, "must be an object, or true for any JSON")
    return _checked("json", orjson.dumps(schema).decode(), param, lenient=lenient)


def lark_constraint(source: str, *, param: str) -> Constraint:
    return _checked("lark", source, param)


def _of_response_format(asked: ResponseFormat, spell: Spell) -> Constraint | None:
    if asked.type == "json_object":
        return json_constraint({"type": "object"}, param="response_format")
    if asked.type == "text":
        return None
    if asked.type == "structural_tag":
        return _tags(msgspec.structs.asdict(asked), spell, param="response_format")
    if asked.type != "json_schema":
        raise invalid_field(
            "response_format.type", "must be text, json_object, json_schema or structural_tag"
        )
    if asked.json_schema is None:
        raise invalid_field("response_format.json_schema", "is required")
    if not _NAME.match(asked.json_schema.name):
        raise invalid_field(
            "response_format.json_schema.name", "must be 1 to 64 letters, digits, _ or -"
        )
    schema = asked.json_schema.schema
    return json_constraint(
        {} if schema is None else schema, param="response_format.json_schema.schema"
    )


def _only(token_ids: Sequence[int]) -> Constraint:
    """Any number of these tokens."""
    listed = ",".join(map(str, sorted(set(token_ids))))
    return lark_constraint(f"start: <[{listed}]>*", param="allowed_token_ids")


def _without(words: Sequence[str]) -> Constraint:
    """Any text that has none of ``words`` in it, however it is cut into tokens."""
    regex = "|".join("".join(map(_literal, word)) for word in words)
    source = f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*({regex}).*)/"
    return lark_constraint(source, param="bad_words")


def _literal(character: str) -> str:
    """As a regular expression, whatever it means to one."""
    return character if character.isalnum() else f"\\x{{{ord(character):x}}}"


def _of_extension(asked: StructuredOutputs, spell: Spell) -> Constraint | None:
    fields = msgspec.structs.asdict(asked)
    given = {name: value for name, value in fields.items() if value not in (UNSET, None, False)}
    if len(given) != 1:
        raise invalid_field("structured_outputs", f"needs exactly one of {', '.join(fields)}")
    ((name, value),) = given.items()
    param = f"structured_outputs.{name}"
    match name:
        case "json":
            return json_constraint(_parsed(value, param), param=param)
        case "json_object":
            return json_constraint({"type": "object"}, param=param)
        case "regex":
            return _checked("regex", value, param)
        case "choice":
            return lark_constraint(f"start: {_one_of(value, param)}", param=param)
        case "structural_tag":
            tags = _parsed(value, param)
            if not isinstance(tags, dict):
                raise invalid_field(param, "must be an object, or the JSON text of one")
            return _tags(tags, spell, param=param)
        case _:
            return lark_constraint(value, param=param)


def _tags(asked: dict[str, Any], spell: Spell, *, param: str) -> Constraint:
    return lark_constraint(tags_grammar(asked, spell, param=param), param=param)


def _one_of(choices: Sequence[str], param: str) -> str:
    if not choices or "" in choices:
        raise invalid_field(param, "must have at least one text, and none that is empty")
    if len(choices) > MAX_CHOICES:
        raise invalid_field(param, f"more than {MAX_CHOICES} choices")
    return " | ".join(orjson.dumps(choice).decode() for choice in choices)


def _parsed(schema: object, param: str) -> object:
    if not isinstance(schema, str):
        return schema
    try:
        return orjson.loads(schema)
    except orjson.JSONDecodeError:
        raise invalid_field(param, "the string is not valid JSON") from None


def _checked(kind: Kind, source: str, param: str, *, lenient: bool = False) -> Constraint:
    if len(source.encode()) > MAX_BYTES:
        raise invalid_field(param, f"is larger than {MAX_BYTES} bytes")
    return Constraint(kind, source, param, lenient)
