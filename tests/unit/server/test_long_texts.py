"""Long prompts are tokenised in a process that may be killed, as they would be here."""

from collections.abc import AsyncIterator

import anyio
import pytest

from deploy.demo import demo_weights
from protocol.errors import InvalidRequest
from server.text import long_texts
from server.text.families.family import Tool
from server.text.loading import load_model_text
from server.text.long_text_process import ChatJob, TextJob, run_job
from server.text.long_texts import LongTexts

pytestmark = pytest.mark.anyio
TEXT = load_model_text(demo_weights())
SENTENCE = "Wasser flows 💧 from the <|im_end|> headrace.\n"
HOURS_OF_IT = TextJob(text=" " * 20_000_000, add_special_tokens=False)


@pytest.fixture
async def apart() -> AsyncIterator[LongTexts]:
    with LongTexts(demo_weights()) as made:
        yield made


def a_chat(words: str) -> ChatJob:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    return ChatJob(
        messages=[{"role": "user", "content": words}],
        add_generation_prompt=True,
        continue_final_message=False,
        options={},
        tools=[
            Tool(
                name="f",
                parameters={"type": "object"},
                definition={"type": "function", "function": function},
            )
        ],
    )


async def test_the_tokens_are_the_same_as_here(apart: LongTexts) -> None:
    for job in (TextJob(text=SENTENCE * 500, add_special_tokens=True), a_chat(SENTENCE * 300)):
        assert await apart.tokenise(job, param="prompt") == run_job(job, TEXT)


@pytest.mark.slow
async def test_a_text_that_takes_too_long_is_refused_and_the_next_one_is_read(
    apart: LongTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = TextJob(text=SENTENCE, add_special_tokens=False)
    await apart.tokenise(short, param="prompt")
    monkeypatch.setattr(long_texts, "PATIENCE_S", 0.05)
    with pytest.raises(InvalidRequest, match="prompt: takes more than") as refused:
        await apart.tokenise(HOURS_OF_IT, param="prompt")
    assert refused.value.param == "prompt"
    monkeypatch.undo()
    assert await apart.tokenise(short, param="prompt") == run_job(short, TEXT)


@pytest.mark.slow
async def test_a_caller_who_goes_stops_the_work(apart: LongTexts) -> None:
    short = TextJob(text=SENTENCE, add_special_tokens=False)
    await apart.tokenise(short, param="prompt")
    with anyio.move_on_after(0.05) as left:
        await apart.tokenise(HOURS_OF_IT, param="prompt")
    assert left.cancelled_caught
    assert await apart.tokenise(short, param="prompt") == run_job(short, TEXT)
