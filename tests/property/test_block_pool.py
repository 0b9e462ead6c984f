from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kvcache.block_pool import BlockPool
from protocol.errors import Overloaded
from protocol.ids import BlockId

NUM_BLOCKS = 12


class BlockPoolMachine(RuleBasedStateMachine):
    """Any sequence of calls keeps the books balanced, and evicts in order of last use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.pool.on_evict(self.evict)
        self.owned: list[list[BlockId]] = []
        self.retained: set[BlockId] = set()
        self.cached: list[BlockId] = []  # least recently used first

    def evict(self, block: BlockId) -> None:
        assert self.cached.pop(0) == block, "not the least recently used"
        self.retained.remove(block)

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        owners = self.owners()
        possible = count <= NUM_BLOCKS - len(owners)
        try:
            taken = self.pool.allocate(count)
        except Overloaded:
            assert not possible
            return
        assert possible
        assert len(set(taken)) == count
        assert owners.keys().isdisjoint(taken)
        assert self.retained.isdisjoint(taken)
        self.owned.append(taken)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = list(data.draw(st.sampled_from(self.owned)))
        self.pool.share(blocks)
        self.owned.append(blocks)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.cached))
        self.pool.share([block])
        self.cached.remove(block)
        self.owned.append([block])

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.release(blocks)
        owners = self.owners()
        self.cached += [
            block for block in reversed(blocks) if block in self.retained and not owners[block]
        ]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        for block in data.draw(st.sampled_from(self.owned)):
            self.pool.retain(block)
            self.retained.add(block)

    @rule(block=st.integers(0, NUM_BLOCKS - 1).map(BlockId))
    def forget(self, block: BlockId) -> None:
        self.pool.forget(block)
        self.retained.discard(block)
        if block in self.cached:
            self.cached.remove(block)

    @invariant()
    def the_books_are_those_of_the_model(self) -> None:
        self.pool.check()
        owners = self.owners()
        assert self.pool.num_held == len(owners)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == NUM_BLOCKS - len(owners) - len(self.cached)
        assert all(self.pool.owners(BlockId(at)) == owners[BlockId(at)] for at in range(NUM_BLOCKS))

    def owners(self) -> Counter[BlockId]:
        return Counter(block for blocks in self.owned for block in blocks)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
