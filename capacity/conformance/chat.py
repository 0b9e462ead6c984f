"""What clients need of a whole chat answer."""

import json
import math
from typing import Any

from capacity.conformance.case import Case, NotOffered, expect
from capacity.conformance.server import Server, a_chat

FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter")


def _shape(server: Server) -> None:
    answer = server.chat()
    missing = {"id", "object", "created", "model", "choices", "usage"} - answer.keys()
    expect(not missing, f"the answer lacks {', '.join(sorted(missing))}")
    expect(answer["object"] == "chat.completion", f"object is {answer['object']}")
    expect(isinstance(answer["created"], int), "created is no integer")
    message = answer["choices"][0]["message"]
    expect(message.get("role") == "assistant", f"role is {message.get('role')}")
    expect(isinstance(message.get("content"), str), "content is no text")


def _usage(server: Server) -> None:
    usage = server.chat()["usage"]
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    expect(usage["total_tokens"] == total, "total_tokens is not the sum")


def _finish_reason(server: Server) -> None:
    reason = server.chat()["choices"][0].get("finish_reason")
    expect(reason in FINISH_REASONS, f"finish_reason is {reason}")


def _logprobs_null(server: Server) -> None:
    choice = server.chat()["choices"][0]
    expect(
        "logprobs" in choice and choice["logprobs"] is None, "logprobs is not there, or not null"
    )


def _limits(server: Server) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = a_chat()
        del body["max_tokens"]
        body[field] = 2
        answer = server.post("chat/completions", body).json()
        used = answer["usage"]["completion_tokens"]
        expect(used <= 2, f"{field} 2 gave {used} tokens")  # noqa: PLR2004


def _stop(server: Server) -> None:
    whole = server.chat(max_tokens=16)["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 :][:3]
    if not middle.strip():
        raise NotOffered("the model says too little to stop it")
    choice = server.chat(max_tokens=16, stop=[middle])["choices"][0]
    cut = whole[: whole.index(middle)]
    expect(choice["message"]["content"] == cut, "the text does not end before the stop string")
    expect(choice["finish_reason"] == "stop", f"finish_reason is {choice['finish_reason']}")


def _choices(server: Server) -> None:
    choices = server.chat(n=2)["choices"]
    expect([c["index"] for c in choices] == [0, 1], "n 2 does not give choices 0 and 1")


def _seed(server: Server) -> None:
    texts = {
        server.chat(seed=7, temperature=1, max_tokens=16)["choices"][0]["message"]["content"]
        for _ in range(2)
    }
    expect(len(texts) == 1, "the same seed gives different texts")


def _logprobs(server: Server) -> None:
    choice = server.chat(logprobs=True, top_logprobs=2)["choices"][0]
    entries: list[dict[str, Any]] = choice["logprobs"]["content"]
    expect(entries, "there are no entries")
    for entry in entries:
        missing = {"token", "logprob", "bytes", "top_logprobs"} - entry.keys()
        expect(not missing, f"an entry lacks {', '.join(sorted(missing))}")
        expect(math.isfinite(entry["logprob"]), "a logprob is not finite")
        expect(len(entry["top_logprobs"]) == 2, "not two alternatives a token")  # noqa: PLR2004


def _parts(server: Server) -> None:
    parts = [{"type": "text", "text": "Name one "}, {"type": "text", "text": "colour."}]
    server.chat(messages=[{"role": "user", "content": parts}])


def _nulls(server: Server) -> None:
    names = ("stop", "tools", "tool_choice", "response_format", "seed", "logit_bias", "user")
    nulls = dict.fromkeys((*names, "n", "top_p", "stream", "stream_options"))
    answer = server.post("chat/completions", a_chat(**nulls))
    expect(answer.status_code == 200, f"HTTP {answer.status_code}")  # noqa: PLR2004


def _developer(server: Server) -> None:
    server.chat(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )


def _json_object(server: Server) -> None:
    choice = server.chat(response_format={"type": "json_object"}, max_tokens=200)["choices"][0]
    if choice["finish_reason"] == "stop":
        found = json.loads(choice["message"]["content"])
        expect(isinstance(found, dict), "the text is no JSON object")


def _json_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"enum": [1, 2, 3]}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    for seed in range(3):
        answer = server.chat(response_format=form, temperature=1.5, seed=seed, max_tokens=100)
        text = answer["choices"][0]["message"]["content"]
        found = json.loads(text)
        expect(found.keys() == {"colour", "count"}, f"not the schema's: {text[:100]}")
        expect(found["colour"] in ("red", "green") and found["count"] in (1, 2, 3), text[:100])


def _reasoning(server: Server) -> None:
    message = server.chat(max_tokens=64)["choices"][0]["message"]
    names = [name for name in ("reasoning", "reasoning_content") if message.get(name)]
    if not names:
        raise NotOffered("the model does not reason")
    expect(len(names) == 2, f"only {names[0]} is there")  # noqa: PLR2004


def _request_id(server: Server) -> None:
    answer = server.post("chat/completions", a_chat())
    expect(answer.headers.get("x-request-id"), "there is no x-request-id header")


CASES = (
    Case(
        name="chat.shape",
        reason="typed clients decode every required field",
        breaks="openai-go, openai-java, async-openai",
        check=_shape,
    ),
    Case(
        name="chat.usage",
        reason="callers are billed and budgeted by it",
        breaks="LangChain, LiteLLM cost tracking",
        check=_usage,
    ),
    Case(
        name="chat.finish-reason",
        reason="null at the end reads as an answer that is still running",
        breaks="LangChain, Vercel AI SDK",
        check=_finish_reason,
    ),
    Case(
        name="chat.logprobs-null",
        reason="the field is required, and null when it was not asked for",
        breaks="openai-python in strict mode, generated clients",
        check=_logprobs_null,
    ),
    Case(
        name="chat.limits",
        reason="newer clients send max_completion_tokens only, older ones max_tokens only",
        breaks="openai-python helpers, LangChain",
        check=_limits,
    ),
    Case(
        name="chat.stop",
        reason="a stop string may span tokens, and must not be in the text",
        breaks="agents that parse by stop strings (ReAct)",
        check=_stop,
    ),
    Case(
        name="chat.n",
        reason="several choices are told apart by index",
        breaks="self-consistency samplers, DSPy",
        check=_choices,
    ),
    Case(
        name="chat.seed",
        reason="evaluation repeats requests and expects the same answers",
        breaks="promptfoo, inspect",
        check=_seed,
    ),
    Case(
        name="chat.logprobs",
        reason="all four fields are required and must be finite numbers: JSON has no infinity",
        breaks="every JSON parser (infinity), openai clients (bytes)",
        check=_logprobs,
    ),
    Case(
        name="chat.content-parts",
        reason="many clients always send a list of parts",
        breaks="LangChain, Vercel AI SDK, LibreChat",
        check=_parts,
    ),
    Case(
        name="chat.null-fields",
        reason="a field that is null is one that the caller leaves out",
        breaks="typed clients, which write what has no value as null",
        check=_nulls,
    ),
    Case(
        name="chat.developer-role",
        reason="newer clients write developer where older ones wrote system",
        breaks="OpenAI Agents SDK",
        check=_developer,
    ),
    Case(
        name="chat.json-object",
        reason="callers parse the text without looking",
        breaks="instructor, LangChain JSON mode",
        check=_json_object,
    ),
    Case(
        name="chat.json-schema",
        reason="callers parse the text into types without looking, at any temperature",
        breaks="openai-python parse(), instructor, Pydantic AI",
        check=_json_schema,
    ),
    Case(
        name="chat.reasoning-names",
        reason="clients know reasoning by either name, and few by both",
        breaks="LiteLLM, Vercel AI SDK, Strands",
        check=_reasoning,
    ),
    Case(
        name="chat.request-id",
        reason="support starts with the id that the client shows",
        breaks="openai-python (_request_id)",
        check=_request_id,
    ),
)
