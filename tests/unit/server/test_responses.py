"""``/v1/responses`` with the official client, whose event classes check every field."""

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import anyio
import anyio.from_thread
import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from server.app import create_app
from server.settings import GatewaySettings
from server.structured.compiler import GrammarCompiler
from server.text.families.reasoning import ReasoningMarks
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import eventually, serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
THINKING = replace(TEXT, reasoning=ReasoningMarks("<think>", "</think>"))
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CALL = 'Wait. <tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    with GrammarCompiler(TEXT.tokenizer.vocabulary()) as made:
        yield made


@contextmanager
def saying(
    reply: str,
    grammars: GrammarCompiler,
    settings: GatewaySettings | None = None,
    *,
    text: Any = TEXT,
    **script: Any,
) -> Generator[tuple[Any, ScriptedGenerator]]:
    generator = ScriptedGenerator(text=text, reply=reply, max_model_len=4096, **script)
    app = create_app(generator, text, settings or GatewaySettings(), grammars=grammars)
    with (
        serve(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client, generator


def prompt_of(generator: ScriptedGenerator) -> str:
    ids = generator.requests[-1].prompt_token_ids
    return b"".join(map(TEXT.tokenizer.piece, ids)).decode()


def test_a_response_is_one_message(grammars: GrammarCompiler) -> None:
    with saying("Hello, wörld", grammars) as (client, generator):
        response = client.responses.create(
            model="tiny", input="hi", instructions="Be kind.", metadata={"a": "b"}
        )
    assert response.output_text == "Hello, wörld"
    assert response.status == "completed"
    assert response.metadata == {"a": "b"}
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + 14
    assert "Be kind." in prompt_of(generator)


def test_the_events_of_a_stream_build_the_response(grammars: GrammarCompiler) -> None:
    with saying("<think>Hm.</think>" + CALL, grammars, text=THINKING) as (client, _):
        with client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
            events = list(stream)
            final = stream.get_final_response()
        raw: Any = client.responses.create(model="tiny", input="hi", tools=[WEATHER], stream=True)
        numbers = [event.sequence_number for event in raw]
        again = client.responses.retrieve(final.id)
    assert numbers == list(range(len(numbers)))
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    reasoning, message, call = final.output
    assert (reasoning.type, message.type, call.type) == ("reasoning", "message", "function_call")
    assert reasoning.content[0].text == "Hm."
    assert message.content[0].text == "Wait. "
    assert json.loads(call.arguments) == {"city": "Bonn"}
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == {"city": "Bonn"}
    assert again.model_dump()["output"] == final.model_dump(exclude={"parsed"})["output"] or (
        again.output_text == final.output_text
    )


def test_the_parse_helper_gets_its_schema(grammars: GrammarCompiler) -> None:
    class Person(BaseModel):
        name: str
        age: int

    with saying('{"name": "Bo", "age": 7}', grammars) as (client, generator):
        response = client.responses.parse(model="tiny", input="hi", text_format=Person)
        chat = client.chat.completions.parse(
            model="tiny", messages=[{"role": "user", "content": "hi"}], response_format=Person
        )
    assert response.output_parsed == Person(name="Bo", age=7)
    assert chat.choices[0].message.parsed == Person(name="Bo", age=7)
    assert all("age" in (r.sampling.grammar or "") for r in generator.requests)


def test_a_response_goes_on_from_an_earlier_one(grammars: GrammarCompiler) -> None:
    with saying(CALL, grammars) as (client, generator):
        first = client.responses.create(model="tiny", input="weather?", tools=[WEATHER])
        (call,) = (item for item in first.output if item.type == "function_call")
        client.responses.create(
            model="tiny",
            previous_response_id=first.id,
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        )
        prompt = prompt_of(generator)
        for gone in ("resp_nothing", first.id):
            if gone == first.id:
                client.responses.delete(first.id)
            with pytest.raises(openai.BadRequestError) as refused:
                client.responses.create(model="tiny", input="x", previous_response_id=gone)
            assert refused.value.param == "previous_response_id"
    assert prompt.index("weather?") < prompt.index("Wait. ") < prompt.index("rain")


def test_what_is_not_stored_cannot_be_asked_for_again(grammars: GrammarCompiler) -> None:
    with saying("x", grammars) as (client, _):
        response = client.responses.create(model="tiny", input="hi", store=False)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        kept = client.responses.create(model="tiny", input="hi")
        with pytest.raises(openai.BadRequestError, match="background"):
            client.responses.cancel(kept.id)


def test_one_of_several_gateways_stores_nothing_and_says_so(grammars: GrammarCompiler) -> None:
    settings = GatewaySettings(processes=2)
    with saying("x", grammars, settings) as (client, _):
        response = client.responses.create(model="tiny", input="hi")
        assert response.output_text == "x"
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        wanted: list[dict[str, Any]] = [
            {"store": True},
            {"background": True},
            {"previous_response_id": response.id},
        ]
        for fields in wanted:
            with pytest.raises(openai.BadRequestError, match="several processes") as refused:
                client.responses.create(model="tiny", input="hi", **fields)
            assert refused.value.param in fields


def test_an_answer_that_is_cut_is_incomplete(grammars: GrammarCompiler) -> None:
    with saying("Hello", grammars) as (client, _):
        for stream in (False, True):
            made: Any = client.responses.create(
                model="tiny", input="hi", max_output_tokens=2, stream=stream
            )
            response = list(made)[-1].response if stream else made
            assert response.status == "incomplete"
            assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 1}, "input"),
        ({"input": [{"type": "image"}]}, "input[0].type"),
        ({"input": [{"content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"background": True, "stream": True}, "stream"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_named(fields: Any, param: str, grammars: GrammarCompiler) -> None:
    with saying("x", grammars) as (client, generator):
        body = {"model": "tiny", "input": "hi", **fields}
        answer = httpx.post(f"{client.base_url}responses", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert generator.requests == []


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_background_response_finishes_or_is_cancelled(
    cancelled: bool, grammars: GrammarCompiler
) -> None:
    generator = ScriptedGenerator(text=TEXT, reply="Hello", block_at=3)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            app = create_app(generator, TEXT, GatewaySettings(), grammars=grammars, tasks=tasks)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x/v1") as client:
                body = {"model": "tiny", "input": "hi", "background": True}
                begun = (await client.post("/responses", json=body)).json()
                assert begun["status"] == "in_progress"
                if cancelled:
                    url = f"/responses/{begun['id']}/cancel"
                    assert (await client.post(url)).json()["status"] == "cancelled"
                else:
                    generator.resume.set()
                with anyio.fail_after(10):
                    while True:
                        shown = (await client.get(f"/responses/{begun['id']}")).json()
                        if shown["status"] != "in_progress" and generator.closed:
                            break
                        await anyio.lowlevel.checkpoint()
                assert shown["status"] == ("cancelled" if cancelled else "completed")

    anyio.run(run)
    assert eventually(lambda: generator.opened == generator.closed == 1)
