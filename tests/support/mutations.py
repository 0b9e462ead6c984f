"""Requests that are valid, and mutations of them: types, sizes, unicode, nesting, bytes."""

import json
import random
from collections.abc import Callable
from typing import Any

import httpx

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
VALID: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "7"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "auto",
            "max_tokens": 5,
            "temperature": 0.5,
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["x", "yz"],
            "logit_bias": {"5": 1.5},
            "n": 2,
            "seed": 3,
            "stream_options": {"include_usage": True},
            "stream": True,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 5,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}},
            },
            "cache_salt": "mine",
        },
    ),
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 5,
            "structured_outputs": {
                "structural_tag": {
                    "format": {
                        "type": "triggered_tags",
                        "triggers": ["<f"],
                        "tags": [
                            {
                                "begin": "<f>",
                                "content": {"type": "json_schema", "json_schema": {"const": 1}},
                                "end": "</f>",
                            }
                        ],
                    }
                }
            },
            "logprobs": True,
            "logprob_token_ids": [5, 9],
            "thinking_token_budget": -1,
        },
    ),
    (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": ["a", "b"],
            "max_tokens": 4,
            "echo": True,
            "logprobs": 1,
            "stop_token_ids": [5],
            "min_tokens": 1,
            "structured_outputs": None,
        },
    ),
    (
        "/v1/responses",
        {
            "model": "tiny",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "7"},
            ],
            "instructions": "Be brief.",
            "tools": [{"type": "function", **FUNCTION}],
            "max_output_tokens": 5,
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
        },
    ),
    (
        "/v1/messages",
        {
            "model": "tiny",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c", "content": "7"}],
                },
            ],
            "max_tokens": 5,
            "system": "Be brief.",
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "stop_sequences": ["x"],
        },
    ),
    (
        "/v1/messages/count_tokens",
        {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
    ),
    ("/tokenize", {"model": "tiny", "prompt": "hi"}),
    ("/detokenize", {"model": "tiny", "tokens": [5, 6, 7]}),
]
ODD: list[Callable[[random.Random], Any]] = [
    lambda _: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, -1, 1, 2**31, -(2**63), 2**64, 10**30]),
    lambda r: r.choice([0.0, -0.0, 1e308, -1e-308, 2.5]),
    lambda r: r.choice(["", "x", "\0", "é🙂", "\u202e", "<|im_end|>", "a" * 5000, "3", "{}"]),
    lambda r: r.choice([[], [[]], [None], [1, "a"], ["x"] * 300]),
    lambda r: r.choice([{}, {"a": {}}, {"type": "function"}, {"": None}]),
    lambda r: _nested(r.randint(2, 80)),
]


def _nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside ``value``."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def mutated(body: dict[str, Any], chance: random.Random) -> bytes:
    changed = json.loads(json.dumps(body))
    for _ in range(chance.randint(1, 3)):
        container, key = chance.choice(places(changed))
        how = chance.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[chance.choice(["x", "é", "n", "stream", "stop"])] = chance.choice(ODD)(chance)
        else:
            container[key] = chance.choice(ODD)(chance)
        if not places(changed):
            break
    encoded = json.dumps(changed).encode()
    if chance.random() < 0.05:
        cut = chance.randrange(len(encoded))
        encoded = encoded[:cut] + chance.choice([b"", b"\xff", b"NaN", b"\\ud800"])
    return encoded


def check(path: str, sent: bytes, answer: httpx.Response, also: tuple[int, ...] = ()) -> None:
    """The answer is one that clients understand; ``also`` are further statuses that are right."""
    what = f"{path} {sent[:600]!r}: {answer.status_code} {answer.text[:300]}"
    assert answer.status_code in (200, 400, 404, 413, *also), what
    if answer.status_code == 200:
        return
    body = answer.json()
    assert len(answer.content) < 5000, what
    if path.startswith("/v1/messages"):
        assert body["type"] == "error", what
        assert body["error"]["message"], what
    else:
        error = body["error"]
        assert set(error) == {"message", "type", "param", "code"}, what
        assert error["message"], what
        assert error["param"] is None or isinstance(error["param"], str), what
