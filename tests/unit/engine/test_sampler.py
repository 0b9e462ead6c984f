from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch

from engine.sampling.sampler import FAILED, Sampler
from protocol.errors import EngineError, InvalidRequest
from protocol.requests import GenerateRequest, SamplingParams
from tests.support.generation import a_request
from tests.support.reference_sampling import adjusted, distribution, probabilities

VOCAB = 700  # no multiple of the blocks that the vocabulary is cut into
EVERYTHING = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(),
    "warm": SamplingParams(temperature=1.7),
    "top-k": SamplingParams(top_k=5),
    "top-k beyond the vocabulary": SamplingParams(top_k=VOCAB + 1),
    "top-p": SamplingParams(top_p=0.6),
    "wide top-p": SamplingParams(top_p=0.97, temperature=3.0),
    "tiny top-p": SamplingParams(top_p=1e-6),
    "min-p": SamplingParams(min_p=0.2),
    "all filters": SamplingParams(temperature=0.8, top_k=9, top_p=0.8, min_p=0.05),
    "bias": SamplingParams(logit_bias={3: 4.0, 11: -100.0}),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "presence": SamplingParams(presence_penalty=1.2),
    "frequency": SamplingParams(frequency_penalty=-0.7),
    "all penalties": SamplingParams(
        repetition_penalty=0.8, presence_penalty=0.5, frequency_penalty=0.4, top_k=40
    ),
}


def some_logits(rows: int, *, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def seeded(params: SamplingParams, seed: int, choice: int = 0) -> SamplingParams:
    return msgspec.structs.replace(params, seed=seed, choice=choice)


def generate(
    requests: Sequence[GenerateRequest], logits: torch.Tensor, steps: int
) -> dict[str, list[int]]:
    """All requests in one batch, every step with the same logits per row."""
    sampler = Sampler(VOCAB, "cpu")
    for request in requests:
        sampler.admit(request)
    refs = [request.ref for request in requests]
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for _ in range(steps):
        sampled = sampler.sample(logits.clone(), refs)
        for ref, token_id in zip(refs, sampled.token_ids, strict=True):
            outputs[ref.request_id].append(token_id)
    return outputs


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The statistic, and a bound that a right sampler exceeds once in about ten thousand seeds."""
    order = np.argsort(expected)
    groups: list[tuple[float, float]] = []
    count = mass = 0.0
    for index in order:
        count, mass = count + counts[index], mass + expected[index]
        if mass >= 5:
            groups.append((count, mass))
            count = mass = 0.0
    if groups:
        groups[-1] = (groups[-1][0] + count, groups[-1][1] + mass)
    freedom = max(1, len(groups) - 1)
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in groups)
    z = 3.72  # Wilson and Hilferty's approximation of the quantile
    return statistic, freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "greedy"])
def test_tokens_are_distributed_as_the_definition_says(name: str) -> None:
    """2000 requests that differ in their seeds only, beside each other in one batch."""
    rows, output = 2000, [1, 1, 4, 9]
    logits = some_logits(1)
    requests = [
        a_request(
            f"r{seed}",
            prompt=(4, 5, 6),
            sampling=seeded(EVERYTHING[name], seed),
            min_tokens=5,
            stop_token_ids=(2,),
        )
        for seed in range(rows)
    ]
    sampler = Sampler(VOCAB, "cpu")
    for request in requests:
        sampler.admit(request, output)
    sampled = sampler.sample(logits.repeat(rows, 1), [request.ref for request in requests])
    expected = distribution(adjusted(logits[0].double().numpy(), requests[0], output), requests[0])
    counts = np.bincount(sampled.token_ids, minlength=VOCAB)
    assert not counts[expected == 0].any(), "a token that the filters exclude"
    statistic, bound = chi_square(counts, expected * rows)
    assert statistic < bound


def test_greedy_rows_take_the_best_token_and_ties_go_to_the_lower_id() -> None:
    logits = some_logits(2)
    logits[1, [600, 300, 299]] = 50.0
    requests = [a_request(name) for name in "ab"]
    assert generate(requests, logits, 1) == {"a": [int(logits[0].argmax())], "b": [299]}


def test_penalties_follow_the_tokens_that_were_sampled() -> None:
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.9
    )
    request = a_request("a", prompt=(1, 2, 2, 3), sampling=params)
    beside = a_request("b", prompt=(9,), sampling=SamplingParams(temperature=0.0))
    logits = some_logits(2)
    found = generate([beside, request], logits, 30)
    wanted: list[int] = []
    for _ in range(30):
        wanted.append(int(adjusted(logits[1].double().numpy(), request, wanted).argmax()))
    assert found["a"] == wanted
    assert len(set(wanted)) > 5
    assert set(found["b"]) == {int(logits[0].argmax())}


def test_stop_tokens_are_masked_until_enough_tokens_were_made() -> None:
    logits = some_logits(1)
    best, second = logits[0].topk(2).indices.tolist()
    request = a_request("a", min_tokens=3, stop_token_ids=(best, 10**6))
    assert generate([request], logits, 5) == {"a": [second] * 3 + [best] * 2}


def test_a_request_draws_the_same_alone_as_beside_any_others() -> None:
    """Batch-mates with other filters change how candidates are found, never which is drawn."""
    mates = [
        a_request(f"mate {name}", sampling=seeded(params, 5), prompt=(7, 8))
        for name, params in EVERYTHING.items()
    ]
    logits = some_logits(len(mates) + 1, seed=3).bfloat16().float()  # many ties
    together = {
        name: generate([*mates, a_request("me", sampling=seeded(params, 77))], logits, steps=10)[
            "me"
        ]
        for name, params in EVERYTHING.items()
    }
    alone = {
        name: generate([a_request("me", sampling=seeded(params, 77))], logits[-1:], steps=10)["me"]
        for name, params in EVERYTHING.items()
    }
    assert together == alone


def test_a_request_continues_identically_on_another_sampler() -> None:
    """As after a migration, and with other batch-mates, who come and go."""
    requests = [
        a_request(name, sampling=seeded(params, 9), min_tokens=25, stop_token_ids=(1, 2))
        for name, params in EVERYTHING.items()
    ]
    logits = some_logits(len(requests), seed=4)
    whole = generate(requests, logits, steps=40)
    second = Sampler(VOCAB, "cpu")
    for row, request in enumerate(requests):
        outputs = whole[request.request_id][:21]
        second.admit(request, outputs)
        for _ in range(19):
            outputs.append(second.sample(logits[[row]], [request.ref]).token_ids[0])
        second.retire(request.ref)
        assert outputs == whole[request.request_id]


def test_sitting_out_steps_and_changing_rows_changes_nothing() -> None:
    requests = [
        a_request(name, sampling=seeded(params, 2), prompt=(1, 5))
        for name, params in EVERYTHING.items()
    ]
    logits = some_logits(len(requests), seed=5)
    whole = generate(requests, logits, steps=12)
    sampler = Sampler(VOCAB, "cpu")
    for request in requests:
        sampler.admit(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    turn = 0
    while rows := [i for i, one in enumerate(requests) if len(outputs[one.request_id]) < 12]:
        chosen = [i for i in rows if (i + turn // 3) % 3 != 0] or rows
        chosen = chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]
        turn += 1
        sampled = sampler.sample(logits[chosen], [requests[i].ref for i in chosen])
        for i, token_id in zip(chosen, sampled.token_ids, strict=True):
            outputs[requests[i].request_id].append(token_id)
        for i in chosen:
            if len(outputs[requests[i].request_id]) == 12:
                sampler.retire(requests[i].ref)
    assert outputs == whole


def test_choices_of_one_seed_differ() -> None:
    requests = [
        a_request(f"c{choice}", sampling=seeded(SamplingParams(), 1, choice)) for choice in range(4)
    ]
    outputs = generate(requests, some_logits(1).repeat(4, 1), steps=8)
    assert len({tuple(ids) for ids in outputs.values()}) == 4


def test_logprobs_describe_the_distribution_before_temperature() -> None:
    params = SamplingParams(
        temperature=0.3, top_k=2, logprobs=3, presence_penalty=1.0, logit_bias={8: 3.0}
    )
    wanting = a_request("a", sampling=params, prompt=(1,))
    chosen_only = a_request("b", sampling=SamplingParams(logprobs=0))
    silent = a_request("c")
    sampler = Sampler(VOCAB, "cpu")
    for request in (wanting, chosen_only, silent):
        sampler.admit(request, [8, 9])
    logits = some_logits(3)
    sampled = sampler.sample(logits.clone(), [wanting.ref, chosen_only.ref, silent.ref])
    expected = np.log(probabilities(adjusted(logits[0].double().numpy(), wanting, [8, 9])))
    first, second, third = sampled.logprobs
    assert first is not None
    assert first.logprob == pytest.approx(expected[sampled.token_ids[0]], abs=1e-5)
    best = np.argsort(-expected)[:3]
    assert [token_id for token_id, _ in first.top] == best.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    assert second is not None
    assert second.top == ()
    assert second.logprob == pytest.approx(
        float(logits[1].log_softmax(-1)[sampled.token_ids[1]]), abs=1e-5
    )
    assert third is None


def test_impossible_tokens_are_no_alternatives() -> None:
    """An infinite number would not survive JSON."""
    sampler = Sampler(4, "cpu")
    request = a_request(
        "a",
        sampling=SamplingParams(logprobs=4),
        min_tokens=1,
        stop_token_ids=(2,),
    )
    sampler.admit(request)
    (found,) = sampler.sample(torch.zeros(1, 4), [request.ref]).logprobs
    assert found is not None
    assert [token_id for token_id, _ in found.top] == [0, 1, 3]


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), None], ids=["nan", "+inf", "nothing finite"]
)
@pytest.mark.parametrize("name", list(EVERYTHING))
def test_a_row_without_finite_logits_fails_alone(name: str, bad: float | None) -> None:
    params = msgspec.structs.replace(EVERYTHING[name], logprobs=2)
    requests = [a_request(f"r{row}", sampling=seeded(params, row)) for row in range(3)]
    logits = some_logits(3)
    whole = logits.clone()
    if bad is None:
        logits[1] = float("-inf")
    else:
        logits[1, 500] = bad
    results = []
    for values, rows in ((logits, (0, 1, 2)), (whole, (0, 2))):
        sampler = Sampler(VOCAB, "cpu")
        for row in rows:
            sampler.admit(requests[row])
        refs = [requests[row].ref for row in rows]
        results.append(sampler.sample(values[list(rows)], refs))
    broken, healthy = results
    assert set(broken.errors) == {requests[1].ref}
    assert isinstance(broken.errors[requests[1].ref], EngineError)
    assert broken.token_ids[1] == FAILED
    assert broken.logprobs[1] is None
    assert [broken.token_ids[0], broken.token_ids[2]] == healthy.token_ids
    assert healthy.errors == {}


def test_excluded_tokens_with_infinitely_low_logits_are_no_failure() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, 650] = -3.0
    request = a_request("a", sampling=SamplingParams(top_p=0.5))
    assert generate([request], logits, 2) == {"a": [650, 650]}


def test_a_history_slot_forgets_its_previous_request() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=100.0)
    sampler = Sampler(VOCAB, "cpu")
    logits = some_logits(1)
    best = int(logits.argmax())
    for name in ("a", "b"):
        request = a_request(name, sampling=params, prompt=(1,))
        sampler.admit(request)
        assert sampler.sample(logits.clone(), [request.ref]).token_ids == [best]
        sampler.retire(request.ref)


def test_bfloat16_logits_are_sampled_and_left_as_they_are() -> None:
    logits = some_logits(1).bfloat16()
    before = logits.clone()
    request = a_request("a", sampling=SamplingParams(temperature=0.0, logit_bias={0: 100.0}))
    assert generate([request], logits, 1) == {"a": [0]}
    assert torch.equal(logits, before)


def test_an_idle_rank_samples_nothing() -> None:
    assert Sampler(VOCAB, "cpu").sample(torch.zeros(0, VOCAB), []).token_ids == []


def test_a_bias_for_a_token_that_does_not_exist_names_the_field() -> None:
    request = a_request("a", sampling=SamplingParams(logit_bias={VOCAB: 1.0}))
    with pytest.raises(InvalidRequest, match="700 is outside the vocabulary of 700") as failure:
        Sampler(VOCAB, "cpu").admit(request)
    assert failure.value.param == "logit_bias"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_tokens_that_a_cpu_draws() -> None:
    requests = [
        a_request(name, sampling=seeded(params, 6), prompt=(1, 5))
        for name, params in EVERYTHING.items()
    ]
    logits = some_logits(len(requests), seed=6)
    outputs = {}
    for device in ("cpu", "cuda"):
        sampler = Sampler(VOCAB, device)
        for request in requests:
            sampler.admit(request)
        refs = [request.ref for request in requests]
        outputs[device] = [
            sampler.sample(logits.clone().to(device), refs).token_ids for _ in range(20)
        ]
    assert outputs["cuda"] == outputs["cpu"]
