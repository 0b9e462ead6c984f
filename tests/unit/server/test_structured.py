import json
import random
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest

from protocol.errors import InvalidRequest
from runtime.grammars import Grammars
from server.app import create_app
from server.settings import GatewaySettings
from server.structured import compiler
from server.structured.compiler import GrammarCompiler
from server.structured.constraints import Constraint
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    with GrammarCompiler(TEXT.tokenizer.vocabulary()) as made:
        yield made


def post(grammars: GrammarCompiler, **fields: Any) -> tuple[httpx.Response, ScriptedGenerator]:
    generator = ScriptedGenerator(text=TEXT)
    app = create_app(generator, TEXT, GatewaySettings(), grammars=grammars)

    async def exchange() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            body = {"model": "tiny", "messages": USER, **fields}
            return await client.post("/v1/chat/completions", json=body)

    return anyio.run(exchange), generator


def json_schema(schema: Any, name: str = "answer") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": json_schema(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}},
        {"structured_outputs": {"regex": "[0-9]+"}},
        {"structured_outputs": {"choice": ["yes", 'n"o']}},
        {"structured_outputs": {"grammar": 'start: "a" | "b"'}},
        {"structured_outputs": {"json_object": True}},
        {"allowed_token_ids": [7, 5, 5, 6]},
        {"bad_words": ["no", "a/b\n[x]"]},
    ],
    ids=json.dumps,
)
def test_every_kind_of_constraint_reaches_the_workers(
    fields: dict[str, Any], grammars: GrammarCompiler
) -> None:
    response, generator = post(grammars, **fields)
    assert response.status_code == 200, response.text
    assert generator.requests[0].sampling.grammar


def test_plain_text_is_no_constraint(grammars: GrammarCompiler) -> None:
    response, generator = post(grammars, response_format={"type": "text"})
    assert response.status_code == 200
    assert generator.requests[0].sampling.grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "\n" * 999: 1}}, "response_format"),
        ({"response_format": json_schema(SCHEMA, name="a b")}, "response_format.json_schema.name"),
        ({"response_format": json_schema({"type": "nothing"})}, "response_format.json_schema"),
        ({"response_format": json_schema({"unevaluatedItems": False})}, "response_format"),
        ({"response_format": json_schema({"type": "string", "pattern": "(("})}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "((("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: nobody"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [100_000]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": ["x"], "allowed_token_ids": [5]}, "bad_words"),
        ({"bad_words": ["x"], "response_format": {"type": "json_object"}}, "bad_words"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:70],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    fields: dict[str, Any], param: str, grammars: GrammarCompiler
) -> None:
    response, generator = post(grammars, **fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"].startswith(param)
    assert len(error["message"]) < 600
    assert generator.requests == []


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"regex": "((("}, "invalid regular expression: unclosed group"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-ahead and look-behind, is not"),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "use anyOf"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "too complex"),
        ({"json": "5"}, "must be an object, or true for any JSON"),
        ({"json": "[]"}, "must be an object, or true for any JSON"),
    ],
    ids=json.dumps,
)
def test_a_refusal_says_what_is_wrong_in_the_callers_terms(
    constraint: dict[str, Any], says: str, grammars: GrammarCompiler
) -> None:
    response, _ = post(grammars, structured_outputs=constraint)
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert says in message
    assert "coerce" not in message


@pytest.mark.parametrize(
    ("schema", "status"), [(True, 200), ("true", 200), ({}, 200), (False, 400), ("false", 400)]
)
def test_a_schema_may_be_true_and_must_not_be_false(
    schema: object, status: int, grammars: GrammarCompiler
) -> None:
    if not isinstance(schema, str):
        response, _ = post(grammars, response_format=json_schema(schema))
        assert response.status_code == status, response.text
    if schema is not False:  # of fields that are false the extension takes none as given
        response, _ = post(grammars, structured_outputs={"json": schema})
        assert response.status_code == status, response.text


def test_what_is_no_schema_at_all_does_not_end_the_process_that_compiles(
    grammars: GrammarCompiler,
) -> None:
    with pytest.raises(InvalidRequest, match="cannot be used"):
        anyio.run(grammars.compile, Constraint("json", "false", "x"))
    assert anyio.run(grammars.compile, Constraint("json", "{}", "x"))


def walk(grammar: str, seed: int, steps: int = 60) -> list[int]:
    """Tokens chosen at random among those that the grammar allows."""
    chance = random.Random(seed)
    matcher = Grammars(TEXT.tokenizer.vocabulary()).matcher(grammar)
    chosen: list[int] = []
    for _ in range(steps):
        mask = int.from_bytes(matcher.allowed(), "little")
        allowed = [i for i in range(TEXT.tokenizer.vocab_size) if mask >> i & 1]
        chosen.append(chance.choice(allowed))
        assert matcher.accept(chosen[-1])
    return chosen


@pytest.mark.parametrize("words", [["a"], ["ab", "b c"], list("()[]{}|*+?.^$-#/\\\n\t \"'~&<>")])
def test_bad_words_are_in_no_text_however_it_is_cut(
    words: list[str], grammars: GrammarCompiler
) -> None:
    _, generator = post(grammars, bad_words=words)
    grammar = generator.requests[0].sampling.grammar
    assert grammar is not None
    for seed in range(10):
        tokens = walk(grammar, seed)
        text = b"".join(map(TEXT.tokenizer.piece, tokens)).decode(errors="ignore")
        assert not any(word in text for word in words), text


def test_only_allowed_tokens_are_possible(grammars: GrammarCompiler) -> None:
    _, generator = post(grammars, allowed_token_ids=[70, 5, 71, 70])
    grammar = generator.requests[0].sampling.grammar
    assert grammar is not None
    assert set(walk(grammar, 0)) == {5, 70, 71}


@pytest.mark.parametrize(("keep", "kept"), [(5, 5), (10_000, None), (-1, None), (None, None)])
def test_a_prompt_is_cut_from_the_left(
    keep: int | None, kept: int | None, grammars: GrammarCompiler
) -> None:
    _, whole = post(grammars, max_tokens=3)
    _, cut = post(grammars, max_tokens=3, truncate_prompt_tokens=keep)
    ids = whole.requests[0].prompt_token_ids
    assert cut.requests[0].prompt_token_ids == (ids if kept is None else ids[-kept:])


def test_minus_one_leaves_room_for_the_answer(grammars: GrammarCompiler) -> None:
    long = [{"role": "user", "content": "x" * 2000}]
    response, generator = post(grammars, messages=long, max_tokens=10, truncate_prompt_tokens=-1)
    assert response.status_code == 200, response.text
    assert len(generator.requests[0].prompt_token_ids) == generator.max_model_len - 10
    refused, _ = post(grammars, truncate_prompt_tokens=0)
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience = compiler.TRIAL_S

    async def compile_two() -> str:
        with GrammarCompiler(TEXT.tokenizer.vocabulary()) as grammars:
            await grammars.compile(Constraint("regex", "a", "x"))
            monkeypatch.setattr(compiler, "TRIAL_S", 0.0)
            with pytest.raises(InvalidRequest, match="compile"):
                await grammars.compile(Constraint("regex", "b", "x"))
            monkeypatch.setattr(compiler, "TRIAL_S", patience)
            return await grammars.compile(Constraint("regex", "c", "x"))

    assert anyio.run(compile_two)
