"""KV by each transport that a CPU system can choose, and what ``headrace status`` says of it."""

import importlib.util

import httpx
import pytest

from deploy.status import ask, lines_of
from tests.e2e.conftest import Start
from tests.e2e.test_faults import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FLAGS = ("--decode-ranks", "1", "--kv-cache", "128MiB", "--dtype", "float32")
PROMPT = "The harbour lies behind the hill, and " * 20


def completion(url: str) -> str:
    answer = httpx.post(
        f"{url}/v1/completions",
        json={"model": "smollm2", "prompt": PROMPT, "max_tokens": 12, "temperature": 0},
        timeout=120,
    )
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_every_transport_gives_the_same_text_and_shows_its_links(start: Start) -> None:
    transports = ["shm", "tcp"]
    if importlib.util.find_spec("nixl") is not None:
        transports.append("nixl")
    texts: set[str] = set()
    for transport in transports:
        system = start("smollm2", *FLAGS, "--transport", transport)
        texts.add(completion(system.url))
        with httpx.Client(timeout=10) as client:

            def links(client: httpx.Client = client, url: str = system.url) -> bool:
                found = ask(client, url, links=True).links
                if not found:
                    return False
                figures = [(link.bytes, link.measured_bytes_per_second) for link in found.values()]
                return all(min(pair) > 0 for pair in figures)

            eventually(links, "the link's figures have come")
            state = ask(client, system.url, links=True)
        assert state.links is not None
        (pair,) = state.links
        assert pair == "prefill-0 > decode-0/0"
        assert state.links[pair].transport == transport
        assert f"kv.transport is {transport}" in lines_of(state)[-1]
    assert len(texts) == 1


def test_a_payload_of_eight_bits_serves(start: Start) -> None:
    system = start("smollm2", *FLAGS, "--transport", "tcp", "--set", "decode.kv.payload=fp8")
    assert completion(system.url)
