"""HTTP in, HTTP out, through real processes: the tokens are those of transformers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deploy.demo import demo_weights
from tests.e2e.conftest import Start

pytestmark = pytest.mark.timeout(300)
NEW_TOKENS = 20
FLAGS = ("--dtype", "float32", "--kv-cache", "64MiB")
Checkpoints = Callable[[str], Path]


def completion(url: str, model: str, prompt: list[int], **fields: object) -> dict[str, object]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == httpx.codes.OK, answer.text
    found: dict[str, object] = answer.json()
    return found


def token_ids(answer: dict[str, object]) -> list[int]:
    tokens: list[int] = answer["choices"][0]["token_ids"]  # type: ignore[index]
    return tokens


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int = NEW_TOKENS) -> list[int]:
    generate: Any = model.generate  # which its types do not know
    out = generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def a_prompt(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    file = demo_weights()
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_demo_on_any_number_of_ranks(start: Start, demo: PreTrainedModel, ranks: int) -> None:
    system = start("smollm2", *FLAGS, "--decode-ranks", str(ranks))
    short, long = a_prompt(7, demo.config.vocab_size), a_prompt(100, demo.config.vocab_size)
    assert token_ids(completion(system.url, "smollm2", short)) == greedy(demo, short)
    first, again = (completion(system.url, "smollm2", long) for _ in range(2))
    assert token_ids(first) == token_ids(again) == greedy(demo, long)
    # The second time the prompt's full blocks were in the prefix cache.
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}  # type: ignore[index]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_each_architecture_over_each_transport(
    start: Start, tiny_checkpoint: Checkpoints, kind: str, transport: str
) -> None:
    folder = tiny_checkpoint(kind)
    system = start(folder, *FLAGS, "--name", kind, "--transport", transport)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for length in (7, 150):
        prompt = a_prompt(length, model.config.vocab_size, seed=length)
        assert token_ids(completion(system.url, kind, prompt)) == greedy(model, prompt)


def test_requests_that_outgrow_the_decode_blocks_are_preempted_and_still_right(
    start: Start, tiny_checkpoint: Checkpoints
) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    flags = ("--name", "tiny", "--decode-ranks", "1", "--set", "decode.num_blocks=10")
    system = start(folder, *FLAGS, *flags)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = [a_prompt(length, model.config.vocab_size, seed=length) for length in (20, 28, 40)]
    with ThreadPoolExecutor() as pool:
        answers = pool.map(
            lambda prompt: completion(system.url, "tiny", prompt, max_tokens=60), asked
        )
        got = [token_ids(answer) for answer in answers]
    assert got == [greedy(model, prompt, 60) for prompt in asked]
