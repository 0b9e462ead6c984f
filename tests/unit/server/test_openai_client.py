"""The official ``openai`` client against the application on a real socket."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from openai import OpenAI

from protocol.errors import InvalidRequest, NoWorkerAvailable, ServingError, WorkerLost
from server.app import create_app
from server.settings import GatewaySettings
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import eventually, serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
REPLY = "Hello, wörld 🙂!"
REPLY_TOKENS = len(REPLY.encode()) + 1  # and the end token
USER: Any = [{"role": "user", "content": "hi"}]


@contextmanager
def client_of(generator: ScriptedGenerator) -> Generator[OpenAI]:
    app = create_app(generator, TEXT, GatewaySettings())
    with (
        serve(app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client
    assert generator.opened == generator.closed


@pytest.fixture(scope="module")
def client() -> Generator[OpenAI]:
    with client_of(ScriptedGenerator(text=TEXT, cached_tokens=16)) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", REPLY)
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id == f"chatcmpl-{answer._request_id}"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == REPLY_TOKENS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + REPLY_TOKENS
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_chat_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=USER, stream=True)
    chunks = list(stream)
    assert {(c.id, c.created, c.model) for c in chunks} == {
        (chunks[0].id, chunks[0].created, "tiny")
    }
    assert all(len(c.choices) == 1 for c in chunks)
    first, *between, last = (c.choices[0] for c in chunks)
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert "".join(c.delta.content or "" for c in between) == REPLY
    assert all("\N{REPLACEMENT CHARACTER}" not in (c.delta.content or "") for c in between)
    assert [c.finish_reason for c in (first, *between)] == [None] * (1 + len(between))
    assert (last.finish_reason, last.delta.content) == ("stop", None)


def test_usage_is_streamed_only_when_asked_for(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == REPLY_TOKENS


def test_usage_can_be_streamed_with_every_chunk(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, REPLY_TOKENS)


def test_the_stream_helper_assembles_the_same_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=USER) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == REPLY


def test_choices_are_streamed_side_by_side(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=USER, stream=True, n=3)
    texts = ["", "", ""]
    finished: list[int] = []
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert texts == [REPLY] * 3
    assert sorted(finished) == [0, 1, 2]


def test_several_choices_count_their_prompt_once(client: OpenAI) -> None:
    one = client.chat.completions.create(model="tiny", messages=USER)
    three = client.chat.completions.create(model="tiny", messages=USER, n=3)
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * REPLY_TOKENS


def test_stop_strings_end_the_answer_before_them(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER, stop=["rld", "zzz"])
    assert answer.choices[0].message.content == "Hello, wö"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Hello, wörld".encode())


def test_stop_strings_end_a_stream_too(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stop="rld", stream=True,
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "Hello, wörld"


def test_a_truncated_answer_ends_by_length(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER, max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "Hell"


def test_chat_logprobs_cover_the_visible_tokens(client: OpenAI) -> None:
    arguments: Any = {"model": "tiny", "messages": USER, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**arguments)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(b for entry in logprobs.content for b in entry.bytes or []) == REPLY.encode()
    assert logprobs.content[0].token == "H"
    assert logprobs.content[0].logprob == -0.5
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -9999.0]
    streamed = [
        entry
        for chunk in client.chat.completions.create(**arguments, stream=True)
        if (shown := chunk.choices[0].logprobs) is not None
        for entry in shown.content or []
    ]
    assert streamed == logprobs.content


def test_completions_take_every_kind_of_prompt(client: OpenAI) -> None:
    ids = TEXT.tokenizer.encode("hi", add_special_tokens=False)
    for prompt, count in (("hi", 1), (["hi", "ho"], 2), (ids, 1), ([ids, ids], 2)):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=50)
        assert [choice.text for choice in answer.choices] == [REPLY] * count
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 2 * count


def test_completions_generate_sixteen_tokens_by_default(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hi")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_completions_number_choices_prompt_by_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], n=2, echo=True)
    assert [(c.index, c.text[0]) for c in answer.choices] == [
        (0, "a"), (1, "a"), (2, "b"), (3, "b"),
    ]  # fmt: skip


def test_completions_streamed_with_echo(client: OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt=["a: ", "b: "], echo=True, stream=True, max_tokens=50
    )
    texts = ["", ""]
    reasons: list[str] = []
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
    assert texts == ["a: " + REPLY, "b: " + REPLY]
    assert reasons == ["stop", "stop"]


def test_an_echo_alone_asks_no_worker(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hi", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hi", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_completion_logprobs_are_four_lists_of_one_length(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hi", logprobs=2, max_tokens=5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("Hello")
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"H": -0.5, "I": -9999.0}


def test_an_echo_with_logprobs_scores_the_prompt_first(client: OpenAI) -> None:
    for max_tokens, reply in ((3, "Hel"), (0, "")):
        arguments: Any = {"model": "tiny", "prompt": "hi", "max_tokens": max_tokens}
        arguments |= {"echo": True, "logprobs": 1}
        answer = client.completions.create(**arguments)
        logprobs = answer.choices[0].logprobs
        assert answer.choices[0].text == "hi" + reply
        assert logprobs is not None
        assert logprobs.tokens == list("hi" + reply)
        assert logprobs.token_logprobs == [None] + [-0.5] * (1 + len(reply))
        assert logprobs.text_offset == list(range(2 + len(reply)))
        assert logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[:2] == [None, {"i": -0.5}]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(reply)
        streamed = [
            token
            for chunk in client.completions.create(**arguments, stream=True)
            if (shown := chunk.choices[0].logprobs) is not None
            for token in shown.tokens or []
        ]
        assert streamed == logprobs.tokens


def test_prompt_logprobs_are_by_token_id(client: OpenAI) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=2, extra_body={"prompt_logprobs": 2}
    )
    first, *scored = answer.prompt_logprobs
    assert first is None
    assert len(scored) == answer.usage.prompt_tokens - 1
    assert {entry["rank"] for entry in scored[0].values()} == {1, 2}
    with pytest.raises(openai.BadRequestError, match="streamed"):
        client.completions.create(
            model="tiny", prompt="hi", stream=True, extra_body={"prompt_logprobs": 1}
        )


def test_token_ids_are_returned_on_request(client: OpenAI) -> None:
    arguments: Any = {"model": "tiny", "prompt": "hi", "extra_body": {"return_token_ids": True}}
    choice: Any = client.completions.create(**arguments).choices[0]
    expected = TEXT.tokenizer.encode(REPLY, add_special_tokens=False)[:16]
    assert choice.token_ids == expected
    assert choice.prompt_token_ids == TEXT.tokenizer.encode("hi", add_special_tokens=False)
    stream: Any = client.completions.create(**arguments, stream=True)
    streamed = [getattr(chunk.choices[0], "token_ids", []) for chunk in stream]
    assert [token for part in streamed for token in part] == expected


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "headrace"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_bad_requests_raise_the_right_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=USER, temperature=9)
    assert refused.value.param == "temperature"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as overflow:
        client.chat.completions.create(model="tiny", messages=USER, max_tokens=1000, stream=True)
    assert overflow.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=USER)


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (NoWorkerAvailable("none"), 503, True),
        (WorkerLost("gone", stage="decode"), 502, False),
        (ServingError("/secret 0x7f00"), 500, False),
        (InvalidRequest("x: no", param="x"), 400, False),
        (ZeroDivisionError("/secret 0x7f00"), 500, False),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_before_the_first_token_is_an_http_error(
    error: Exception, status: int, retry_after: bool, stream: bool
) -> None:
    generator = ScriptedGenerator(text=TEXT, fail_at=0, error=error)
    with client_of(generator) as client, pytest.raises(openai.APIStatusError) as failed:
        client.chat.completions.create(model="tiny", messages=USER, stream=stream)
    assert failed.value.status_code == status
    assert failed.value.request_id
    assert "secret" not in failed.value.message
    assert ("retry-after" in failed.value.response.headers) == retry_after


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("error", [WorkerLost("/secret"), KeyError("/secret")], ids=["loss", "bug"])
def test_a_failure_in_mid_stream_raises_and_never_ends_cleanly(error: Exception, n: int) -> None:
    generator = ScriptedGenerator(text=TEXT, fail_at=5, error=error)
    with client_of(generator) as client:
        stream = client.chat.completions.create(model="tiny", messages=USER, stream=True, n=n)
        chunks: list[Any] = []
        with pytest.raises(openai.APIError) as failed:
            chunks += iter(stream)
    assert type(failed.value) is openai.APIError
    assert "secret" not in failed.value.message
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)


def read_all(client: OpenAI, *, stream: bool, n: int = 1) -> None:
    answer: Any = client.chat.completions.create(model="tiny", messages=USER, stream=stream, n=n)
    list(answer)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_failure_after_some_tokens_is_never_half_an_answer(stream: bool) -> None:
    generator = ScriptedGenerator(text=TEXT, fail_at=5, error=WorkerLost("gone"))
    with client_of(generator) as client, pytest.raises(openai.APIError):
        read_all(client, stream=stream)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("block_at", [0, 5], ids=["before the first token", "in mid-stream"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_hangs_up_closes_the_generators(stream: bool, block_at: int, n: int) -> None:
    generator = ScriptedGenerator(text=TEXT, block_at=block_at)
    with client_of(generator) as client:
        impatient = client.with_options(timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            read_all(impatient, stream=stream, n=n)
        assert eventually(lambda: generator.closed == n, within_s=1.0)
        assert generator.opened == n


def test_a_closed_stream_closes_the_generator() -> None:
    generator = ScriptedGenerator(text=TEXT, block_at=5)
    with client_of(generator) as client:
        stream = client.chat.completions.create(model="tiny", messages=USER, stream=True)
        next(stream)
        stream.close()
        assert eventually(lambda: generator.closed == 1, within_s=1.0)


def test_a_stop_string_closes_the_generator() -> None:
    generator = ScriptedGenerator(text=TEXT, block_at=10)
    with client_of(generator) as client:
        answer = client.chat.completions.create(model="tiny", messages=USER, stop=["lo"])
        assert answer.choices[0].message.content == "Hel"
