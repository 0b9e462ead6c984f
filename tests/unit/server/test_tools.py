"""Tools and reasoning through the HTTP API, with a generator that says what a model would say."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai import OpenAI

from server.app import create_app
from server.settings import GatewaySettings
from server.structured.compiler import GrammarCompiler
from server.text.chat_template import ChatTemplate
from server.text.families.reasoning import ReasoningMarks
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
THINKING = replace(TEXT, reasoning=ReasoningMarks("<think>", "</think>"))
USER: Any = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
CALLS = (
    'Sure. <tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    with GrammarCompiler(TEXT.tokenizer.vocabulary()) as made:
        yield made


@contextmanager
def saying(
    reply: str, grammars: GrammarCompiler, *, text: Any = TEXT, tokens_per_chunk: int = 1
) -> Generator[tuple[OpenAI, ScriptedGenerator]]:
    generator = ScriptedGenerator(
        text=text, reply=reply, tokens_per_chunk=tokens_per_chunk, max_model_len=4096
    )
    app = create_app(generator, text, GatewaySettings(), grammars=grammars)
    with (
        serve(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client, generator


def calls_of(message: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []]


@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 500])
def test_calls_are_the_same_whole_and_streamed(
    tokens_per_chunk: int, grammars: GrammarCompiler
) -> None:
    with saying(CALLS, grammars, tokens_per_chunk=tokens_per_chunk) as (client, _):
        asked: Any = {"model": "tiny", "messages": USER, "tools": [WEATHER, TIME]}
        whole = client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Sure. "
        assert calls_of(choice.message) == [("weather", {"city": "Zürich"}), ("time", {})]
        ids = [call.id for call in choice.message.tool_calls or []]
        assert len(set(ids)) == 2


def test_the_first_delta_of_a_call_alone_has_its_id_and_name(grammars: GrammarCompiler) -> None:
    with saying(CALLS, grammars) as (client, _):
        asked: Any = {"model": "tiny", "messages": USER, "tools": [WEATHER, TIME], "stream": True}
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked)]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    begun = [call for call in calls if call.id is not None]
    assert [(call.index, call.function.name, call.type) for call in begun] == [
        (0, "weather", "function"),
        (1, "time", "function"),
    ]
    assert all(call.function.name is None for call in calls if call.id is None)
    assert {call.index for call in calls} == {0, 1}
    assert not any(delta.content and delta.tool_calls for delta in deltas)


def test_one_call_is_enough_where_parallel_calls_are_off(grammars: GrammarCompiler) -> None:
    with saying(CALLS, grammars) as (client, _):
        answer = client.chat.completions.create(
            model="tiny", messages=USER, tools=[WEATHER, TIME], parallel_tool_calls=False
        )
    assert len(answer.choices[0].message.tool_calls or []) == 1


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ("auto", False),
        ("none", False),
        ("required", True),
        ({"type": "function", "function": {"name": "time"}}, True),
    ],
)
def test_forced_calls_are_constrained(choice: Any, forced: bool, grammars: GrammarCompiler) -> None:
    with saying(CALLS, grammars) as (client, generator):
        answer = client.chat.completions.create(
            model="tiny", messages=USER, tools=[WEATHER, TIME], tool_choice=choice
        )
    grammar = generator.requests[0].sampling.grammar
    assert (grammar is not None) == forced
    assert (answer.choices[0].message.tool_calls is None) == (choice == "none")
    if isinstance(choice, dict):
        assert len(answer.choices[0].message.tool_calls or []) == 1
        assert "weather" not in (grammar or "")


def test_calls_and_their_results_go_back_to_the_model(grammars: GrammarCompiler) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "time", "arguments": '{"zone": "CET"}'},
    }
    messages: Any = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    with saying("It is noon.", grammars) as (client, generator):
        answer = client.chat.completions.create(model="tiny", messages=messages, tools=[TIME])
    assert answer.choices[0].message.content == "It is noon."
    ids = generator.requests[0].prompt_token_ids
    prompt = b"".join(map(TEXT.tokenizer.piece, ids)).decode()
    assert '"name": "time"' in prompt  # the template knows no tools: a system message presents them
    assert "12:00" in prompt


@pytest.mark.parametrize("arguments", ['{"zone": "CE', "[]", "noon", "[" * 2000])
def test_a_call_that_was_cut_off_goes_back_to_the_model_as_it_was(
    arguments: str, grammars: GrammarCompiler
) -> None:
    calls = "{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"
    text = replace(TEXT, template=ChatTemplate(calls, special_tokens={}))
    with saying("Sorry.", grammars, text=text) as (client, generator):
        messages: Any = [calling("assistant", arguments)]
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
    ids = generator.requests[0].prompt_token_ids
    prompt = b"".join(map(TEXT.tokenizer.piece, ids)).decode()
    assert json.loads(prompt) == arguments


def calling(role: str, arguments: str) -> dict[str, Any]:
    call = {"function": {"name": "a", "arguments": arguments}}
    return {"role": role, "content": "x", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "code"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TIME, TIME]}, "tools"),
        ({"tools": [TIME] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"messages": [calling("user", "{}")]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"functions": []}, "functions"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:60],
)
def test_what_is_wrong_with_tools_is_named(
    fields: Any, param: str, grammars: GrammarCompiler
) -> None:
    with saying("x", grammars) as (client, generator):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="tiny", messages=fields.pop("messages", USER), extra_body=fields
            )
        assert refused.value.param == param
        assert generator.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_has_both_names_and_is_never_content(
    stream: bool, grammars: GrammarCompiler
) -> None:
    with saying("<think>\nHm, ö.\n</think>\n\nYes.", grammars, text=THINKING) as (client, _):
        asked: Any = {"model": "tiny", "messages": USER, "stream": stream}
        answer: Any = client.chat.completions.create(**asked)
        if not stream:
            messages = [answer.choices[0].message]
        else:
            messages = [chunk.choices[0].delta for chunk in answer]
        hidden = client.chat.completions.create(
            model="tiny", messages=USER, extra_body={"include_reasoning": False}
        )
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(m, name, None) or "" for m in messages) == "Hm, ö.\n"
    assert "".join(m.content or "" for m in messages) == "Yes."
    if stream:
        assert not any(m.content and getattr(m, "reasoning", None) for m in messages)
    assert hidden.choices[0].message.content == "Yes."
    assert not hasattr(hidden.choices[0].message, "reasoning")


def test_a_forced_call_may_follow_reasoning_that_the_prompt_has_begun(
    grammars: GrammarCompiler,
) -> None:
    with saying(f"Hm.</think>{CALLS[6:]}", grammars, text=THINKING) as (client, generator):
        answer: Any = client.chat.completions.create(
            model="tiny",
            messages=USER,
            tools=[WEATHER, TIME],
            tool_choice="required",
            extra_body={"chat_template_kwargs": {"enable_thinking": True}},
        )
    message = answer.choices[0].message
    assert message.reasoning == "Hm."
    assert [name for name, _ in calls_of(message)] == ["weather", "time"]
    assert "</think>" in (generator.requests[0].sampling.grammar or "")


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_that_is_cut_off_before_its_name_leaves_no_markup(
    stream: bool, grammars: GrammarCompiler
) -> None:
    with saying('<tool_call>\n{"na', grammars) as (client, _):
        answer: Any = client.chat.completions.create(
            model="tiny", messages=USER, tools=[TIME], tool_choice="required", stream=stream
        )
        choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    said = [choice.delta if stream else choice.message for choice in choices]
    assert not any(message.content or message.tool_calls for message in said)


def test_logprobs_cover_every_token_of_an_answer_with_calls(grammars: GrammarCompiler) -> None:
    with saying(CALLS, grammars) as (client, _):
        stream = client.chat.completions.create(
            model="tiny", messages=USER, tools=[WEATHER, TIME], logprobs=True, stream=True
        )
        spelt = b"".join(
            bytes(entry.bytes or [])
            for chunk in stream
            if (logprobs := chunk.choices[0].logprobs) is not None
            for entry in logprobs.content or []
        )
    assert spelt.decode() == CALLS


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_the_tools_that_are_there_only_the_allowed_ones_may_be_called(
    mode: str, grammars: GrammarCompiler
) -> None:
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "time"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    with saying(CALLS, grammars) as (client, generator):
        client.chat.completions.create(
            model="tiny", messages=USER, tools=[WEATHER, TIME], tool_choice=choice
        )
    (request,) = generator.requests
    prompt = b"".join(map(TEXT.tokenizer.piece, request.prompt_token_ids))
    assert b"weather" not in prompt
    grammar = request.sampling.grammar
    assert (grammar is not None) == (mode == "required")
    assert "weather" not in (grammar or "")


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "function"}, "tool_choice.function"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "sing"}}],
                },
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            "tool_choice.allowed_tools.tools",
        ),
    ],
)
def test_a_choice_of_no_tool_is_refused_by_its_path(
    choice: Any, param: str, grammars: GrammarCompiler
) -> None:
    with saying("x", grammars) as (client, _), pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny", messages=USER, tools=[WEATHER], tool_choice=choice
        )
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("stop", "reason"), [('"city"', "stop"), ("</tool_call>", "tool_calls"), (None, "tool_calls")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_a_stop_string_cuts_off_is_not_to_be_made(
    stop: str | None, reason: str, stream: bool, grammars: GrammarCompiler
) -> None:
    with saying(CALLS, grammars) as (client, _):
        asked: Any = {"model": "tiny", "messages": USER, "tools": [WEATHER, TIME], "stop": stop}
        if stream:
            *_, last = client.chat.completions.create(**asked, stream=True)
        else:
            last = client.chat.completions.create(**asked)
    assert last.choices[0].finish_reason == reason
