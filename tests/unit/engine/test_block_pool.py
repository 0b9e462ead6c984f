import pytest

from engine.kvcache.block_pool import BlockPool
from protocol.errors import Overloaded


def test_blocks_are_handed_out_as_a_run_where_there_is_one() -> None:
    pool = BlockPool(16)
    hole = pool.allocate(3)
    rest = pool.allocate(4)
    pool.release(hole)
    assert pool.allocate(5) == [7, 8, 9, 10, 11], "the hole of three would have split it"
    assert pool.allocate(2) == [0, 1], "the shortest run that suffices"
    assert rest == [3, 4, 5, 6]


def test_too_many_blocks_are_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(Overloaded, match="2 KV blocks wanted, 1 available"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check()


def test_the_least_recently_used_cached_block_is_evicted_first_and_told() -> None:
    pool = BlockPool(4)
    evicted: list[int] = []
    pool.on_evict(evicted.append)
    first, second = pool.allocate(2), pool.allocate(2)
    for block in (*first, *second):
        pool.retain(block)
    pool.release(second)
    pool.release(first)
    pool.share(second)
    pool.release(second)  # used again, so now younger than the others
    pool.allocate(3)
    assert evicted == [first[1], first[0], second[1]], "of one prefix the tail goes first"
    pool.check()


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(4)
    kept = pool.allocate(2)
    pool.retain(kept[0])
    pool.release(kept)
    assert kept[0] not in pool.allocate(3)
    assert pool.num_cached == 1


def test_a_forgotten_cached_block_is_free_at_once() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.retain(block)
    pool.release([block])
    pool.forget(block)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.check()


def test_releasing_twice_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_sharing_a_free_block_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(blocks)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks must be positive, got 0"):
        BlockPool(0)
