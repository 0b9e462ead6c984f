"""The benchmark's arithmetic: what its figures are made of."""

import pytest

from benchmarks.wide_ep import (
    _durations,
    _estimated_least,
    _expected_bytes,
    _moving,
    _parts,
    _sent,
)
from benchmarks.wide_ep_rank import Outcome, Step


def a_step(arrived: float, left: float, ended: float, attention: float = 0.0) -> Step:
    return Step(
        arrived=arrived, left=left, ended=ended, moving_s=0.004, parts={"attention": attention}
    )


def an_outcome(*steps: Step, sent_bytes: int = 0, counted: int = 0) -> Outcome:
    return Outcome(
        steps=list(steps),
        sent_bytes=sent_bytes,
        tokens=4,
        padded_layers=3 - counted,
        counted_layers=counted,
        counts=(),
        layers_moved=2,
        layers=3,
    )


TWO_RANKS = [
    an_outcome(a_step(0.0, 0.030, 0.100, attention=0.010), a_step(0.1, 0.105, 0.150)),
    an_outcome(a_step(0.020, 0.030, 0.090, attention=0.030), a_step(0.1, 0.105, 0.160)),
]


def test_parts_add_up_to_the_step() -> None:
    parts = _parts(TWO_RANKS)
    assert parts["step, ms"] == pytest.approx((100 + 60) / 2)
    assert parts["attention, ms"] == pytest.approx((10 + 30) / 4)
    assert parts["skew, ms"] == pytest.approx(20 / 2)
    assert parts["row exchange, ms"] == pytest.approx((10 + 5) / 2)
    waited = 10 / 2  # on the mean until the last rank has come
    named = ("attention", "dispatch", "experts", "combine", "row exchange", "rest")
    whole = sum(float(parts[f"{part}, ms"] or 0) for part in named) + waited
    assert whole == pytest.approx(parts["step, ms"])


def test_the_longest_step_is_compared_with_the_median() -> None:
    figures = _moving(TWO_RANKS, TWO_RANKS)
    assert _durations(TWO_RANKS) == pytest.approx([0.100, 0.060])
    assert figures["longest / median step, moving"] == pytest.approx(100 / 80)
    assert figures["longest move / median step"] == pytest.approx(4 / 80)
    assert figures["layers moved"] == 2


def test_bytes_are_compared_with_the_form_that_was_used() -> None:
    row, results = 64 * 4 + 8 * 4, 8 * 64 * 4
    padded = _expected_bytes(4, padded=True)
    assert padded == 3 * row + results * 3 / 4
    counted = _expected_bytes(4, padded=False)
    assert counted == pytest.approx(3 * (1 - 0.75**8) * row + 3 * 8 / 4 + results * 3 / 4)
    sent = [an_outcome(sent_bytes=int(12 * padded)) for _ in range(4)]
    assert _sent(sent, "all_to_all")["bytes over the formula"] == pytest.approx(1, rel=1e-3)
    sent = [an_outcome(sent_bytes=int(12 * counted), counted=3) for _ in range(4)]
    assert _sent(sent, "all_to_all")["form of exchange"] == "counted"
    assert _sent(sent, "all_to_all")["bytes over the formula"] == pytest.approx(1, rel=1e-3)
    assert "bytes over the formula" not in _sent(sent, "padded")


def test_the_least_is_estimated_from_replicas_and_the_lightest_beside_them() -> None:
    # One expert has half of all tokens: with all 33 replicas that there are slots for, its ranks
    # carry a 33rd of that each, and three others of the rest.
    half = [255 * 5, *[5] * 255]
    mean = 2 * 255 * 5 / 72
    assert _estimated_least(half) == pytest.approx((255 * 5 / 33 + 3 * 5) / mean, rel=1e-6)
