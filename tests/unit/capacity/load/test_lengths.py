from random import Random

import pytest

from capacity.load.errors import WrongOption
from capacity.load.lengths import parse_lengths, parse_pairs


def drawn(written: str, count: int = 2000) -> list[int]:
    lengths, source = parse_lengths(written, "--input"), Random(1)
    return [lengths.draw(source) for _ in range(count)]


def test_a_number_is_always_that_number() -> None:
    assert set(drawn("512", 10)) == {512}


def test_a_range_is_uniform_and_includes_its_ends() -> None:
    sample = drawn("10-13")
    assert set(sample) == {10, 11, 12, 13}


def test_a_normal_distribution_has_its_mean_and_stays_positive() -> None:
    sample = drawn("normal:500,50")
    assert sum(sample) / len(sample) == pytest.approx(500, rel=0.02)
    assert min(drawn("normal:1,5")) == 1


def test_a_mixture_draws_each_part_by_its_weight() -> None:
    sample = drawn("70%:100 30%:1000-1010")
    assert sample.count(100) / len(sample) == pytest.approx(0.7, abs=0.04)
    assert max(sample) <= 1010


def test_equal_seeds_give_equal_lengths() -> None:
    assert drawn("5-5000") == drawn("5-5000")


@pytest.mark.parametrize("written", ["", "0", "ten", "20-10", "gauss:3", "normal:5", "-3", "0%:5"])
def test_what_cannot_be_meant_is_refused_by_name(written: str) -> None:
    with pytest.raises(WrongOption, match="--input"):
        parse_lengths(written, "--input")


def test_pairs_belong_together() -> None:
    assert parse_pairs("pairs:512/64 4096/16", "--input").pairs == ((512, 64), (4096, 16))
    for wrong in ("pairs:", "pairs:512", "pairs:0/4", "pairs:a/b"):
        with pytest.raises(WrongOption, match="--input"):
            parse_pairs(wrong, "--input")
