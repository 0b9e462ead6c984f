"""Structural tags: text in which tags open parts that must match a schema, as a Lark grammar.

Two spellings are common and both are read: ``structures`` with ``triggers``, and a nested
``format`` (XGrammar's documentation, Structural Tag). Invariant: what of them is not enforced here
is refused by name. Which tokens spell a marker is the caller's to know.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import invalid_field
from server.text.families.family import Spell
from server.text.families.json_call import json_rule

_KINDS = (
    *("const_string", "json_schema", "regex", "sequence", "or"),
    *("tag", "triggered_tags", "tags_with_separator"),
)
_TEXT = "/(?s:.*)/"
_BARE_SLASH = re.compile(r"(?<!\\)((?:\\\\)*)/")


def tags_grammar(asked: Mapping[str, Any], spell: Spell, *, param: str) -> str:
    """
    Raises:
        InvalidRequest: a part is missing, of the wrong type or not known; it is named by its path.
    """
    rules = _Rules(spell)
    if asked.get("format") is not None:
        start = rules.of_outermost(asked["format"], f"{param}.format")
    else:
        start = rules.triggered(
            {
                "triggers": asked.get("triggers"),
                "tags": [
                    _of_structure(structure, f"{param}.structures[{i}]")
                    for i, structure in enumerate(_list(asked, "structures", param))
                ],
            },
            param,
        )
    return rules.source(start)


class _Rules:
    """The rules so far; each function adds those of one part and returns the name of its first."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._rules: list[str] = []

    def source(self, start: str) -> str:
        return "\n".join((f"start: {start}", *self._rules))

    def of_outermost(self, part: object, path: str) -> str:
        """Free text has no end of its own, so what has it can only be the whole."""
        if isinstance(part, dict) and part.get("type") == "triggered_tags":
            return self.triggered(part, path)
        return self._of(part, path)

    def triggered(self, part: Mapping[str, Any], path: str) -> str:
        """Free text, until a trigger in it opens a tag."""
        _only(part, path, "triggers", "tags", "at_least_one", "stop_after_first")
        triggers = _texts(part.get("triggers"), f"{path}.triggers")
        after: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        whole: list[str] = []
        for i, tag in enumerate(_list(part, "tags", path)):
            where = f"{path}.tags[{i}]"
            begin = _text(_object(tag, where), "begin", where)
            trigger = next((t for t in triggers if begin.startswith(t)), None)
            if trigger is None:
                raise invalid_field(f"{where}.begin", "must start with one of the triggers")
            rest = self._tag(tag, where, begin=begin.removeprefix(trigger))
            after[trigger].append(rest)
            whole.append(self._add(f"{self._literal(trigger)} {rest}"))
        opened = self._add(
            " | ".join(
                f"{self._until(trigger)} ({' | '.join(tags)})"
                for trigger, tags in after.items()
                if tags
            )
        )
        text = self._add(_TEXT)
        once = _flag(part, "stop_after_first", path)
        if _flag(part, "at_least_one", path):
            first = self._add(" | ".join(whole))
            return first if once else self._add(f"{first} {opened}* {text}")
        return self._add(f"{opened} | {text}" if once else f"{opened}* {text}")

    def _of(self, part: object, path: str) -> str:
        fields = _object(part, path)
        match fields.get("type"):
            case "const_string":
                _only(fields, path, "value")
                body = self._literal(_text(fields, "value", path))
            case "json_schema":
                _only(fields, path, "json_schema")
                body = _schema(fields.get("json_schema"), f"{path}.json_schema")
            case "regex":
                _only(fields, path, "pattern")
                body = lark_regex(_text(fields, "pattern", path))
            case "sequence":
                body = " ".join(self._each(fields, "elements", path))
            case "or":
                body = " | ".join(self._each(fields, "elements", path))
            case "tag":
                body = self._tag(fields, path)
            case "tags_with_separator":
                body = self._separated(fields, path)
            case _:
                raise invalid_field(
                    f"{path}.type", f"must be {', '.join(_KINDS)}, or any_text in a tag"
                )
        return self._add(body)

    def _each(self, fields: Mapping[str, Any], name: str, path: str) -> list[str]:
        _only(fields, path, name)
        elements = _list(fields, name, path)
        return [self._of(element, f"{path}.{name}[{i}]") for i, element in enumerate(elements)]

    def _separated(self, fields: Mapping[str, Any], path: str) -> str:
        _only(fields, path, "tags", "separator", "at_least_one", "stop_after_first")
        tags = [
            self._tag(_object(tag, f"{path}.tags[{i}]"), f"{path}.tags[{i}]")
            for i, tag in enumerate(_list(fields, "tags", path))
        ]
        one = self._add(" | ".join(tags))
        separator = self._literal(_text(fields, "separator", path))
        several = one
        if not _flag(fields, "stop_after_first", path):
            several = self._add(f"{one} ({separator} {one})*")
        return several if _flag(fields, "at_least_one", path) else f"{several}?"

    def _tag(self, fields: Mapping[str, Any], path: str, begin: str | None = None) -> str:
        """The whole tag, or what is left of it where only ``begin`` of its beginning is."""
        _only(fields, path, "begin", "content", "end")
        begin = _text(fields, "begin", path) if begin is None else begin
        end = fields.get("end", "")
        ends = (end,) if isinstance(end, str) else _texts(end, f"{path}.end")
        content = _object(fields.get("content"), f"{path}.content")
        if content.get("type") == "any_text":
            _only(content, f"{path}.content")
            if "" in ends:
                raise invalid_field(
                    f"{path}.end", "must not be empty where the content is any_text"
                )
            inside = " | ".join(map(self._until, ends))
        else:
            closing = " | ".join(map(self._literal, ends))
            inside = f"{self._of(content, f'{path}.content')} ({closing})"
        return self._add(f"{self._literal(begin)} ({inside})")

    def _literal(self, text: str) -> str:
        return self._spell(text) if text else '""'

    def _until(self, marker: str) -> str:
        """Free text up to ``marker``, that included; a special token is no text."""
        spelt = self._spell(marker)
        if spelt.startswith("<["):
            return self._add(f"{_TEXT} {spelt}")
        return self._add(f"{_TEXT} {spelt}", options="[lazy]")

    def _add(self, body: str, *, options: str = "") -> str:
        name = f"part_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name


def _of_structure(structure: object, path: str) -> dict[str, Any]:
    fields = _object(structure, path)
    _only(fields, path, "begin", "schema", "end")
    content = {"type": "json_schema", "json_schema": fields.get("schema", {})}
    return {**fields, "content": content, "schema": None}


def _schema(schema: object, path: str) -> str:
    if not isinstance(schema, dict | bool):
        raise invalid_field(path, "must be a JSON schema")
    whole = {} if schema is True else {"not": {}} if schema is False else schema
    return json_rule(whole, lenient=False)


def lark_regex(pattern: str) -> str:
    """A regular expression as Lark writes one."""
    escaped = _BARE_SLASH.sub(r"\1\/", pattern).replace("\n", r"\n")
    return f"/{escaped}/"


def _only(fields: Mapping[str, Any], path: str, *names: str) -> None:
    """A field that is not known might say something of the output."""
    if any(name not in (*names, "type") for name, value in fields.items() if value is not None):
        raise invalid_field(path, f"takes nothing but type, {', '.join(names)}")


def _object(value: object, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid_field(path, "must be an object")
    return value


def _text(fields: Mapping[str, Any], name: str, path: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise invalid_field(f"{path}.{name}", "must be a string")
    return value


def _texts(value: object, path: str) -> Sequence[str]:
    if not isinstance(value, list) or not value or not all(isinstance(t, str) and t for t in value):
        raise invalid_field(path, "must have at least one text, and none that is empty")
    return value


def _list(fields: Mapping[str, Any], name: str, path: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list) or not value:
        raise invalid_field(f"{path}.{name}", "must be a list with at least one entry")
    return value


def _flag(fields: Mapping[str, Any], name: str, path: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise invalid_field(f"{path}.{name}", "must be true or false")
    return bool(value)
