"""Anthropic's own client against a running system with real weights."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS

pytestmark = pytest.mark.timeout(300)
QUESTION = "What is the weather like in Paris?"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"name": "weather", "description": "the weather of a city", "input_schema": CITY},
    {"name": "time", "input_schema": {"type": "object", "properties": {}}},
]
ASKED: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": QUESTION}],
    "max_tokens": 60,
    "extra_body": {"temperature": 0},
}


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS)


@pytest.fixture
def client(system: LocalSystem) -> Iterator[Any]:
    with anthropic.Anthropic(
        base_url=system.url, api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def test_a_message_streams_the_text_that_it_also_answers_whole(client: Any) -> None:
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert text == whole.content[0].text == streamed.content[0].text != ""
    assert (streamed.stop_reason, streamed.role) == (whole.stop_reason, "assistant")
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0
    assert whole._request_id
    assert stream.request_id


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "tool", "name": "weather"},
        {"type": "any", "disable_parallel_tool_use": True},
    ],
)
def test_a_forced_tool_is_called_and_its_input_comes_in_pieces(client: Any, choice: Any) -> None:
    forced: Any = {**ASKED, "tools": TOOLS, "tool_choice": choice}
    (call,) = client.messages.create(**forced).content
    kinds: list[tuple[str, int | None]] = []
    pieces: list[str] = []
    with client.messages.stream(**forced) as stream:
        for event in stream:
            kinds.append((event.type, getattr(event, "index", None)))
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                pieces.append(event.delta.partial_json)
        streamed = stream.get_final_message()
    (again,) = streamed.content
    assert call.type == again.type == "tool_use"
    assert (call.name, call.input) == (again.name, again.input)
    assert set(call.input) == {"city"}
    assert streamed.stop_reason == "tool_use"
    assert len(pieces) > 1
    assert kinds[:2] == [("message_start", None), ("content_block_start", 0)]
    assert kinds[-3:] == [
        ("content_block_stop", 0),
        ("message_delta", None),
        ("message_stop", None),
    ]


def test_a_conversation_with_a_tools_result_goes_on(client: Any) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "rain, 11 degrees"}],
    }
    messages: Any = [
        *ASKED["messages"],
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    system: Any = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]
    asked: Any = {**ASKED, "messages": messages, "tools": TOOLS, "system": system}
    message = client.messages.create(**asked, tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]
    message = client.messages.create(**asked)
    usage = message.usage
    counted = client.messages.count_tokens(
        model="smollm2", messages=messages, tools=TOOLS, system=system
    )
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert (
        counted.input_tokens
        > client.messages.count_tokens(model="smollm2", messages=ASKED["messages"]).input_tokens
    )


def test_an_answer_goes_on_where_the_caller_has_begun_it(client: Any) -> None:
    whole = client.messages.create(**ASKED).content[0].text
    said = whole[: whole.index(" ", 20)]
    begun: Any = {"role": "assistant", "content": said}
    message = client.messages.create(**{**ASKED, "messages": [*ASKED["messages"], begun]})
    assert message.content[0].text[:12] == whole[len(said) :][:12]


def test_a_stop_sequence_ends_the_text_and_is_named(client: Any) -> None:
    text = client.messages.create(**ASKED).content[0].text
    middle = text[len(text) // 2 :][:4]
    message = client.messages.create(**ASKED, stop_sequences=[middle, "nobody says this"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", middle)
    assert message.content[0].text == text[: text.index(middle)]


def test_output_is_parsed_into_the_type_that_was_asked_for(client: Any) -> None:
    class Place(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=8)

    warm = {"temperature": 1}
    message = client.messages.parse(**{**ASKED, "extra_body": warm}, output_format=Place)
    assert isinstance(message.parsed_output, Place)


def test_errors_are_the_exceptions_that_the_client_names(client: Any) -> None:
    def error_of(**changed: Any) -> anthropic.APIStatusError:
        with pytest.raises(anthropic.APIStatusError) as raised:
            client.messages.create(**{**ASKED, **changed})
        assert raised.value.request_id
        return raised.value

    assert isinstance(error_of(model="nothing"), anthropic.NotFoundError)
    wrong = error_of(extra_body={"temperature": 1.5})
    assert isinstance(wrong, anthropic.BadRequestError)
    assert "temperature" in str(wrong)
    assert "max_tokens" in str(error_of(max_tokens=100_000))
    assert "tools[0].name" in str(error_of(tools=[{"name": "a b", "input_schema": CITY}]))
    form = {"type": "json_schema", "schema": {"type": "nothing"}}
    assert "output_config.format.schema" in str(error_of(output_config={"format": form}))
    large = error_of(messages=[{"role": "user", "content": "x" * 9_000_000}])
    assert large.status_code == 413
    late = error_of(extra_headers={"x-request-timeout": "0.05"}, max_tokens=2000)
    assert late.status_code == 504


def test_the_models_are_listed_as_the_client_reads_them(client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("smollm2", "model", "smollm2")
    assert client.models.retrieve("smollm2") == model
