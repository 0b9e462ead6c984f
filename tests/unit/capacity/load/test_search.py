from random import Random

import pytest

from capacity.load.search import CLOSE_ENOUGH, RateSearch, SearchResult, certain_failure


def searched(capacity: float, *, first: float = 1.0, share: float = 0.99) -> SearchResult:
    """Against a server that answers everything in time below its capacity and nothing above."""
    search = RateSearch(first, share)
    while (rate := search.next_rate()) is not None:
        search.outcome(200 if rate <= capacity else 20, 200)
    return search.result()


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.7, 130.0])
def test_the_bracket_closes_around_the_capacity(capacity: float) -> None:
    found = searched(capacity)
    assert found.highest is not None
    assert found.lowest is not None
    assert found.highest <= capacity < found.lowest
    assert found.lowest / found.highest <= CLOSE_ENOUGH


def test_a_server_that_never_holds_has_no_highest_rate() -> None:
    found = searched(0.0)
    assert found.highest is None
    assert "even at" in found.text


def test_a_borderline_probe_is_repeated_and_counted_together() -> None:
    search = RateSearch(4.0, 0.95)
    first = search.outcome(94, 100)
    assert not first.certain
    assert search.next_rate() == 4.0
    second = search.outcome(100, 100)
    assert (second.attainment.good, second.attainment.attempts) == (194, 200)
    assert second.held


def test_a_noisy_server_is_found_within_its_noise() -> None:
    source = Random(5)
    search = RateSearch(1.0, 0.9)
    while (rate := search.next_rate()) is not None:
        good = sum(source.random() < min(1.0, 1.3 - rate / 20) for _ in range(300))
        search.outcome(good, 300)
    highest = search.result().highest
    assert highest is not None
    assert 6.5 <= highest <= 9.0  # it holds 90 % at 8


def test_a_probe_fails_for_certain_only_when_all_the_rest_could_not_help() -> None:
    assert not certain_failure(1, 100, 0.99)
    assert certain_failure(4, 100, 0.99)
    assert not certain_failure(40, 1000, 0.95)
