"""Traces that others published, and our own, read into one form.

| format   | file  | what it has                                                                |
|----------|-------|----------------------------------------------------------------------------|
| mooncake | JSONL | timestamp (ms), input_length, output_length, hash_ids of blocks of 512 tokens |
| azure    | CSV   | TIMESTAMP, ContextTokens, GeneratedTokens                                  |
| burstgpt | CSV   | Timestamp (s), Request tokens, Response tokens                             |
| sharegpt | JSON  | conversations of human and gpt; no times                                   |
| headrace | JSONL | t (s), and prompt, ids or input, with output, session, prefix_group, delay  |

The format is told by the content. A line that cannot be read is an error with its number: a trace
that silently loses requests is another load. This module does not send anything.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from capacity.load.errors import WrongOption

MOONCAKE_BLOCK_TOKENS = 512
_ROUGH_TOKENS_PER_WORD = 4 / 3  # ShareGPT answers are text; asking for their length needs a count


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a trace. ``at_s`` is None where the trace has no times; ``delay_s`` is the
    pause after the session's request before it. Exactly one of ``text``, ``token_ids`` and
    ``input_tokens`` says what the prompt is.
    """

    output_tokens: int
    at_s: float | None = None
    delay_s: float | None = None
    input_tokens: int | None = None
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    block_hashes: tuple[int, ...] = ()
    session: str | None = None
    prefix_group: str | None = None
    prefix_tokens: int = 0


def read_trace(path: Path) -> list[TraceRow]:
    """All requests in order of time; times begin at 0.

    Raises:
        WrongOption: the file cannot be read, or a line is none of a known format; the text has
            the line's number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise WrongOption(f"--trace {path}: {reason}") from None
    if not text.strip():
        raise WrongOption(f"--trace {path}: it is empty")
    rows = list(_rows(path, text))
    if not rows:
        raise WrongOption(f"--trace {path}: it has no requests")
    timed = [row for row in rows if row.at_s is not None]
    if timed and len(timed) < len(rows):
        missing = [row for row in rows if row.at_s is None and row.session is None]
        if missing:
            raise WrongOption(f"--trace {path}: some requests have a time and some have none")
    first = min((row.at_s for row in timed if row.at_s is not None), default=0.0)
    shifted = [
        row if row.at_s is None else msgspec.structs.replace(row, at_s=row.at_s - first)
        for row in rows
    ]
    return sorted(shifted, key=lambda row: row.at_s or 0.0) if len(timed) == len(rows) else shifted


def _rows(path: Path, text: str) -> Iterator[TraceRow]:
    start = text.lstrip()[:1]
    if start == "[":
        yield from _sharegpt(path, text)
    elif start == "{":
        yield from _json_lines(path, text)
    else:
        yield from _csv(path, text)


def _json_lines(path: Path, text: str) -> Iterator[TraceRow]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise TypeError("not a JSON object")
            mooncake = "input_length" in fields
            yield _mooncake(fields) if mooncake else _own(fields)
        except (ValueError, TypeError, KeyError) as error:
            raise _wrong_line(path, number, error) from None


def _mooncake(fields: Mapping[str, Any]) -> TraceRow:
    delay = fields.get("delay")
    session = fields.get("session_id")
    at = fields.get("timestamp")
    hashes = tuple(int(block) for block in fields.get("hash_ids") or ())
    length = _count(fields, "input_length")
    if len(hashes) > -(-length // MOONCAKE_BLOCK_TOKENS):
        raise ValueError(f"{len(hashes)} hash_ids are more than input_length {length} can have")
    return TraceRow(
        at_s=None if at is None else _time(at) / 1000.0,
        input_tokens=length,
        output_tokens=_count(fields, "output_length"),
        block_hashes=hashes,
        session=None if session is None else str(session),
        delay_s=None if delay is None else _time(delay) / 1000.0,
    )


def _own(fields: Mapping[str, Any]) -> TraceRow:
    known = {
        *("t", "prompt", "ids", "input", "output", "session"),
        *("prefix_group", "prefix_tokens", "delay"),
    }
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")
    given = [name for name in ("prompt", "ids", "input") if name in fields]
    if len(given) != 1:
        raise ValueError("give exactly one of prompt, ids and input")
    ids = fields.get("ids")
    prompt = fields.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise TypeError("prompt must be a string")
    optional = {name: fields.get(name) for name in ("t", "delay", "session", "prefix_group")}
    return TraceRow(
        at_s=None if optional["t"] is None else _time(optional["t"]),
        delay_s=None if optional["delay"] is None else _time(optional["delay"]),
        text=prompt,
        token_ids=None if ids is None else tuple(int(token) for token in ids),
        input_tokens=_count(fields, "input") if "input" in fields else None,
        output_tokens=_count(fields, "output"),
        session=None if optional["session"] is None else str(optional["session"]),
        prefix_group=None if optional["prefix_group"] is None else str(optional["prefix_group"]),
        prefix_tokens=_count(fields, "prefix_tokens") if "prefix_tokens" in fields else 0,
    )


def _csv(path: Path, text: str) -> Iterator[TraceRow]:
    lines = text.splitlines()
    reader = csv.DictReader(lines)
    names = set(reader.fieldnames or ())
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names:
        columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    elif {"Timestamp", "Request tokens", "Response tokens"} <= names:
        columns = ("Timestamp", "Request tokens", "Response tokens")
    else:
        raise WrongOption(
            f"--trace {path}: neither JSON nor a CSV with the columns of Azure (TIMESTAMP, "
            "ContextTokens, GeneratedTokens) or BurstGPT (Timestamp, Request tokens, "
            "Response tokens)"
        )
    when, given, made = columns
    for fields in reader:
        try:
            at = _azure_time(fields[when]) if when == "TIMESTAMP" else _time(fields[when])
            output = int(fields[made])
            if output == 0:
                continue  # BurstGPT marks requests that failed then
            tokens = int(fields[given])
            if tokens < 1 or output < 0:
                raise ValueError("token counts must be positive")
            yield TraceRow(at_s=at, input_tokens=tokens, output_tokens=output)
        except (ValueError, TypeError) as error:
            raise _wrong_line(path, reader.line_num, error) from None


def _azure_time(timestamp: str) -> float:
    try:
        return datetime.fromisoformat(_fraction(timestamp)).timestamp()
    except ValueError:
        message = f"TIMESTAMP {timestamp!r} is no time such as 2023-11-16 18:17:03.979"
        raise ValueError(message) from None


def _fraction(timestamp: str) -> str:
    """Azure writes seven digits of a second, Python reads six."""
    head, dot, rest = timestamp.strip().partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    return f"{head}{dot}{rest[: min(digits, 6)]}{rest[digits:]}" if dot else head


def _sharegpt(path: Path, text: str) -> Iterator[TraceRow]:
    try:
        conversations = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong_line(path, error.lineno, error) from None
    for number, conversation in enumerate(conversations, start=1):
        try:
            turns = conversation.get("conversations") or conversation.get("conversation") or []
            said = [(turn.get("from", turn.get("role")), turn["value"]) for turn in turns]
        except (AttributeError, KeyError, TypeError) as error:
            raise WrongOption(f"--trace {path}: conversation {number}: {error!r}") from None
        for (who, question), (_, reply) in pairwise(said):
            if who in ("human", "user") and question.strip() and reply.strip():
                words = len(reply.split())
                yield TraceRow(
                    text=question,
                    output_tokens=max(1, round(words * _ROUGH_TOKENS_PER_WORD)),
                    session=str(number),
                )


def _count(fields: Mapping[str, Any], name: str) -> int:
    value = fields[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is no time")
    time = float(value)
    if not 0 <= time < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return time


def _wrong_line(path: Path, number: int, error: Exception) -> WrongOption:
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"not JSON from column {error.colno} on ({error.msg})"
    return WrongOption(f"--trace {path}, line {number}: {reason}")
