"""From the bytes of a body to the JSON object that it is.

Nothing of the input is repeated in an error beyond the names of fields: errors are small whatever
the body was, and cannot carry anything back. No member is dropped silently: where an object names
one twice, parsers differ in which of them counts, and so might whoever checked the request before.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from protocol.errors import InvalidRequest
from server.openai.treatment import PRINTABLE
from server.settings import LimitSettings

_NOT_FINITE_FIELD = re.compile(r'"([A-Za-z_]{1,64})"\s*:\s*[^",:{}]{0,400}\Z')


def read_object(body: bytes, limits: LimitSettings) -> dict[str, Any]:
    """The JSON object that ``body`` is.

    Raises:
        InvalidRequest: it is something else, nested too deep, or names a member twice.
    """
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _not_json(error) from None
    if not isinstance(raw, dict):
        raise InvalidRequest("the body must be a JSON object")
    if body.count(b"[") + body.count(b"{") > limits.max_json_depth:
        _check_depth(raw, limits.max_json_depth)
    if _may_repeat(body, raw):
        json.loads(body, object_pairs_hook=_without_repetition, parse_int=len)
    return raw


def _not_json(error: orjson.JSONDecodeError) -> InvalidRequest:
    """Numbers that JSON does not have are the one syntax error worth naming the field of."""
    message = f"the body is not valid JSON: {error.msg.split(':', 1)[0]}, character {error.pos}"
    rest = error.doc[error.pos : error.pos + 9]
    if rest.startswith(("NaN", "Infinity", "-Infinity")) or "infinity" in error.msg:
        before = error.doc[max(0, error.pos - 500) : error.pos]
        named = _NOT_FINITE_FIELD.search(before)
        message = "numbers must be finite: JSON has no NaN, no Infinity and nothing above 1.8e308"
        if named:
            return InvalidRequest(f"{named[1]}: {message}", param=named[1])
    return InvalidRequest(message)


def _check_depth(value: object, allowed: int) -> None:
    level: list[object] = [value]
    for _ in range(allowed):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else _items(parent))
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"the body is nested deeper than {allowed} levels")


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def _may_repeat(body: bytes, raw: dict[str, Any]) -> bool:
    """False only if no object of ``body`` has a member twice; cheap, and nearly always false.

    Every text of JSON, names included, stands between two quotes, and within it quotes are
    escaped. A member that was dropped took its name along: then there are quotes too many.
    """
    quotes = body.count(b'"')
    if b"\\" in body and b'\\\\"' not in body:  # else a quote behind a backslash may be a real one
        quotes -= body.count(b'\\"')
    return quotes != 2 * _texts_in(raw)


def _texts_in(raw: dict[str, Any]) -> int:
    """At most how many there are: lists that begin with a number are not looked through."""
    count = 0
    waiting: list[dict[str, Any] | list[Any]] = [raw]
    while waiting:
        value = waiting.pop()
        children: Iterable[Any] = value
        if isinstance(value, dict):
            count += len(value)
            children = value.values()
        elif value and isinstance(value[0], int | float):
            continue
        for child in children:
            if isinstance(child, str):
                count += 1
            elif isinstance(child, dict | list):
                waiting.append(child)
    return count


def _without_repetition(members: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in members:
        if name in seen:
            param = name if PRINTABLE.match(name) else None
            raise InvalidRequest(
                f"{param or 'a member'}: an object of the body has it twice: leave one out",
                param=param,
            )
        seen.add(name)
