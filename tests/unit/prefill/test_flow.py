"""Steps pass the stages in order, one tick each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.flow import Flow

Step = tuple[int, ...]


def test_with_one_stage_a_step_leaves_in_the_tick_in_which_it_enters() -> None:
    flow: Flow[Step] = Flow(1)
    flow.enter((1,))
    assert flow.at(0) == (1,)
    assert flow.leave() == (1,)
    assert not flow.busy


@given(
    steps=st.lists(st.sampled_from([(), (1,), (2, 3)]), max_size=12),
    num_stages=st.integers(1, 5),
)
def test_every_stage_sees_every_step_once_and_a_tick_after_the_one_before(
    steps: list[Step], num_stages: int
) -> None:
    flow: Flow[Step] = Flow(num_stages)
    seen: list[list[Step]] = [[] for _ in range(num_stages)]
    left: list[Step | None] = []
    for step in [*steps, *[()] * num_stages]:
        flow.enter(step)
        for stage, of_stage in enumerate(seen):
            at = flow.at(stage)
            if at is not None:
                of_stage.append(at)
        left.append(flow.leave())
    late = num_stages - 1
    assert left[:late] == [None] * late
    assert left[late : late + len(steps)] == steps
    for stage, of_stage in enumerate(seen):
        assert of_stage[: len(steps)] == steps, stage
    assert not flow.busy


def test_what_is_on_its_way_is_taken_oldest_first() -> None:
    flow: Flow[Step] = Flow(3)
    for step in ((1,), ()):
        flow.enter(step)
        assert flow.leave() is None
    assert flow.busy
    assert flow.take_all() == ((1,), ())
    flow.enter((4,))
    assert (flow.at(0), flow.at(1)) == ((4,), None)


def test_a_step_does_not_enter_before_the_last_one_has_left() -> None:
    flow: Flow[Step] = Flow(1)
    flow.enter((1,))
    with pytest.raises(AssertionError):
        flow.enter((2,))
