"""Only the memory of one's own life is mapped, and only as it was made."""

import os
from dataclasses import replace

import pytest

from engine.one_host.segment import Life, Offer, Segment, create, opened
from engine.one_host.whereabouts import here

LIFE = Life(epoch=3, number=2**61 + 5, size=3)


def test_the_memory_of_this_life_is_mapped() -> None:
    descriptor = create(LIFE)
    offer = Offer(pid=os.getpid(), descriptor=descriptor)
    first, second = opened(offer, LIFE, here()), opened(offer, LIFE, here())
    os.close(descriptor)
    assert first.address != second.address
    assert first.life == LIFE


@pytest.mark.parametrize("other", [replace(LIFE, epoch=4), replace(LIFE, number=7)])
def test_the_memory_of_another_life_is_not(other: Life) -> None:
    with pytest.raises(OSError, match="another group's"):
        Segment(other, create(LIFE))


def test_memory_for_other_members_is_not() -> None:
    with pytest.raises(OSError, match="not of the size"):
        Segment(replace(LIFE, size=4), create(LIFE))


def test_memory_that_could_shrink_is_not() -> None:
    descriptor = os.memfd_create("unsealed")
    os.ftruncate(descriptor, LIFE.num_bytes)
    os.pwrite(descriptor, LIFE.header(), 0)
    with pytest.raises(OSError, match="sealed"):
        Segment(LIFE, descriptor)


def test_an_offer_of_another_process_is_not_followed() -> None:
    with pytest.raises(OSError, match="another process"):
        opened(Offer(pid=os.getpid() + 1, descriptor=0), LIFE, here())


def test_a_first_rank_without_memory_says_why() -> None:
    with pytest.raises(OSError, match="none left"):
        opened(Offer(pid=os.getpid(), descriptor=0, failure="none left"), LIFE, here())


@pytest.mark.parametrize("size", [2, 3, 8, 72, 512])
def test_rings_are_large_enough_and_take_some_megabytes_of_a_rank(size: int) -> None:
    life = replace(LIFE, size=size)
    assert life.ring_bytes >= 16 << 10
    assert size * life.ring_bytes <= 8 << 20
    assert life.ring_bytes & (life.ring_bytes - 1) == 0
