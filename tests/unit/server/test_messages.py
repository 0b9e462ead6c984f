"""``/v1/messages`` with the official client."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic

from protocol.errors import NoWorkerAvailable
from server.app import create_app
from server.settings import GatewaySettings
from server.structured.compiler import GrammarCompiler
from server.text.families.reasoning import ReasoningMarks
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
THINKING = replace(TEXT, reasoning=ReasoningMarks("<think>", "</think>"))
WEATHER: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = 'Wait. <tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
USER: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    with GrammarCompiler(TEXT.tokenizer.vocabulary()) as made:
        yield made


@contextmanager
def saying(
    reply: str, grammars: GrammarCompiler, *, text: Any = TEXT, **script: Any
) -> Generator[tuple[Any, ScriptedGenerator]]:
    generator = ScriptedGenerator(text=text, reply=reply, max_model_len=4096, **script)
    app = create_app(generator, text, GatewaySettings(), grammars=grammars)
    with (
        serve(app) as url,
        Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client, generator


def test_a_message_is_the_same_whole_and_streamed(grammars: GrammarCompiler) -> None:
    with saying("<think>Hm.</think>" + CALL, grammars, text=THINKING) as (client, _):
        asked: Any = {"model": "tiny", "messages": USER, "max_tokens": 500, "tools": [WEATHER]}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        thinking, text, call = message.content
        assert (thinking.type, text.type, call.type) == ("thinking", "text", "tool_use")
        assert thinking.thinking == "Hm."
        assert text.text == "Wait. "
        assert (call.name, call.input) == ("weather", {"city": "Bonn"})
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens == whole.usage.output_tokens


def test_reasons_to_stop_have_their_own_names(grammars: GrammarCompiler) -> None:
    with saying("one two three", grammars, cached_tokens=7) as (client, _):
        ended = client.messages.create(model="tiny", messages=USER, max_tokens=50)
        cut = client.messages.create(model="tiny", messages=USER, max_tokens=3)
        stopped = client.messages.create(
            model="tiny", messages=USER, max_tokens=50, stop_sequences=["two"]
        )
    assert ended.stop_reason == "end_turn"
    assert ended.usage.cache_read_input_tokens == 7
    assert (cut.stop_reason, cut.content[0].text) == ("max_tokens", "one")
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")


def test_a_conversation_with_results_reaches_the_model(grammars: GrammarCompiler) -> None:
    messages: Any = [
        *USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "old thought", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "X"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    with saying("It rains.", grammars) as (client, generator):
        client.messages.create(model="tiny", messages=messages, max_tokens=50, system="Be kind.")
        counted = client.messages.count_tokens(model="tiny", messages=messages, system="Be kind.")
    ids = generator.requests[0].prompt_token_ids
    prompt = b"".join(map(TEXT.tokenizer.piece, ids)).decode()
    assert counted.input_tokens == len(ids)
    assert "old thought" not in prompt
    order = [prompt.index(text) for text in ("Be kind.", "hi", "I look.", "rain", "So?")]
    assert order == sorted(order)


def test_a_tool_can_be_forced(grammars: GrammarCompiler) -> None:
    with saying(CALL[6:], grammars) as (client, generator):
        client.messages.create(
            model="tiny",
            messages=USER,
            max_tokens=500,
            tools=[WEATHER],
            tool_choice={"type": "tool", "name": "weather"},
        )
    assert "weather" in (generator.requests[0].sampling.grammar or "")


def test_an_answer_that_the_caller_has_begun_goes_on(grammars: GrammarCompiler) -> None:
    begun: Any = [*USER, {"role": "assistant", "content": "I am "}]
    with saying("fine.", grammars) as (client, generator):
        client.messages.create(model="tiny", messages=begun, max_tokens=5)
    prompt = b"".join(map(TEXT.tokenizer.piece, generator.requests[0].prompt_token_ids))
    assert prompt.endswith(b"I am")


@pytest.mark.parametrize("where", ["output_config", "output_format"])
def test_a_format_constrains_the_output(grammars: GrammarCompiler, where: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {}}}}
    body = {where: {"format": form} if where == "output_config" else form}
    with saying("{}", grammars) as (client, generator):
        client.messages.create(model="tiny", messages=USER, max_tokens=5, extra_body=body)
        assert generator.requests[0].sampling.grammar
        form["schema"] = {"type": "nothing"}
        with pytest.raises(anthropic.BadRequestError, match=r"output_config.format.schema: "):
            client.messages.create(model="tiny", messages=USER, max_tokens=5, extra_body=body)


def test_thinking_can_be_left_out_of_the_answer(grammars: GrammarCompiler) -> None:
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    with saying("<think>Hm.</think>Yes.", grammars, text=THINKING) as (client, _):
        message = client.messages.create(
            model="tiny", messages=USER, max_tokens=50, thinking=thinking
        )
    assert [block.type for block in message.content] == ["text"]


def test_a_failure_after_the_first_token_is_an_error_of_the_client(
    grammars: GrammarCompiler,
) -> None:
    lost = NoWorkerAvailable("none")
    with (
        saying("one two three", grammars, fail_at=3, error=lost) as (client, _),
        pytest.raises(anthropic.APIStatusError, match="overloaded_error"),
        client.messages.stream(model="tiny", messages=USER, max_tokens=50) as stream,
    ):
        stream.until_done()


def test_effort_without_effect_is_named(grammars: GrammarCompiler) -> None:
    with saying("x", grammars) as (client, _):
        answer = client.messages.with_raw_response.create(
            model="tiny", messages=USER, max_tokens=5, output_config={"effort": "low"}
        )
    assert answer.headers["x-ignored-params"] == "output_config.effort"
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_errors_have_the_shape_that_the_client_knows(grammars: GrammarCompiler) -> None:
    with saying("x", grammars) as (client, _):
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            client.messages.create(model="tiny", messages=USER, max_tokens=0)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="other", messages=USER, max_tokens=1)
        answer = httpx.post(f"{client.base_url}/v1/messages", content=b"[]")
        assert answer.status_code == 415
        assert answer.json()["type"] == "error"
    with saying("x", grammars, fail_at=0, error=NoWorkerAvailable("none")) as (client, _):
        answer = httpx.post(
            f"{client.base_url}/v1/messages",
            json={"model": "tiny", "messages": USER, "max_tokens": 5},
        )
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")
