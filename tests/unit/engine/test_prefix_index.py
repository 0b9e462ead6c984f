from engine.kvcache.block_pool import BlockPool
from engine.kvcache.prefix_index import PrefixIndex
from protocol.ids import BlockId
from protocol.prefix import block_hashes


def an_index(num_blocks: int = 8) -> tuple[BlockPool, PrefixIndex]:
    pool = BlockPool(num_blocks)
    return pool, PrefixIndex(pool)


def names(*tokens: int) -> list[bytes]:
    return block_hashes(tokens, block_tokens=1, namespace="n", fingerprint="f")


def store(pool: BlockPool, index: PrefixIndex, *tokens: int) -> list[BlockId]:
    blocks = pool.allocate(len(tokens))
    index.insert(names(*tokens), blocks)
    pool.release(blocks)
    return blocks


def test_the_longest_known_prefix_matches_and_is_owned() -> None:
    pool, index = an_index()
    blocks = store(pool, index, 1, 2, 3)
    assert index.num_matching(names(1, 2, 9)) == 2
    assert pool.num_cached == 3, "counting takes nothing"
    assert index.match(names(1, 2, 9)) == blocks[:2]
    assert [pool.owners(block) for block in blocks] == [1, 1, 0]


def test_the_same_tokens_after_another_prefix_do_not_match() -> None:
    pool, index = an_index()
    store(pool, index, 1, 2)
    assert index.match(names(9, 2)) == []


def test_a_duplicate_is_not_found_and_becomes_free() -> None:
    pool, index = an_index()
    first = store(pool, index, 1)
    again = pool.allocate(1)
    index.insert(names(1), again)
    pool.release(again)
    assert index.match(names(1)) == first
    assert pool.num_cached == 0
    assert pool.num_free == 7


def test_an_evicted_block_is_not_found() -> None:
    pool, index = an_index(num_blocks=3)
    store(pool, index, 1, 2, 3)
    pool.allocate(1)
    assert index.num_matching(names(1, 2, 3)) == 2
    assert len(index) == 2


def test_a_matched_block_is_not_evicted() -> None:
    pool, index = an_index(num_blocks=2)
    store(pool, index, 1, 2)
    index.match(names(1))
    pool.allocate(1)
    assert pool.num_available == 0
    assert index.num_matching(names(1, 2)) == 1


def test_events_tell_net_changes_as_hints() -> None:
    pool, index = an_index(num_blocks=2)
    assert index.take_events() is None
    store(pool, index, 1, 2)
    events = index.take_events()
    assert events is not None
    assert (events.sequence, events.snapshot) == (1, False)
    assert events.stored == tuple(name[:8] for name in names(1, 2))
    pool.release(pool.allocate(1))  # evicts the tail
    store(pool, index, 7)
    pool.release(pool.allocate(2))  # evicts 7, which was never told, and 1
    events = index.take_events()
    assert events is not None
    assert (events.sequence, events.stored) == (2, ())
    assert set(events.removed) == {name[:8] for name in names(1, 2)}
    assert index.take_events() is None


def test_a_block_that_comes_back_between_reports_is_not_told() -> None:
    pool, index = an_index(num_blocks=1)
    store(pool, index, 1)
    index.take_events()
    pool.release(pool.allocate(1))
    store(pool, index, 1)
    assert index.take_events() is None


def test_a_snapshot_tells_everything_and_restarts_the_feed() -> None:
    pool, index = an_index()
    store(pool, index, 1)
    index.take_events()
    store(pool, index, 5)
    events = index.take_events(snapshot=True)
    assert events is not None
    assert (events.sequence, events.snapshot) == (2, True)
    assert set(events.stored) == {names(1)[0][:8], names(5)[0][:8]}
    assert index.take_events() is None


def test_forgotten_blocks_are_not_found_even_while_held() -> None:
    pool, index = an_index()
    blocks = pool.allocate(2)
    index.insert(names(1, 2), blocks)
    index.forget(blocks)
    assert index.num_matching(names(1, 2)) == 0
    pool.release(blocks)
    assert pool.num_free == 8
    pool.check()
