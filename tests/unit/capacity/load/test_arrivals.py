import math
from itertools import pairwise
from random import Random

import pytest

from capacity.load.arrivals import Ramp, parse_arrivals, schedule
from capacity.load.errors import WrongOption


def times(kind: str, rate: Ramp, duration_s: float, seed: int = 0) -> list[float]:
    return list(schedule(parse_arrivals(kind), rate, duration_s, Random(seed)))


def variation(kind: str) -> float:
    """The coefficient of variation of the gaps."""
    at = times(kind, Ramp(100, 100), 100)
    gaps = [later - earlier for earlier, later in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean


def test_constant_arrivals_are_evenly_spaced() -> None:
    assert times("constant", Ramp(4, 4), 1.1) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("kind", "wanted"), [("poisson", 1.0), ("gamma:0.25", 2.0), ("gamma:4", 0.5), ("constant", 0)]
)
def test_burstiness_is_the_one_that_was_asked_for(kind: str, wanted: float) -> None:
    assert variation(kind) == pytest.approx(wanted, abs=0.06)


def test_the_number_of_poisson_arrivals_varies_between_seeds() -> None:
    counts = {len(times("poisson", Ramp(10, 10), 10, seed)) for seed in range(20)}
    assert len(counts) > 5
    assert sum(counts) / len(counts) == pytest.approx(100, rel=0.15)


def test_a_ramp_has_its_rate_everywhere() -> None:
    at = times("constant", Ramp(0, 20), 10)
    assert len(at) == pytest.approx(100, abs=1)
    first_half = sum(time < 5 for time in at)
    assert first_half == pytest.approx(25, abs=1)
    down = times("constant", Ramp(20, 0), 10)
    assert sum(time < 5 for time in down) == pytest.approx(75, abs=1)


def test_equal_seeds_give_equal_schedules() -> None:
    assert times("poisson", Ramp(5, 9), 20) == times("poisson", Ramp(5, 9), 20)
    assert times("poisson", Ramp(5, 9), 20) != times("poisson", Ramp(5, 9), 20, seed=1)


@pytest.mark.parametrize("written", ["", "uniform", "gamma:0", "gamma:x", "poisson:2"])
def test_unknown_arrivals_are_refused(written: str) -> None:
    with pytest.raises(WrongOption, match="--arrivals"):
        parse_arrivals(written)
