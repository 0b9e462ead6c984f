"""Mutations of valid requests: whatever comes, the answer is one that clients understand."""

import random

import anyio
import httpx
import pytest

from server.app import create_app
from server.settings import GatewaySettings
from server.structured.compiler import GrammarCompiler
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text
from tests.support.mutations import VALID, check, mutated

TEXT = byte_model_text()


def run(count: int, seed: int) -> None:
    chance = random.Random(seed)
    generator = ScriptedGenerator(text=TEXT)

    async def send_all() -> int:
        refused = 0
        with GrammarCompiler(TEXT.tokenizer.vocabulary()) as grammars:
            app = create_app(generator, TEXT, GatewaySettings(), grammars=grammars)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            headers = {"content-type": "application/json"}
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                for _ in range(count):
                    path, body = chance.choice(VALID)
                    sent = mutated(body, chance)
                    answer = await client.post(path, content=sent, headers=headers)
                    check(path, sent, answer)
                    refused += answer.status_code != 200
        return refused

    refused = anyio.run(send_all)
    assert generator.opened == generator.closed > 0
    assert refused > count / 4


def test_the_requests_to_mutate_are_valid() -> None:
    generator = ScriptedGenerator(text=TEXT)

    async def send_all() -> None:
        with GrammarCompiler(TEXT.tokenizer.vocabulary()) as grammars:
            app = create_app(generator, TEXT, GatewaySettings(), grammars=grammars)
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                for path, body in VALID:
                    answer = await client.post(path, json=body)
                    assert answer.status_code == 200, answer.text

    anyio.run(send_all)


def test_a_thousand_mutations_are_answered_in_the_envelope() -> None:
    run(1000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_mutations_are_answered_in_the_envelope() -> None:
    run(10_000, seed=2)
