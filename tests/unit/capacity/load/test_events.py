import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capacity.load.events import AnswerReader
from capacity.load.records import Failure
from capacity.load.usage import server_stages, token_counts


def chat(content: str | None = None, **delta: object) -> bytes:
    if content is not None:
        delta["content"] = content
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def event(content: object, *, spaced: bool = False) -> bytes:
    separators = None if spaced else (",", ":")
    return b"data: " + json.dumps(content, separators=separators).encode() + b"\n\n"


END = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
DONE = b"data: [DONE]\n\n"


def read(*pieces: bytes, endpoint: str = "chat", keep_text: bool = False) -> AnswerReader:
    reader = AnswerReader(endpoint, keep_text=keep_text)
    reader.read_events(list(pieces), list(range(1, len(pieces) + 1)))
    reader.end_of_stream()
    return reader


def test_a_chunk_arrives_with_the_piece_that_completes_its_event() -> None:
    whole = chat("abc")
    reader = read(chat("a"), whole[:10], whole[10:-1], whole[-1:], END + DONE)
    assert reader.arrivals == [1, 4]


def test_events_that_come_together_have_the_same_time() -> None:
    assert read(chat("a") + chat("b"), chat("c") + END + DONE).arrivals == [1, 1, 2]


def test_a_role_alone_is_no_token() -> None:
    assert read(chat("", role="assistant"), chat("a"), END + DONE).arrivals == [2]


def test_reasoning_and_tool_arguments_are_tokens() -> None:
    tools = [{"index": 0, "function": {"arguments": "{"}}]
    reader = read(chat(reasoning="why", reasoning_content="why"), chat(tool_calls=tools), END, DONE)
    assert reader.arrivals == [1, 2]


def test_usage_is_found_behind_content_and_in_the_same_event() -> None:
    reader = read(chat("a"), chat("b"), END, USAGE, DONE)
    assert token_counts(reader.usage) == (3, 4, None)
    both = {"choices": [{"index": 0, "delta": {"content": "b"}}], "usage": {"completion_tokens": 9}}
    assert read(chat("a"), event(both), END, DONE).usage == {"completion_tokens": 9}


def test_quotes_in_the_text_do_not_look_like_fields() -> None:
    tricky = '"content":"","usage":{"finish_reason":"stop"'
    reader = read(chat("a"), chat(tricky), chat(tricky), END, DONE, keep_text=True)
    assert reader.arrivals == [1, 2, 3]
    assert reader.text == "a" + 2 * tricky
    assert reader.finish_reason == "length"


def test_carriage_returns_and_comments_change_nothing() -> None:
    stream = (chat("a") + chat("b") + END + DONE).replace(b"\n", b"\r\n")
    assert read(b": keep-alive\r\n\r\n", stream).arrivals == [2, 2]


def test_json_with_spaces_is_read_the_same() -> None:
    content = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
    empty = {"choices": [{"index": 0, "delta": {"content": ""}}]}
    pieces = [event(content, spaced=True), event(empty, spaced=True), event(content, spaced=True)]
    assert read(*pieces, END, DONE).arrivals == [1, 3]


def test_an_error_event_fails_the_request() -> None:
    reader = read(chat("a"), event({"error": {"message": "lost"}}))
    assert (reader.failure, reader.message) == (Failure.ERROR_EVENT, "lost")


def test_a_stream_that_just_ends_is_a_failure() -> None:
    assert read(chat("a")).failure == Failure.UNFINISHED
    assert read(chat("a"), END).failure is None
    assert read(chat("a"), DONE).failure is None


def test_a_broken_event_is_a_failure() -> None:
    assert read(chat("a"), b"data: {broken\n\n", DONE).failure == Failure.MALFORMED


def test_responses_count_deltas_and_end_with_their_last_event() -> None:
    delta = event({"type": "response.output_text.delta", "delta": "x"})
    done = event({"type": "response.output_text.done", "text": "xx"})
    usage = {"input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}
    last = {"type": "response.completed", "response": {"status": "completed", "usage": usage}}
    reader = read(delta, delta, done, event(last), endpoint="responses", keep_text=True)
    assert reader.arrivals == [1, 2]
    assert reader.text == "xx"
    assert token_counts(reader.usage) == (5, 2, 1)
    assert reader.failure is None


@pytest.mark.parametrize(
    ("endpoint", "answer", "text"),
    [
        ("chat", {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}, "hi"),
        ("completions", {"choices": [{"text": "hi", "finish_reason": "stop"}]}, "hi"),
        (
            "responses",
            {
                "status": "completed",
                "output": [{"content": [{"type": "output_text", "text": "hi"}]}],
            },
            "hi",
        ),
    ],
    ids=["chat", "completions", "responses"],
)
def test_whole_answers_are_read(endpoint: str, answer: object, text: str) -> None:
    reader = AnswerReader(endpoint, keep_text=True)
    reader.read_whole(json.dumps(answer).encode())
    assert (reader.text, reader.failure, reader.has_content) == (text, None, True)


@given(
    texts=st.lists(st.text(max_size=8), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=10),
    ascii_only=st.booleans(),
)
def test_however_a_stream_is_cut_the_same_events_have_content(
    texts: list[str], cuts: list[int], ascii_only: bool
) -> None:
    def one(text: str) -> bytes:
        content = {"choices": [{"index": 0, "delta": {"content": text}}]}
        return b"data: " + json.dumps(content, ensure_ascii=ascii_only).encode() + b"\n\n"

    stream = b"".join(map(one, texts)) + END + DONE
    places = [0, *sorted(cut % len(stream) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(places) if a < b]
    reader = AnswerReader("chat")
    for number, piece in enumerate(pieces):
        reader.read_events([piece], [number])
    reader.end_of_stream()
    ends = [sum(len(one(t)) for t in texts[: i + 1]) for i, text in enumerate(texts) if text]
    reached = [sum(len(piece) for piece in pieces[: number + 1]) for number in range(len(pieces))]
    wanted = [next(n for n, bytes_so_far in enumerate(reached) if bytes_so_far >= e) for e in ends]
    assert reader.arrivals == wanted
    assert reader.failure is None


@st.composite
def an_event(draw: st.DrawFn) -> bytes:
    """Content with and without usage, an end, a role, a field that varies, or no object at all."""
    text = draw(st.sampled_from(["a", "", '"', "\\", '","usage":{', '"}}],"x_reason":"', "ä\n"]))
    delta = {"content": text} | draw(st.sampled_from([{}, {"role": "assistant"}]))
    choice: dict[str, object] = {
        "index": 0,
        "delta": delta,
        "finish_reason": draw(st.sampled_from([None, "stop"])),
    }
    usages: list[dict[str, object]] = [{}, {"usage": None}, {"usage": {"completion_tokens": 1}}]
    more = draw(st.sampled_from(usages))
    choices = draw(st.sampled_from([[choice], [choice, choice], []]))
    spaced = draw(st.booleans())
    made = event(
        {"id": draw(st.sampled_from(["x", "y"])), "choices": choices, **more}, spaced=spaced
    )
    return draw(st.sampled_from([made, made, made, b"\n", b": ping\n\n"]))


CONTENT = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}


@given(events=st.lists(an_event(), max_size=12))
@example(
    events=[
        event(CONTENT, spaced=True),
        event({**CONTENT, "usage": {"completion_tokens": 1}}, spaced=True),
    ]
)
def test_what_is_not_parsed_would_have_said_the_same(events: list[bytes]) -> None:
    reader, parsing = AnswerReader("chat"), AnswerReader("chat", keep_text=True)
    for one in (reader, parsing):
        one.read_events([*events, END], list(range(len(events) + 1)))
    assert reader.arrivals == parsing.arrivals
    assert (reader.usage, reader.finish_reason) == (parsing.usage, parsing.finish_reason)
    assert (reader.failure, reader.ended) == (parsing.failure, parsing.ended)


def test_server_timing_is_read_in_milliseconds() -> None:
    header = 'queue;dur=1.5, prefill;desc="all, of it";dur=20, kv;dur=x, total'
    assert server_stages(header) == {"queue": 1.5, "prefill": 20.0}
    assert server_stages("cache;desc=hit") == {}
