"""One choice's text, however its tokens are grouped into chunks."""

import anyio
import pytest

from protocol.errors import EngineError
from protocol.ids import RequestId
from protocol.requests import GenerateRequest, SamplingParams, StopConditions
from server.generation import TokenChunk
from server.openai.choice import Choice, run_choice
from server.openai.schema import GenerationRequest
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
END = TEXT.defaults.end_token_ids[0]
REPLY = "ab 🙂 STOP cd"


def a_choice(
    *stops: str, min_tokens: int = 0, show_stop: bool = False, skip_special: bool = True
) -> Choice:
    request = GenerateRequest(
        request_id=RequestId("r"),
        attempt=0,
        model="tiny",
        prompt_token_ids=(1,),
        sampling=SamplingParams(),
        stop=StopConditions(max_tokens=100, min_tokens=min_tokens, stop_token_ids=(END,)),
    )
    asked = GenerationRequest(
        model="tiny", include_stop_str_in_output=show_stop, skip_special_tokens=skip_special
    )
    return Choice(0, request, asked, stops, TEXT.tokenizer)


def play(choice: Choice, *, tokens_per_chunk: int = 1, reply: str = REPLY) -> str:
    generator = ScriptedGenerator(text=TEXT, reply=reply, tokens_per_chunk=tokens_per_chunk)
    pieces: list[str] = []

    def deliver(chunk: TokenChunk) -> bool:
        pieces.append(choice.accept(chunk))
        return choice.finish_reason is None

    async def scenario() -> None:
        await run_choice(choice, generator, deadline_s=1, deliver=deliver)

    anyio.run(scenario)
    assert generator.closed == 1
    return "".join(pieces)


@pytest.mark.parametrize("tokens_per_chunk", [1, 2, 3, 5, 100])
def test_grouping_changes_neither_text_nor_counts(tokens_per_chunk: int) -> None:
    whole, stopped = a_choice(), a_choice("STOP", "never")
    assert play(whole, tokens_per_chunk=tokens_per_chunk) == REPLY
    assert whole.completion_tokens == len(REPLY.encode()) + 1
    assert play(stopped, tokens_per_chunk=tokens_per_chunk) == "ab 🙂 "
    assert stopped.completion_tokens == len("ab 🙂 STOP".encode())
    assert (whole.finish_reason, stopped.finish_reason) == ("stop", "stop")


def test_a_stop_string_is_shown_on_request() -> None:
    assert play(a_choice("STOP", show_stop=True)) == "ab 🙂 STOP"


def test_stop_strings_before_min_tokens_do_not_stop() -> None:
    assert play(a_choice("a", "c", min_tokens=5)) == "ab 🙂 STOP "


def test_text_held_for_a_stop_string_is_shown_at_the_end() -> None:
    assert play(a_choice("cde")) == REPLY


def test_an_open_character_at_the_end_is_a_replacement_character() -> None:
    choice = a_choice()
    ids = TEXT.tokenizer.encode("é", add_special_tokens=False)
    assert choice.accept(TokenChunk(token_ids=(ids[0],))) == ""
    assert choice.accept(TokenChunk(token_ids=(ids[0],), finish_reason="length")) == "\ufffd\ufffd"


def test_special_tokens_are_shown_on_request_and_the_end_token_is_not() -> None:
    start = TEXT.tokenizer.token_id("<|im_start|>") or 0
    chunk = TokenChunk(token_ids=(start, END), finish_reason="stop")
    assert a_choice(skip_special=False).accept(chunk) == "<|im_start|>"
    assert a_choice().accept(chunk) == ""


def test_a_stream_without_an_end_is_an_error() -> None:
    class Silent(ScriptedGenerator):
        async def generate(self, request, deliver, *, deadline_s):
            deliver(TokenChunk(token_ids=(1,)))

    def ignored(_chunk: TokenChunk) -> bool:
        return True

    async def scenario() -> None:
        await run_choice(a_choice(), Silent(text=TEXT), deadline_s=1, deliver=ignored)

    with pytest.raises(EngineError, match="without a finish reason"):
        anyio.run(scenario)
