"""Libraries that applications put between themselves and a server: LangChain and LiteLLM."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # those of the libraries are not ours to mend
]
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
QUESTION = "What is the weather like in Paris?"


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """The libraries leave connections open; found later, they would fail another test."""
    yield
    gc.collect()


@pytest.fixture
def langchain(system: LocalSystem) -> Any:
    module = pytest.importorskip("langchain_openai")
    return module.ChatOpenAI(
        model="smollm2", base_url=f"{system.url}/v1", api_key="none", max_retries=0, **ASKED
    )


def test_langchain_streams_what_it_answers_whole(langchain: Any) -> None:
    whole = langchain.invoke(QUESTION)
    chunks = list(langchain.stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == whole.content != ""
    assert whole.usage_metadata["output_tokens"] > 0
    assert whole.response_metadata["finish_reason"] in ("stop", "length")


def test_langchain_calls_tools_and_reads_structured_output(langchain: Any) -> None:
    forced = langchain.bind_tools([WEATHER], tool_choice="weather")
    (call,) = forced.invoke(QUESTION, max_tokens=60).tool_calls
    assert call["name"] == "weather"
    assert set(call["args"]) == {"city"}
    streamed = None
    for chunk in forced.stream(QUESTION, max_tokens=60):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]
    schema = {"title": "Place", "description": "a place", **CITY}
    reader = langchain.with_structured_output(schema, method="json_schema")
    assert set(reader.invoke(QUESTION)) == {"city"}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_streams_and_calls_tools(system: LocalSystem, provider: str) -> None:
    litellm = pytest.importorskip("litellm")
    asked: dict[str, Any] = {
        "model": f"{provider}/smollm2",
        "api_base": f"{system.url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": QUESTION}],
        "num_retries": 0,
        **ASKED,
    }
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    forced = {"type": "function", "function": {"name": "weather"}}
    called = litellm.completion(**{**asked, "max_tokens": 60}, tools=[WEATHER], tool_choice=forced)
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "weather"
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(**{**asked, "temperature": 3})
