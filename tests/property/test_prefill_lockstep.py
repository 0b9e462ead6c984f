"""What prefill ranks tell one another survives the way as numbers, and nothing else is let in."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.lockstep import (
    REPORTS_PER_ROW,
    ROW_WIDTH,
    EndPush,
    Orders,
    Part,
    PushOutcome,
    PushReport,
    Row,
    Say,
)
from protocol.errors import ProtocolError
from protocol.ids import (
    AttemptRef,
    BlockId,
    Generation,
    Incarnation,
    RequestId,
    WorkerId,
    WorkerRef,
)
from protocol.kv import Grant, KVEndpoint

counts = st.integers(0, 2**40)
blocks = st.lists(st.integers(0, 2**31).map(BlockId), max_size=40).map(tuple)
refs = st.builds(AttemptRef, st.text(max_size=20).map(RequestId), st.integers(0, 99))
reports = st.builds(PushReport, counts, st.sampled_from(PushOutcome))
rows = st.builds(
    Row,
    say=st.sampled_from(Say),
    order_words=counts,
    ask_links=st.booleans(),
    reports=st.lists(reports, max_size=REPORTS_PER_ROW).map(tuple),
)
parts = st.builds(
    Part,
    ref=refs,
    start=counts,
    token_ids=st.lists(st.integers(0, 2**20), max_size=80).map(tuple),
    blocks=blocks,
    first_block=st.integers(0, 40),
    final=st.booleans(),
    scored=st.booleans(),
)
grants = st.builds(
    Grant,
    ref=refs,
    decode=st.builds(
        WorkerRef, st.text(max_size=9).map(WorkerId), st.integers(0, 2**31).map(Incarnation)
    ),
    generation=counts.map(Generation),
    block_ids=blocks,
    layout_digest=st.text(max_size=16),
    endpoint=st.builds(
        KVEndpoint,
        host_id=st.text(max_size=9),
        num_blocks=counts,
        addresses=st.dictionaries(st.text(max_size=4), st.text(max_size=20), max_size=3),
    ),
    lease_s=st.floats(0, 1e6),
)
ends = st.builds(EndPush, push=counts, abort=st.none() | st.text(max_size=30))


def lists(of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(of, max_size=4).map(tuple)


orders = st.builds(Orders, opened=lists(grants), ended=lists(ends), parts=lists(parts))


@given(rows)
def test_a_row_has_one_width_and_comes_back_from_its_numbers(row: Row) -> None:
    numbers = row.to_ints()
    assert len(numbers) == ROW_WIDTH
    assert Row.from_ints(numbers) == row


@given(orders)
def test_orders_come_back_from_64_bit_words(told: Orders) -> None:
    words = told.to_words()
    assert all(-(2**63) <= word < 2**63 for word in words)
    assert Orders.from_words(words) == told


@given(orders, st.data())
def test_damaged_orders_are_refused_or_are_orders(told: Orders, data: st.DataObject) -> None:
    words = told.to_words()
    where = data.draw(st.integers(0, len(words) - 1))
    words[where] = data.draw(st.integers(-(2**63), 2**63 - 1))
    with contextlib.suppress(ProtocolError):
        assert isinstance(Orders.from_words(words), Orders)


@given(st.lists(st.integers(-3, 40), min_size=ROW_WIDTH, max_size=ROW_WIDTH))
def test_numbers_that_are_no_row_are_refused(numbers: list[int]) -> None:
    say, words, ask_links, count, *_ = numbers
    outcomes = numbers[5::2][: max(count, 0)]
    fine = (
        say in (0, 1)
        and words >= 0
        and ask_links in (0, 1)
        and 0 <= count <= REPORTS_PER_ROW
        and all(outcome in (0, 1) for outcome in outcomes)
    )
    if fine:
        assert Row.from_ints(numbers).order_words == words
    else:
        with pytest.raises(ProtocolError):
            Row.from_ints(numbers)


def test_orders_without_content_are_not_sent() -> None:
    assert not Orders()
