"""Requests made from our own description of the API, such as fit it and such as do not."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.app import create_app
from server.openapi import BODIES
from server.settings import GatewaySettings
from server.structured.compiler import GrammarCompiler
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text

pytestmark = pytest.mark.filterwarnings("ignore")  # schemathesis' own
TEXT = byte_model_text()
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def described() -> Iterator[Any]:
    """The description, as the application serves it."""
    generator = ScriptedGenerator(text=TEXT)
    with GrammarCompiler(TEXT.tokenizer.vocabulary()) as grammars:
        app = create_app(generator, TEXT, GatewaySettings(), grammars=grammars)
        yield schemathesis.openapi.from_asgi("/openapi.json", app)
    assert generator.opened == generator.closed > 0


def ask(described: Any, path: str, mode: GenerationMode, *, examples: int) -> None:
    """Requests to ``path``, checked against what the description says of their answers."""
    operation = described[path]["POST"]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body["model"] = "tiny"  # the description does not say which there are
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("path", BODIES)
def test_answers_are_as_described(described: Any, path: str, mode: GenerationMode) -> None:
    ask(described, path, mode, examples=10)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("path", BODIES)
def test_answers_to_many_requests_are_as_described(
    described: Any, path: str, mode: GenerationMode
) -> None:
    ask(described, path, mode, examples=80)
