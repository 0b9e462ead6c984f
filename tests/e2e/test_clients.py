"""The official client against a running system, and clients that hang up."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS, eventually

pytestmark = pytest.mark.timeout(300)
MESSAGES = [{"role": "user", "content": "Name one colour."}]


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS)


@pytest.fixture
def client(system: LocalSystem) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def held_blocks(system: LocalSystem) -> float:
    """KV blocks of decode ranks that are neither free nor cached, as /metrics tells."""
    held = 0.0
    for line in httpx.get(f"{system.url}/metrics").text.splitlines():
        if line.startswith("headrace_worker_blocks{") and 'role="decode"' in line:
            value = float(line.rsplit(" ", 1)[1])
            if 'state="total"' in line:
                held += value
            elif 'state="free"' in line or 'state="cached"' in line:
                held -= value
    return held


def test_chat_streams_the_text_that_it_also_answers_whole(client: openai.OpenAI) -> None:
    asked = {"model": "smollm2", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_choices_with_one_seed_are_repeatable_and_differ_from_one_another(
    client: openai.OpenAI,
) -> None:
    def sampled() -> list[str]:
        answer = client.completions.create(
            model="smollm2", prompt="The sea", max_tokens=12, n=3, seed=7, temperature=1.0
        )
        return [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]

    first = sampled()
    assert first == sampled()
    assert len(set(first)) > 1


def test_bad_input_raises_what_the_client_names(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nothing", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="smollm2", prompt="x", temperature=3)
    with pytest.raises(openai.BadRequestError) as overflow:
        client.completions.create(model="smollm2", prompt=[5] * 9000, max_tokens=1)
    assert overflow.value.code == "context_length_exceeded"


def test_a_client_that_hangs_up_leaves_no_block_behind(system: LocalSystem) -> None:
    body = {
        "model": "smollm2",
        "prompt": "Once",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{system.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        eventually(lambda: held_blocks(system) > 0, "blocks are held while it decodes")
    eventually(lambda: held_blocks(system) == 0, "all blocks are free again", within_s=20)
