"""Which replica a token goes to depends on the token alone, and replicas share tokens evenly."""

import pytest
import torch
from torch import Tensor

from engine.experts.placement import EMPTY, WHOLE, ExpertPlacement, place_evenly
from engine.experts.replicas import ReplicaTable, request_key, token_keys

CPU = torch.device("cpu")
MASK = 2**64 - 1
# Expert 0 is on all four ranks, expert 1 on two, the others on one each.
PLACEMENT = ExpertPlacement(4, ((0, 1), (0, 1), (0, 2), (0, 3)))


def table(*, layer: int = 0, movable: bool = False) -> ReplicaTable:
    return ReplicaTable(PLACEMENT, layer=layer, device=CPU, movable=movable)


def keys_of(requests: int, positions: int) -> Tensor:
    keys = torch.tensor([request_key(f"r{i}") for i in range(requests)])
    return token_keys(keys.repeat_interleave(positions), torch.arange(positions).repeat(requests))


def mixed_by_hand(request: int, position: int) -> int:
    """splitmix64's finaliser, in Python's integers."""
    z = (request + position * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def test_token_keys_are_the_same_on_every_machine() -> None:
    requests = [0, 1, 2**62 + 12345, request_key("r1")]
    found = token_keys(torch.tensor(requests), torch.tensor([0, 1, 131_071, 7]))
    by_hand = [mixed_by_hand(*token) for token in zip(requests, (0, 1, 131_071, 7), strict=True)]
    assert found.tolist() == by_hand


def test_a_request_has_one_key_for_all_its_attempts_and_workers() -> None:
    assert request_key("3f2a") == 2283459061933414663
    assert 0 <= request_key("") < 2**63


def test_replicas_of_an_expert_get_equal_shares_of_its_tokens() -> None:
    ids_TK = torch.tensor([[0, 1, 2, 3]]).expand(8000, -1)
    slots_TK = table()(ids_TK, keys_of(80, 100))
    for k, replicas in enumerate(PLACEMENT.replicas()):
        counts = slots_TK[:, k].bincount(minlength=8)
        assert counts.nonzero().flatten().tolist() == list(replicas)
        expected = 8000 / len(replicas)
        assert all(abs(counts[slot] - expected) < 0.08 * expected for slot in replicas)


UNEQUAL = ExpertPlacement(
    4,
    ((0, 1), (0, 1), (0, 2), (0, 3)),
    ((WHOLE // 2, 0), (WHOLE // 4, WHOLE), (WHOLE // 8, WHOLE), (WHOLE // 8, WHOLE)),
)


def test_replicas_get_the_shares_that_the_placement_says() -> None:
    ids_TK = torch.tensor([[0, 1, 2, 3]]).expand(16_000, -1)
    unequal = ReplicaTable(UNEQUAL, layer=0, device=CPU)
    slots_TK = unequal(ids_TK, keys_of(160, 100))
    counts = slots_TK[:, 0].bincount(minlength=8)[::2] / 16_000
    assert counts.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8], abs=0.01)
    assert slots_TK[:, 1:].unique(dim=0).tolist() == [[3, 5, 7]]


def test_a_share_that_grows_keeps_the_tokens_that_it_had() -> None:
    ids_TK, keys_T = torch.zeros(4000, 1, dtype=torch.int64), keys_of(40, 100)
    before = table()(ids_TK, keys_T)
    moving = table(movable=True)
    moving.load(UNEQUAL)
    after = moving(ids_TK, keys_T)
    assert (after[before == 0] == 0).all()
    assert 0.2 < (after != before).double().mean() < 0.7


def test_absent_seats_are_passed_over() -> None:
    covered = ExpertPlacement(
        2, ((EMPTY, EMPTY), (0, 1), (1, EMPTY)), ((0, 0), (WHOLE, 9), (WHOLE - 9, 0))
    )
    moving = ReplicaTable(covered, layer=0, device=CPU, movable=True)
    moving.load(covered, members=(1, 2))
    slots_TK = moving(torch.tensor([[0, 1]]).expand(500, -1), keys_of(5, 100))
    assert set(slots_TK[:, 0].tolist()) == {0}
    assert set(slots_TK[:, 1].tolist()) <= {1, 2}


def test_no_tokens_choose_nothing() -> None:
    none = torch.zeros(0, 3, dtype=torch.int64)
    assert table()(none, none[:, 0]).shape == (0, 3)


def test_the_choice_knows_neither_batch_nor_place_in_it() -> None:
    ids_TK = torch.tensor([[0, 1], [1, 0], [0, 3]]).repeat(30, 1)
    keys_T = keys_of(9, 10)
    together = table()(ids_TK, keys_T)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    assert torch.equal(table()(ids_TK[order], keys_T[order]), together[order])
    assert torch.equal(table()(ids_TK[7:8], keys_T[7:8]), together[7:8])


def test_layers_and_places_among_the_chosen_choose_for_themselves() -> None:
    ids_TK = torch.zeros(2000, 2, dtype=torch.int64)  # twice the same, which no router does
    keys_T = keys_of(20, 100)
    first, second = table(layer=0)(ids_TK, keys_T), table(layer=1)(ids_TK, keys_T)
    for left, right in ((first[:, 0], first[:, 1]), (first[:, 0], second[:, 0])):
        assert 0.2 < (left == right).double().mean() < 0.3


def test_deep_layers_choose_too() -> None:
    ids_TK = torch.zeros(500, 1, dtype=torch.int64)
    choices = {
        tuple(table(layer=layer)(ids_TK, keys_of(5, 100)).flatten().tolist()) for layer in range(99)
    }
    assert len(choices) == 99


def test_an_id_that_is_not_routed_stays_so() -> None:
    slots_TK = table()(torch.tensor([[-1, 2], [3, -1]]), keys_of(1, 2))
    assert slots_TK.tolist() == [[EMPTY, 5], [7, EMPTY]]


def test_without_replicas_no_keys_are_needed() -> None:
    alone = ReplicaTable(place_evenly(5, 3), layer=0, device=CPU)
    assert alone(torch.arange(5).unsqueeze(0), None).tolist() == [[0, 2, 3, 4, 5]]


def test_another_placement_is_loaded_in_place() -> None:
    moving = table(movable=True)
    before = {name: value.data_ptr() for name, value in tensors_of(moving).items()}
    moving.load(ExpertPlacement(4, ((1, 3), (2, 0), (2, EMPTY), (2, EMPTY))))
    ids_TK, keys_T = torch.tensor([[0, 1, 3, 2]]).expand(100, -1), keys_of(1, 100)
    slots_TK = moving(ids_TK, keys_T)
    assert slots_TK[:, :3].unique(dim=0).tolist() == [[3, 0, 1]]
    assert slots_TK[:, 3].unique().tolist() == [2, 4, 6]
    assert {name: value.data_ptr() for name, value in tensors_of(moving).items()} == before


def tensors_of(moving: ReplicaTable) -> dict[str, Tensor]:
    names = ("_first_E", "_end_P", "_slot_P")
    return {name: getattr(moving, name) for name in names}


@pytest.mark.gpu
def test_a_gpu_chooses_the_same_replicas() -> None:
    gpu = torch.device("cuda")
    ids_TK = torch.arange(4).expand(900, -1)
    there = ReplicaTable(PLACEMENT, layer=77, device=gpu)(ids_TK.to(gpu), keys_of(9, 100).to(gpu))
    assert torch.equal(there.cpu(), table(layer=77)(ids_TK, keys_of(9, 100)))
    requests, positions = torch.arange(2**60, 2**60 + 50), torch.arange(50)
    keys = token_keys(requests.to(gpu), positions.to(gpu))
    assert torch.equal(keys.cpu(), token_keys(requests, positions))
