from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.prefix_index import PrefixIndex
from protocol.prefix import block_hashes

NUM_BLOCKS = 8
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=NUM_BLOCKS)


@settings(max_examples=100, deadline=None)
@given(requests=st.lists(prompts, max_size=20), report_every=st.integers(1, 5))
def test_hits_hold_the_right_tokens_and_the_feed_mirrors_the_index(
    requests: list[list[int]], report_every: int
) -> None:
    """A block's contents are what its last writer put there; a hit must never see other tokens."""
    pool = BlockPool(NUM_BLOCKS)
    index = PrefixIndex(pool)
    written: dict[int, tuple[int, ...]] = {}
    mirror: set[bytes] = set()
    known: set[bytes] = set()
    for turn, tokens in enumerate(requests):
        hashes = block_hashes(tokens, block_tokens=1, namespace="n", fingerprint="f")
        known.update(hashes)
        hits = index.match(hashes)
        assert [written[block] for block in hits] == [
            tuple(tokens[: end + 1]) for end in range(len(hits))
        ]
        new = pool.allocate(len(tokens) - len(hits))
        for end, block in enumerate(new, start=len(hits)):
            written[block] = tuple(tokens[: end + 1])
        index.insert(hashes[len(hits) :], new)
        pool.release(hits + new)
        pool.check()
        assert pool.num_held == 0
        assert pool.num_cached == len(index)
        if turn % report_every == 0 and (events := index.take_events()) is not None:
            assert mirror.issuperset(events.removed)
            assert mirror.isdisjoint(events.stored)
            mirror = (mirror - set(events.removed)) | set(events.stored)
            assert mirror == {name[:8] for name in known if name in index}
