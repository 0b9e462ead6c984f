"""What clients need of models and completions."""

from typing import Any

from capacity.conformance.case import Case, NotOffered, expect
from capacity.conformance.errors import NOTHING, nested
from capacity.conformance.server import Server

_OK = 200


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


def _score_only(server: Server) -> None:
    body = {"prompt": "The sea is", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = server.post("completions", body)
    if answer.status_code != _OK:
        raise NotOffered(f"HTTP {answer.status_code} for max_tokens 0")
    whole = answer.json()
    expect(whole["choices"][0]["text"] == "The sea is", "the text is not the prompt")
    expect(whole["usage"]["completion_tokens"] == 0, "tokens were generated")


def _unicode(server: Server) -> None:
    prompt = "\N{LATIN SMALL LETTER E WITH ACUTE}\N{SNOWMAN}\N{GRINNING FACE} and \u6f22\u5b57"
    text = server.complete(prompt=prompt, echo=True, max_tokens=1)["choices"][0]["text"]
    expect(text.startswith(prompt), "the prompt comes back changed")


def _stream(server: Server) -> None:
    body = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0}
    whole = server.complete()["choices"][0]["text"]
    stream = server.stream("completions", {**body, "stream": True})
    expect(stream.done == 1 and stream.done_last, "[DONE] is not the last event, once")
    choices = [choice for event in stream.events for choice in event["choices"]]
    expect("".join(c["text"] for c in choices) == whole, "the stream's text is not the whole one's")
    reasons = [c["finish_reason"] for c in choices if c["finish_reason"] is not None]
    expect(len(reasons) == 1, "not one finish_reason")


def _unknown_model(server: Server) -> None:
    nested(server.send("GET", f"models/{NOTHING}"), 404)


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
        name="completions.score-only",
        reason="a prompt is scored without generating anything",
        breaks="lm-eval multiple choice (older releases)",
        check=_score_only,
    ),
    Case(
        name="completions.unicode",
        reason="characters of several tokens must survive tokenising and back",
        breaks="everybody with text beyond ASCII",
        check=_unicode,
    ),
    Case(
        name="completions.stream",
        reason="the older stream has text where the chat's has a delta",
        breaks="continue.dev, code completion in editors",
        check=_stream,
    ),
    Case(
        name="models.unknown",
        reason="clients ask for a model before they use it",
        breaks="openai-python models.retrieve",
        check=_unknown_model,
    ),
)
