from collections.abc import Sequence

import pytest
import torch

from engine.sampling.sampler import Sampler
from protocol.errors import InvalidRequest
from protocol.requests import GenerateRequest, ReasoningLimit, SamplingParams
from tests.support.generation import a_request

VOCAB = 64
OPEN, CLOSE = 7, 9


def limited(name: str = "a", *, tokens: int = 3, begun: bool = True) -> GenerateRequest:
    limit = ReasoningLimit(max_tokens=tokens, close=CLOSE, open=OPEN, begun=begun)
    sampling = SamplingParams(
        temperature=1.2,
        top_k=20,
        seed=5,
        logprobs=0,
        logit_bias={CLOSE: -90},
        reasoning_limit=limit,
    )
    return a_request(name, sampling=sampling)


def logits_for(step: int, best: int | None = None) -> torch.Tensor:
    row = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(step))
    row[0, OPEN] = -90.0
    if best is not None:
        row[0, best] = 200.0
    return row


def generate(
    request: GenerateRequest, steps: int, *, best: dict[int, int] | None = None
) -> list[int]:
    """``best`` are the tokens that the model is sure of, by step."""
    sampler = Sampler(VOCAB, "cpu")
    sampler.admit(request)
    return [
        sampler.sample(logits_for(step, (best or {}).get(step)), [request.ref]).token_ids[0]
        for step in range(steps)
    ]


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_reasoning_that_the_prompt_has_begun_ends_after_so_many_tokens(tokens: int) -> None:
    output = generate(limited(tokens=tokens), 8)
    assert [i for i, token_id in enumerate(output) if token_id == CLOSE] == [tokens]


def test_reasoning_that_the_output_begins_is_counted_from_there() -> None:
    output = generate(limited(begun=False), 9, best={0: OPEN})
    assert output.index(CLOSE) == 1 + 3


@pytest.mark.parametrize(
    ("begun", "best"),
    [(True, {1: CLOSE}), (False, {}), (False, {1: OPEN})],
    ids=["it has ended by itself", "there is none", "it does not begin the output"],
)
def test_output_without_open_reasoning_is_left_alone(begun: bool, best: dict[int, int]) -> None:
    output = generate(limited(begun=begun), 9, best=best)
    assert output.count(CLOSE) == list(best.values()).count(CLOSE)


@pytest.mark.parametrize("moved_after", range(6))
def test_the_limit_is_the_same_wherever_the_request_continues(moved_after: int) -> None:
    """As after a preemption or a migration, beside a request without a limit."""
    request, other = limited(), a_request("b", sampling=SamplingParams(logprobs=0))
    whole = generate(request, 8)
    output: list[int] = whole[:moved_after]
    sampler = Sampler(VOCAB, "cpu")
    sampler.admit(request, output)
    sampler.admit(other)
    for step in range(moved_after, 8):
        logits = torch.cat([logits_for(step, 30), logits_for(step)])
        found = sampler.sample(logits, [other.ref, request.ref])
        assert found.token_ids[0] == 30
        output.append(found.token_ids[1])
    assert output == whole


def test_the_end_that_was_forced_is_certain() -> None:
    request = limited(tokens=0)
    sampler = Sampler(VOCAB, "cpu")
    sampler.admit(request)
    (found,) = sampler.sample(logits_for(0), [request.ref]).logprobs
    assert found is not None
    assert found.logprob == 0.0


def named(token_ids: Sequence[int], logprobs: int = 2) -> SamplingParams:
    return SamplingParams(logprobs=logprobs, logprob_token_ids=tuple(token_ids))


def test_named_tokens_are_reported_in_place_of_the_likeliest_for_their_row_only() -> None:
    sampler = Sampler(VOCAB, "cpu")
    requests = [
        a_request("a", sampling=SamplingParams(logprobs=2)),
        a_request("b", sampling=named([50, 3, 4])),
        a_request("c", sampling=SamplingParams()),
        a_request("d", sampling=named([3], logprobs=0)),
    ]
    for request in requests:
        sampler.admit(request)
    logits = torch.cat([logits_for(step) for step in range(4)])
    logits[1, 4] = float("-inf")
    expected = logits.log_softmax(-1)
    found = sampler.sample(logits.clone(), [request.ref for request in requests]).logprobs
    likeliest, three, none, one = found
    assert likeliest is not None
    assert [token_id for token_id, _ in likeliest.top] == expected[0].topk(2).indices.tolist()
    assert three is not None
    assert {token_id for token_id, _ in three.top} == {50, 3, 4}
    assert three.top[-1] == (4, float("-inf"))
    assert list(three.top) == sorted(three.top, key=lambda token: -token[1])
    assert dict(three.top)[50] == pytest.approx(float(expected[1, 50]), abs=1e-5)
    assert none is None
    assert one is not None
    assert one.top[0][1] == pytest.approx(float(expected[3, 3]), abs=1e-5)


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (named([VOCAB]), "logprob_token_ids"),
        (
            SamplingParams(reasoning_limit=ReasoningLimit(max_tokens=1, close=VOCAB)),
            "thinking_token_budget",
        ),
    ],
)
def test_a_token_that_the_model_does_not_have_names_the_field(
    sampling: SamplingParams, param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Sampler(VOCAB, "cpu").admit(a_request("a", sampling=sampling))
    assert refused.value.param == param
