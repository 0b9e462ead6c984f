import torch

from engine.experts.counting import ExpertCounts

CPU = torch.device("cpu")


def test_each_real_choice_counts_once() -> None:
    counts = ExpertCounts([1, 3], 5, device=CPU)
    counts.add(3, torch.tensor([[0, 4], [4, 2], [-1, -1]]))  # the last row is padding
    counts.add(1, torch.tensor([[1, 2]]))
    counts.add(3, torch.zeros(0, 2, dtype=torch.int64))  # an idle rank's
    counts.add(3, torch.tensor([[4, -1]]))
    assert counts.take() == ((0, 1, 1, 0, 0), (1, 0, 1, 0, 3))


def test_taking_starts_the_next_window() -> None:
    counts = ExpertCounts([0], 2, device=CPU)
    counts.add(0, torch.tensor([[1]]))
    counts.take()
    counts.add(0, torch.tensor([[0]]))
    assert counts.take() == ((1, 0),)


def test_counts_are_exact_beyond_what_a_float_can_hold() -> None:
    counts = ExpertCounts([0], 1, device=CPU)
    counts._counts_LC += 2**53
    counts.add(0, torch.tensor([[0]]))
    assert counts.take() == ((2**53 + 1,),)
