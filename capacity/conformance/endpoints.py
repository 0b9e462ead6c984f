"""What clients need of the other endpoints."""

from typing import Any

import httpx

from capacity.conformance.case import Case, NotOffered, expect
from capacity.conformance.server import Server

_OK, _NOT_FOUND = 200, 404


def _models(server: Server) -> None:
    data = server.send("GET", "models").json()["data"]
    expect(server.model in [model["id"] for model in data], "the model is not listed")
    one = server.send("GET", f"models/{server.model}")
    expect(one.status_code == _OK, f"GET of the model is HTTP {one.status_code}")


def _max_model_len(server: Server) -> None:
    data = server.send("GET", "models").json()["data"]
    lengths = [model.get("max_model_len") for model in data if model["id"] == server.model]
    expect(lengths and isinstance(lengths[0], int), "the model has no max_model_len")


def _completion(server: Server) -> None:
    answer = server.complete()
    expect(answer["object"] == "text_completion", f"object is {answer['object']}")
    expect(isinstance(answer["choices"][0]["text"], str), "there is no text")


def _default_length(server: Server) -> None:
    body = {"prompt": "The sea is", "temperature": 0}
    used = server.post("completions", body).json()["usage"]["completion_tokens"]
    expect(used <= 16, f"{used} tokens without max_tokens")  # noqa: PLR2004


def _batch(server: Server) -> None:
    choices = server.complete(prompt=["One", "Two"], n=2)["choices"]
    expect([c["index"] for c in choices] == [0, 1, 2, 3], "indexes are not prompt by prompt")


def _token_prompt(server: Server) -> None:
    usage = server.complete(prompt=[5, 6, 7])["usage"]
    expect(usage["prompt_tokens"] == 3, f"three ids are {usage['prompt_tokens']} tokens")  # noqa: PLR2004


def _echo(server: Server) -> None:
    choice = server.complete(echo=True, logprobs=1, max_tokens=1)["choices"][0]
    logprobs: dict[str, list[Any]] = choice["logprobs"]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    lengths = {len(logprobs[name]) for name in names}
    expect(len(lengths) == 1, "the four lists differ in length")
    expect(logprobs["token_logprobs"][0] is None, "the first token has a probability")
    expect(choice["text"].startswith("The sea is"), "the prompt is not echoed")


def _offered(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code == _NOT_FOUND:
        raise NotOffered("there is no such endpoint")
    expect(answer.status_code == _OK, f"HTTP {answer.status_code}: {answer.text[:200]}")
    whole: dict[str, Any] = answer.json()
    return whole


def _responses(server: Server) -> None:
    body = {"input": "Name one colour.", "max_output_tokens": 16}
    response = _offered(server.post("responses", body))
    expect(response["object"] == "response", f"object is {response['object']}")
    texts = [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]
    expect(texts, "there is no message")
    again = server.send("GET", f"responses/{response['id']}")
    expect(again.status_code == _OK, f"asking again is HTTP {again.status_code}")


def _response_events(server: Server) -> None:
    body = {"input": "Name one colour.", "max_output_tokens": 16}
    _offered(server.post("responses", body))
    events = server.stream("responses", {**body, "stream": True}).events
    numbers = [event["sequence_number"] for event in events]
    expect(numbers == list(range(len(numbers))), "sequence numbers have gaps")
    kinds = [event["type"] for event in events]
    expect(kinds[0] == "response.created", f"it begins with {kinds[0]}")
    expect(kinds[-1] in ("response.completed", "response.incomplete"), f"it ends with {kinds[-1]}")


def _messages(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}
    message = _offered(server.post("messages", body))
    expect(message["type"] == "message" and message["role"] == "assistant", "not a message")
    counts = message["usage"]
    expect({"input_tokens", "output_tokens"} <= counts.keys(), "usage lacks a count")


CASES = (
    Case(
        name="models.list",
        reason="user interfaces offer what is listed",
        breaks="Open WebUI, LibreChat",
        check=_models,
    ),
    Case(
        name="models.max-model-len",
        reason="agents size their conversations by it",
        breaks="coding agents, LiteLLM hosted_vllm",
        check=_max_model_len,
    ),
    Case(
        name="completions.shape",
        reason="evaluation and older tools use the completions endpoint",
        breaks="lm-eval, continue.dev",
        check=_completion,
    ),
    Case(
        name="completions.default-length",
        reason="the API generates 16 tokens where no length is given",
        breaks="callers that rely on it, and the server's capacity",
        check=_default_length,
    ),
    Case(
        name="completions.batch",
        reason="choices of several prompts are numbered prompt by prompt",
        breaks="lm-eval with batch size above 1",
        check=_batch,
    ),
    Case(
        name="completions.token-ids",
        reason="evaluation tokenises by itself",
        breaks="lm-eval local-completions",
        check=_token_prompt,
    ),
    Case(
        name="completions.echo-logprobs",
        reason="multiple choice is scored by the probabilities of the prompt's own tokens",
        breaks="lm-eval, HELM",
        check=_echo,
    ),
    Case(
        name="responses.create",
        reason="newer clients use the Responses API first",
        breaks="OpenAI Agents SDK, Codex",
        check=_responses,
    ),
    Case(
        name="responses.events",
        reason="events are ordered by their numbers",
        breaks="openai-python responses.stream",
        check=_response_events,
    ),
    Case(
        name="messages.create",
        reason="tools built for Anthropic's API use this endpoint",
        breaks="Claude Code and other coding agents",
        check=_messages,
    ),
)
