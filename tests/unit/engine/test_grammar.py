import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from engine.sampling.sampler import Sampler
from engine.vocabulary import read_vocabulary
from protocol.errors import InvalidRequest
from protocol.ids import AttemptRef
from protocol.requests import GenerateRequest, SamplingParams, StopConditions
from runtime.grammars import Grammars, grammar_of
from runtime.vocabulary import Vocabulary
from server.text.loading import load_model_text
from tests.support.arithmetic import a_request

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [b'{"', b'":', b"true", b"false", b"null", b", ", b"  ", b"\n", b"Zo\xc3", b"\xab"]
VOCABULARY = Vocabulary(tokens=(*BYTES, *WORDS, b"<end>"), special_ids=(len(BYTES + WORDS),))
END = len(BYTES + WORDS)
SIZE = END + 1
PADDED = SIZE + 13  # logits are often wider than the vocabulary
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        "good": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "good"],
    "additionalProperties": False,
}


def a_constrained_request(grammar: str, *, seed: int = 0, choice: int = 0) -> GenerateRequest:
    sampling = SamplingParams(temperature=1.5, seed=seed, choice=choice, grammar=grammar)
    stop = StopConditions(max_tokens=400, stop_token_ids=(END,))
    return msgspec.structs.replace(a_request(), sampling=sampling, stop=stop)


def generate(sampler: Sampler, requests: list[GenerateRequest], *, limit: int) -> list[bytes]:
    """Random logits until every request has ended; requests leave the batch as they end."""
    texts: dict[AttemptRef, list[bytes]] = {request.ref: [] for request in requests}
    for request in requests:
        sampler.admit(request)
    generator = torch.Generator().manual_seed(7)
    waiting = [request.ref for request in requests]
    for _ in range(limit):
        if not waiting:
            break
        logits = 3 * torch.randn(len(waiting), PADDED, generator=generator)
        sampled = sampler.sample(logits, waiting)
        assert not sampled.errors
        for ref, token_id in zip(list(waiting), sampled.token_ids, strict=True):
            if token_id == END:
                waiting.remove(ref)
                sampler.retire(ref)
            else:
                texts[ref].append(VOCABULARY.tokens[token_id])
    assert not waiting, "some text has no end"
    return [b"".join(text) for text in texts.values()]


def sample_alone(sampler: Sampler, request: GenerateRequest, count: int) -> list[int]:
    return [
        sampler.sample(torch.zeros(1, PADDED), [request.ref]).token_ids[0] for _ in range(count)
    ]


def test_two_hundred_seeds_at_a_high_temperature_all_match_their_schema() -> None:
    sampler = Sampler(PADDED, "cpu", Grammars(VOCABULARY))
    grammar = grammar_of("json", json.dumps(SCHEMA))
    texts = generate(
        sampler, [a_constrained_request(grammar, seed=seed) for seed in range(200)], limit=400
    )
    for text in texts:
        found = json.loads(text)
        assert set(found) == {"name", "age", "tags", "good"}
        assert len(found["name"]) <= 6
        assert 0 <= found["age"] <= 120
        assert set(found["tags"]) <= {"a", "b"}
        assert isinstance(found["good"], bool)
    assert len(set(texts)) > 190


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[a-f]{2,5}-[0-9]{3}", r"[a-f]{2,5}-[0-9]{3}"),
        ("lark", 'start: "yes" | "no" " "? ("!" | "?")', r"yes|no ?[!?]"),
        ("json", '{"enum": ["Zoë", 12]}', r'"Zo(ë|\\u00eb|\\u00EB)"|12'),
    ],
)
def test_every_kind_of_grammar_is_kept(kind: str, source: str, pattern: str) -> None:
    sampler = Sampler(PADDED, "cpu", Grammars(VOCABULARY))
    grammar = grammar_of(kind, source)  # type: ignore[arg-type]
    requests = [a_constrained_request(grammar, seed=seed) for seed in range(200)]
    for text in generate(sampler, requests, limit=60):
        assert re.fullmatch(pattern, text.decode()), text


def test_rows_without_a_grammar_are_left_alone() -> None:
    sampler = Sampler(PADDED, "cpu", Grammars(VOCABULARY))
    plain = msgspec.structs.replace(a_request(), sampling=SamplingParams(temperature=0.0))
    bound = a_constrained_request(grammar_of("regex", "xy"))
    sampler.admit(plain)
    sampler.admit(bound)
    logits = torch.zeros(2, PADDED)
    logits[:, 200] = 9.0
    assert sampler.sample(logits, [plain.ref, bound.ref]).token_ids == [200, ord("x")]


def test_a_request_goes_on_from_its_output_wherever_it_is_admitted() -> None:
    grammar = grammar_of("regex", "abcdef")
    request = a_constrained_request(grammar)
    first = Sampler(PADDED, "cpu", Grammars(VOCABULARY))
    first.admit(request)
    tokens = sample_alone(first, request, 3)
    second = Sampler(PADDED, "cpu", Grammars(VOCABULARY))
    second.admit(request, tokens)
    rest = sample_alone(second, request, 4)
    assert [*tokens, *rest] == [*b"abcdef", END]


def test_what_cannot_be_used_is_refused_and_admits_nothing() -> None:
    sampler = Sampler(PADDED, "cpu", Grammars(VOCABULARY))
    broken = a_constrained_request(grammar_of("regex", "((("))
    with pytest.raises(InvalidRequest, match="grammar"):
        sampler.admit(broken)
    good = a_constrained_request(grammar_of("regex", "ab"))
    with pytest.raises(InvalidRequest, match="does not match"):
        sampler.admit(good, [ord("b")])
    endless = msgspec.structs.replace(good, stop=StopConditions(max_tokens=5))
    with pytest.raises(InvalidRequest, match="ends the text"):
        sampler.admit(endless)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        Sampler(PADDED, "cpu").admit(good)
    sampler.admit(good)
    assert sampler.sample(torch.zeros(1, PADDED), [good.ref]).token_ids == [ord("a")]


def test_the_reason_of_a_refusal_is_one_short_line() -> None:
    with pytest.raises(InvalidRequest) as refused:
        Grammars(VOCABULARY).matcher(grammar_of("lark", "start: " + "nobody " * 500))
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["llama", "demo"])
def test_workers_read_the_vocabulary_that_the_gateway_reads(
    kind: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    if kind == "llama":
        path = tiny_checkpoint("llama")
    else:
        demo = pytest.importorskip("deploy.demo")
        path = demo.demo_weights()
    ours = read_vocabulary(path)
    theirs = load_model_text(path).tokenizer.vocabulary()
    assert ours.tokens[: len(theirs.tokens)] == theirs.tokens
    assert ours.special_ids == theirs.special_ids
