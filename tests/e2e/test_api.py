"""What the HTTP API promises beyond plain chat, asked of a running system with real weights."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks.local_system import LocalSystem
from capacity.conformance.suite import run_suite
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS)


def complete(system: LocalSystem, **fields: Any) -> dict[str, Any]:
    body = {"model": "smollm2", "temperature": 0, **fields}
    answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def test_an_echoed_prompt_has_the_probabilities_its_tokens_had_when_generated(
    system: LocalSystem,
) -> None:
    """What evaluation harnesses build on: scoring a text equals having generated it."""
    tokens: list[int] = []
    logprobs: list[float] = []
    start = 0
    for _ in range(6):  # one at a time, so that a prefill worker computes all of them
        prompt: Any = tokens or "The capital of France is"
        asked = {"max_tokens": 1, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}
        choice = complete(system, prompt=prompt, **asked)["choices"][0]
        start = start or len(choice["prompt_token_ids"])
        tokens = choice["prompt_token_ids"] + choice["token_ids"]
        logprobs += choice["logprobs"]["token_logprobs"]
    for repeat in range(2):  # the second one finds the prompt in the prefix cache, and must not
        scored = complete(system, prompt=tokens, max_tokens=repeat, echo=True, logprobs=1)
        found = scored["choices"][0]["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["token_logprobs"][start : start + 6] == pytest.approx(logprobs, abs=1e-5)
        assert len(found["tokens"]) == len(tokens) + repeat
        assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_sum_of_a_continuation_tells_which_answer_is_likelier(system: LocalSystem) -> None:
    prompts = ["Two plus two is four", "Two plus two is purple"]
    answer = complete(system, prompt=prompts, max_tokens=0, echo=True, logprobs=0)
    sums = [sum(c["logprobs"]["token_logprobs"][1:]) for c in answer["choices"]]
    assert sums[0] > sums[1]


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "person",
                    "schema": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string", "maxLength": 8},
                            "age": {"type": "integer", "minimum": 0, "maximum": 120},
                        },
                        "required": ["name", "age"],
                        "additionalProperties": False,
                    },
                },
            }
        },
        r".*",
    ),
    "regex": ({"structured_outputs": {"regex": "[a-z]{2,4}[0-9]"}}, r"[a-z]{2,4}[0-9]"),
    "choice": ({"structured_outputs": {"choice": ["red", "green", "blue"]}}, r"red|green|blue"),
    "grammar": (
        {"structured_outputs": {"grammar": 'start: digit ("+" digit)~1..3\ndigit: /[0-9]/'}},
        r"\d(\+\d){1,3}",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_constrained_output_matches_at_a_high_temperature(system: LocalSystem, kind: str) -> None:
    """The first token comes from a prefill worker, the others from two decode ranks."""
    check_outputs(system, kind, seeds=range(2), choices=8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_constrained_output_matches_for_two_hundred_seeds(system: LocalSystem, kind: str) -> None:
    check_outputs(system, kind, seeds=range(200), choices=1)


def check_outputs(system: LocalSystem, kind: str, *, seeds: range, choices: int) -> None:
    fields, pattern = KINDS[kind]
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Invent something."}],
        "temperature": 1.5,
        "max_tokens": 80,
        "n": choices,
        **fields,
    }

    def outputs(seed: int) -> list[str]:
        """Those that ``max_tokens`` has not cut."""
        answer = client.post("/v1/chat/completions", json={**body, "seed": seed})
        assert answer.status_code == 200, answer.text
        answered = answer.json()["choices"]
        return [c["message"]["content"] for c in answered if c["finish_reason"] == "stop"]

    with httpx.Client(base_url=system.url, timeout=300) as client, ThreadPoolExecutor(8) as pool:
        texts = [text for of_seed in pool.map(outputs, seeds) for text in of_seed]
    assert len(texts) > len(seeds) * choices / 2  # a few strings of the schema are long
    for text in texts:
        assert re.fullmatch(pattern, text, re.DOTALL), text
        if kind == "json_schema":
            person = json.loads(text)
            assert set(person) == {"name", "age"}
            assert len(person["name"]) <= 8
            assert 0 <= person["age"] <= 120


def test_bad_words_and_allowed_tokens_hold_at_a_high_temperature(system: LocalSystem) -> None:
    asked = {"prompt": "The sea", "temperature": 1.5, "max_tokens": 40, "n": 4, "seed": 3}
    without = complete(system, **asked, bad_words=["e", " the"])
    assert all("e" not in choice["text"] for choice in without["choices"])
    allowed = list(range(300, 340))
    asked["return_token_ids"] = True
    only = complete(system, **asked, allowed_token_ids=allowed)
    for choice in only["choices"]:
        used = choice["token_ids"][: -1 if choice["finish_reason"] == "stop" else None]
        assert set(used) <= set(allowed)


def test_forced_calls_parse_at_a_high_temperature(system: LocalSystem) -> None:
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "unit": {"enum": ["celsius", "kelvin"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the weather like in Paris?"}],
        "tools": [
            {"type": "function", "function": {"name": "weather", "parameters": parameters}},
            {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}},
        ],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "temperature": 1.5,
        "max_tokens": 100,
        "n": 4,
        "seed": 1,
    }
    answer = httpx.post(f"{system.url}/v1/chat/completions", json=body, timeout=120).json()
    complete = [c for c in answer["choices"] if c["finish_reason"] == "tool_calls"]
    assert complete
    for choice in complete:
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        arguments = json.loads(call["function"]["arguments"])
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("celsius", "kelvin")


def test_an_answer_says_where_the_time_to_its_first_token_went(system: LocalSystem) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    headers = {"x-request-id": "mine-1", "traceparent": trace}
    for stream in (False, True):
        body = {"model": "smollm2", "prompt": "x", "max_tokens": 2, "stream": stream}
        answer = httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["traceparent"].split("-")[1] == trace.split("-")[1]
        timing = dict(re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"]))
        stages = {"wait", "queue", "prefill", "ttft"}
        assert set(timing) == (stages if stream else stages | {"transfer"})
        assert float(timing["ttft"]) >= float(timing["prefill"]) > 0


def test_a_deadline_ends_in_504_and_names_the_stage(system: LocalSystem) -> None:
    body = {"model": "smollm2", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    headers = {"x-request-timeout": "0.5"}
    answer = httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert error["type"] == "timeout_error"
    assert "stage: decode" in error["message"]


def test_the_other_apis_answer_with_real_tokens(system: LocalSystem) -> None:
    with httpx.Client(base_url=system.url, timeout=60) as client:
        response = client.post(
            "/v1/responses", json={"model": "smollm2", "input": "Hi", "max_output_tokens": 8}
        ).json()
        message = client.post(
            "/v1/messages",
            json={
                "model": "smollm2",
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 8,
            },
        ).json()
        begun = client.post(
            "/v1/responses",
            json={"model": "smollm2", "input": "Hi", "background": True, "max_output_tokens": 500},
        ).json()
        cancelled = client.post(f"/v1/responses/{begun['id']}/cancel").json()
    assert response["output"][0]["content"][0]["text"]
    assert message["content"][0]["text"]
    assert (begun["status"], cancelled["status"]) == ("in_progress", "cancelled")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_clients_need_holds_here(system: LocalSystem) -> None:
    found = list(run_suite(f"{system.url}/v1", api_key=None, model=None, timeout_s=120))
    assert [(f.case.name, f.detail) for f in found if f.outcome == "fails"] == []
    missing = {f.case.name for f in found if f.outcome == "not offered"}
    assert missing <= {"chat.reasoning-names", "refuse.bad-key"}
