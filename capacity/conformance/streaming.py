"""What clients need of a streamed chat."""

from capacity.conformance.case import Case, NotOffered, expect
from capacity.conformance.errors import nested
from capacity.conformance.server import Server, Stream, a_chat


def _streamed(server: Server, **fields: object) -> Stream:
    stream = server.stream_chat(**fields)
    expect(stream.status == 200, f"HTTP {stream.status}: {stream.text[:200]}")  # noqa: PLR2004
    return stream


def _headers(server: Server) -> None:
    headers = _streamed(server).headers
    kind = headers.get("content-type", "")
    expect(kind.startswith("text/event-stream"), f"content-type is {kind}")
    expect(headers.get("x-accel-buffering") == "no", "x-accel-buffering is not no")


def _done(server: Server) -> None:
    stream = _streamed(server)
    expect(stream.done == 1, f"[DONE] came {stream.done} times")
    expect(stream.done_last, "[DONE] is not the last event")


def _role(server: Server) -> None:
    for index in (0, 1):
        events = [c for e in _streamed(server, n=2).events for c in e["choices"]]
        first = next(choice for choice in events if choice["index"] == index)
        expect(first["delta"].get("role") == "assistant", "a first delta has no role")


def _finish(server: Server) -> None:
    reasons = [c["finish_reason"] for e in _streamed(server).events for c in e["choices"]]
    expect(sum(reason is not None for reason in reasons) == 1, "not one finish_reason")
    expect(reasons[-1] is not None, "the finish_reason is not in the last chunk")


def _no_empty_choices(server: Server) -> None:
    empty = [event for event in _streamed(server).events if not event.get("choices")]
    expect(not empty, "a chunk has no choices although usage was not asked for")


def _usage(server: Server) -> None:
    *before, last = _streamed(server, stream_options={"include_usage": True}).events
    expect(last.get("choices") == [], "the last chunk has choices")
    expect(last.get("usage", {}).get("total_tokens"), "the last chunk has no usage")
    expect(all(event.get("usage") is None for event in before), "an earlier chunk has usage")


def _constant(server: Server) -> None:
    events = _streamed(server).events
    heads = {(e.get("id"), e.get("created"), e.get("model"), e.get("object")) for e in events}
    expect(len(heads) == 1, "id, created, model or object change")
    expect(events[0]["object"] == "chat.completion.chunk", f"object is {events[0]['object']}")


def _same_text(server: Server) -> None:
    whole = server.chat(max_tokens=24)["choices"][0]["message"]["content"]
    events = _streamed(server, max_tokens=24).events
    text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    expect(text == whole, "the stream's text is not the whole answer's")
    expect("\N{REPLACEMENT CHARACTER}" not in text, "a character was cut")


def _logprobs(server: Server) -> None:
    choices = [
        c
        for e in _streamed(server, logprobs=True, top_logprobs=1).events
        for c in e["choices"]
        if c["delta"].get("content")
    ]
    for choice in choices:
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        expect(tokens, "a chunk with text has no logprobs")
    text = "".join(c["delta"]["content"] for c in choices)
    tokens = [entry["token"] for c in choices for entry in c["logprobs"]["content"]]
    expect("".join(tokens) == text, "the tokens of the logprobs are not those of the text")


def _stop(server: Server) -> None:
    whole = server.chat(max_tokens=24)["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 :][:4]
    if not middle.strip():
        raise NotOffered("the model says too little to stop it")
    events = _streamed(server, max_tokens=24, stop=[middle]).events
    text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
    expect(text == whole[: whole.index(middle)], "the text does not end before the stop string")


def _options_alone(server: Server) -> None:
    nested(server.post("chat/completions", a_chat(stream_options={"include_usage": True})), 400)


def _early_errors(server: Server) -> None:
    stream = server.stream_chat(temperature=99)
    expect(stream.status == 400, f"HTTP {stream.status} for a bad request")  # noqa: PLR2004


CASES = (
    Case(
        name="stream.headers",
        reason="without them proxies hold the stream back until it is complete",
        breaks="anything behind nginx",
        check=_headers,
    ),
    Case(
        name="stream.done",
        reason="clients stop at [DONE]; what comes after it is an assertion failure",
        breaks="openai-python stream helper, llama-index",
        check=_done,
    ),
    Case(
        name="stream.role",
        reason="helpers take the role from each choice's first delta",
        breaks="openai-python stream helper (role None)",
        check=_role,
    ),
    Case(
        name="stream.finish-reason",
        reason="a stream without it looks cut off, one with two looks like two answers",
        breaks="LangChain, Vercel AI SDK",
        check=_finish,
    ),
    Case(
        name="stream.no-empty-choices",
        reason="clients index choices[0] in every chunk",
        breaks="gradio, shell_gpt, llmeter, foundry-local",
        check=_no_empty_choices,
    ),
    Case(
        name="stream.usage",
        reason="asked for, usage comes once, after all choices",
        breaks="LiteLLM, LangChain token counting",
        check=_usage,
    ),
    Case(
        name="stream.constant",
        reason="chunks are put together by id",
        breaks="openai-python stream helper, tracing tools",
        check=_constant,
    ),
    Case(
        name="stream.same-text",
        reason="streaming must not change or cut what the model says",
        breaks="everybody with text beyond ASCII",
        check=_same_text,
    ),
    Case(
        name="stream.logprobs",
        reason="a chunk's entries are those of its own text",
        breaks="confidence displays, evaluation over streams",
        check=_logprobs,
    ),
    Case(
        name="stream.stop",
        reason="a stop string that spans tokens must not be sent before it is recognised",
        breaks="agents that parse by stop strings (ReAct)",
        check=_stop,
    ),
    Case(
        name="stream.options-need-stream",
        reason="an option that is silently ignored hides a caller's mistake",
        breaks="callers that wait for usage for ever",
        check=_options_alone,
    ),
    Case(
        name="stream.early-errors",
        reason="an error under HTTP 200 is retried by nobody",
        breaks="openai-python and openai-node retries",
        check=_early_errors,
    ),
)
