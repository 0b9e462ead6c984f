import math

import pytest
import torch

from engine.experts.router import every_expert, group_limited_top_k, softmax_top_k


def logits(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_routing_takes_the_most_probable_experts(renormalise: bool) -> None:
    scores = logits(9, 7)

    ids, weights = softmax_top_k(scores, 3, renormalise=renormalise)

    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    for row, chosen, given in zip(scores.tolist(), ids.tolist(), weights.tolist(), strict=True):
        exponentials = [math.exp(score) for score in row]
        best = sorted(range(7), key=lambda expert: -row[expert])[:3]
        total = sum(exponentials[expert] for expert in best) if renormalise else sum(exponentials)
        assert chosen == best
        assert given == pytest.approx([exponentials[expert] / total for expert in best], rel=1e-5)


def reference_group_limited(
    row: list[float], bias: list[float], *, k: int, groups: int, kept: int, scaling: float
) -> dict[int, float]:
    scores = [1 / (1 + math.exp(-value)) for value in row]
    biased = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = len(row) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    group_score = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best_groups = sorted(range(groups), key=lambda group: -group_score[group])[:kept]
    allowed = [expert for group in best_groups for expert in members[group]]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:k]
    total = sum(scores[expert] for expert in chosen) + 1e-20
    return {expert: scores[expert] / total * scaling for expert in chosen}


@pytest.mark.parametrize(("groups", "kept"), [(4, 2), (4, 4), (1, 1), (8, 3)])
@pytest.mark.parametrize("bias_shift", [0.0, -3.0], ids=["", "all biased scores negative"])
def test_group_limited_routing_follows_the_paper(groups: int, kept: int, bias_shift: float) -> None:
    scores = logits(20, 16)
    bias = logits(1, 16, seed=1)[0] * 0.3 + bias_shift

    ids, weights = group_limited_top_k(
        scores, bias, 4, num_groups=groups, kept_groups=kept, scaling=2.5
    )

    for row, chosen, given in zip(scores.tolist(), ids.tolist(), weights.tolist(), strict=True):
        wanted = reference_group_limited(
            row, bias.tolist(), k=4, groups=groups, kept=kept, scaling=2.5
        )
        assert chosen == list(wanted)
        assert given == pytest.approx(list(wanted.values()), rel=1e-5)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    scores = torch.zeros(1, 4)
    bias = torch.tensor([0.0, 5.0, 1.0, 0.0])

    ids, weights = group_limited_top_k(scores, bias, 2, num_groups=1, kept_groups=1, scaling=1.0)

    assert ids.tolist() == [[1, 2]]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("experts", [8, 30, 61])
def test_a_token_is_routed_the_same_alone_and_in_any_batch(experts: int) -> None:
    scores, bias = logits(333, experts), logits(1, experts, seed=1)[0]

    def routed(rows: torch.Tensor) -> list[torch.Tensor]:
        limited = group_limited_top_k(rows, bias, 3, num_groups=1, kept_groups=1, scaling=2.5)
        return [*softmax_top_k(rows, 3, renormalise=True), *limited]

    together = routed(scores)
    for row in (0, 1, 77, 331, 332):
        alone = routed(scores[row : row + 1])
        assert all(
            torch.equal(one[0], all_rows[row])
            for one, all_rows in zip(alone, together, strict=True)
        )


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_every_expert_has_weight_one(tokens: int) -> None:
    ids, weights = every_expert(tokens, 6, torch.device("cpu"))

    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * tokens
    assert weights.tolist() == [[1.0] * 6] * tokens


def test_no_tokens_are_routed_nowhere() -> None:
    ids, weights = softmax_top_k(torch.zeros(0, 5), 2, renormalise=True)
    assert ids.shape == weights.shape == (0, 2)
    ids, weights = group_limited_top_k(
        torch.zeros(0, 8), torch.zeros(8), 2, num_groups=4, kept_groups=2, scaling=1.0
    )
    assert ids.shape == weights.shape == (0, 2)
