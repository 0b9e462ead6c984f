"""What callers say of reasoning and of named tokens, as it reaches the workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from protocol.requests import ReasoningLimit
from server.app import create_app
from server.settings import GatewaySettings
from server.structured.compiler import GrammarCompiler
from server.text.families.reasoning import ReasoningMarks
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import serve
from tests.support.model_text import byte_model_text

PLAIN = byte_model_text()
THINKING = replace(
    byte_model_text("<think>", "</think>"), reasoning=ReasoningMarks("<think>", "</think>")
)
OPEN = THINKING.tokenizer.token_id("<think>")
CLOSE = THINKING.tokenizer.token_id("</think>")
assert CLOSE is not None
USER = [{"role": "user", "content": "hi"}]
THINK = {"chat_template_kwargs": {"enable_thinking": True}}
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    with GrammarCompiler(THINKING.tokenizer.vocabulary()) as made:
        yield made


@contextmanager
def gateway(
    text: Any = THINKING, reply: str = "x", grammars: GrammarCompiler | None = None
) -> Iterator[tuple[httpx.Client, ScriptedGenerator]]:
    generator = ScriptedGenerator(text=text, reply=reply)
    app = create_app(generator, text, GatewaySettings(), grammars=grammars)
    with serve(app) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client, generator


def limit_of(path: str, **fields: Any) -> ReasoningLimit | None:
    with gateway() as (client, generator):
        answer = client.post(path, json={"model": "tiny", "max_tokens": 5, **fields})
    assert answer.status_code == 200, answer.text
    return generator.requests[0].sampling.reasoning_limit


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        (CHAT, {"messages": USER, "thinking_token_budget": 3}, (3, False)),
        (CHAT, {"messages": USER, "thinking_token_budget": 0, **THINK}, (0, True)),
        (CHAT, {"messages": USER, "thinking_token_budget": -1, **THINK}, None),
        (CHAT, {"messages": USER}, None),
        (COMPLETIONS, {"prompt": "a<think>b", "thinking_token_budget": 2}, (2, True)),
        (COMPLETIONS, {"prompt": "<think>b</think>", "thinking_token_budget": 2}, (2, False)),
        (
            MESSAGES,
            {"messages": USER, "thinking": {"type": "enabled", "budget_tokens": 9}},
            (9, True),
        ),
        (MESSAGES, {"messages": USER, "thinking": {"type": "disabled"}}, None),
    ],
)
def test_the_budget_reaches_the_workers_with_the_tokens_that_it_counts_between(
    path: str, fields: dict[str, Any], expected: tuple[int, bool] | None
) -> None:
    found = limit_of(path, **fields)
    if expected is None:
        assert found is None
    else:
        tokens, begun = expected
        assert CLOSE is not None
        assert found == ReasoningLimit(max_tokens=tokens, close=CLOSE, open=OPEN, begun=begun)


def test_a_model_that_cannot_be_stopped_reasoning_refuses_a_budget_but_not_a_message() -> None:
    with gateway(PLAIN) as (client, generator):
        body = {"model": "tiny", "messages": USER, "max_tokens": 5}
        refused = client.post(CHAT, json={**body, "thinking_token_budget": 5})
        thinking = {"type": "enabled", "budget_tokens": 5}
        answered = client.post(MESSAGES, json={**body, "thinking": thinking})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "thinking_token_budget"
    assert answered.status_code == 200
    assert len(generator.requests) == 1


def test_a_switch_of_messages_decides_how_the_prompt_ends() -> None:
    with gateway() as (client, generator):
        for kind in ("enabled", "disabled"):
            body = {"model": "tiny", "messages": USER, "max_tokens": 5, "thinking": {"type": kind}}
            assert client.post(MESSAGES, json=body).status_code == 200
            counted = client.post(f"{MESSAGES}/count_tokens", json=body).json()["input_tokens"]
            assert counted == len(generator.requests[-1].prompt_token_ids)
    thinks, does_not = (request.prompt_token_ids[-1] == OPEN for request in generator.requests)
    assert (thinks, does_not) == (True, False)


@pytest.mark.parametrize(
    "structured",
    [
        {"regex": "[a-z/]+"},
        {"choice": ["yes", "no"]},
        {"grammar": 'start: "a" | "b"'},
        {"json": {"type": "integer"}},
        {
            "structural_tag": {
                "structures": [{"begin": "<a>", "schema": {"type": "integer"}, "end": "</a>"}],
                "triggers": ["<a"],
            }
        },
    ],
    ids=lambda structured: next(iter(structured)),
)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_every_format_may_follow_reasoning_and_stand_beside_tools(
    structured: dict[str, Any], tools: Any, grammars: GrammarCompiler
) -> None:
    with gateway(grammars=grammars) as (client, generator):
        fields = {"structured_outputs": structured, "tools": tools, **THINK}
        body = {"model": "tiny", "messages": USER, "max_tokens": 5, **fields}
        answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert "</think>" in (generator.requests[0].sampling.grammar or "")


def test_a_word_that_is_bad_everywhere_cannot_be_bad_in_the_answer_only(
    grammars: GrammarCompiler,
) -> None:
    with gateway(grammars=grammars) as (client, _):
        body = {"model": "tiny", "messages": USER, "bad_words": ["x"], **THINK}
        answer = client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "bad_words"


@pytest.mark.parametrize("stream", [False, True])
def test_named_tokens_reach_the_workers_once_each(stream: bool) -> None:
    with gateway() as (client, generator):
        named = {"logprob_token_ids": [9, 5, 9], "stream": stream}
        for path, prompt, logprobs in (
            (CHAT, {"messages": USER}, True),
            (COMPLETIONS, {"prompt": "hi"}, 0),
        ):
            body = {"model": "tiny", "max_tokens": 2, **prompt, "logprobs": logprobs, **named}
            assert client.post(path, json=body).status_code == 200
    assert [one.sampling.logprob_token_ids for one in generator.requests] == [(9, 5), (9, 5)]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": USER, "logprob_token_ids": [5]}),
        (COMPLETIONS, {"prompt": "x", "logprob_token_ids": [5]}),
        (
            COMPLETIONS,
            {
                "prompt": "x",
                "logprob_token_ids": [5],
                "logprobs": 1,
                "echo": True,
                "max_tokens": 0,
            },
        ),
        (CHAT, {"messages": USER, "logprobs": True, "logprob_token_ids": [10_000]}),
        (CHAT, {"messages": USER, "logprobs": True, "logprob_token_ids": [5] * 129}),
        (CHAT, {"messages": USER, "logprobs": True, "logprob_token_ids": [-1]}),
    ],
)
def test_named_tokens_that_cannot_be_reported_are_refused(
    path: str, fields: dict[str, Any]
) -> None:
    with gateway() as (client, generator):
        answer = client.post(path, json={"model": "tiny", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("logprob_token_ids")
    assert generator.requests == []
