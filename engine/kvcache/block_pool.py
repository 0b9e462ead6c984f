"""The books of one rank's KV blocks. Pure Python, no tensors: the simulator runs it too.

Every block is in exactly one of three states, so ``free + cached + held == total`` always:
*held* by one or more owners (a shared prefix has several), *cached* (no owner, contents kept for
prefix reuse until the space is needed), or *free*. The pool does not know what is in a block, who
the owners are, or what a cached block is called: ``PrefixIndex`` does.
"""

from collections.abc import Callable, Iterable, Sequence

from engine.kvcache.free_runs import FreeRuns
from protocol.errors import Overloaded
from protocol.ids import BlockId


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        if num_blocks <= 0:
            raise ValueError(f"num_blocks must be positive, got {num_blocks}")
        self._owners = [0] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._cached: dict[BlockId, None] = {}  # least recently used first
        self._retained: set[BlockId] = set()  # held or cached, contents worth keeping
        self._num_held = 0
        self._on_evict: Callable[[BlockId], None] | None = None

    @property
    def num_blocks(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def num_available(self) -> int:
        """What ``allocate`` could hand out now: free blocks, and cached ones by eviction."""
        return len(self._free) + len(self._cached)

    def owners(self, block: BlockId) -> int:
        return self._owners[block]

    def on_evict(self, callback: Callable[[BlockId], None]) -> None:
        """Have ``callback`` told of each cached block that ``allocate`` takes for other use."""
        assert self._on_evict is None, "one prefix index per pool"
        self._on_evict = callback

    def allocate(self, count: int) -> list[BlockId]:
        """Take ``count`` blocks with one owner each, all or none, in runs where there are runs.

        Free blocks go first, then cached ones, the least recently used first.

        Raises:
            Overloaded: fewer than ``count`` blocks are available; nothing was taken.
        """
        if count > self.num_available:
            raise Overloaded(
                f"{count} KV blocks wanted, {self.num_available} available",
                wanted=count,
                available=self.num_available,
            )
        for _ in range(count - len(self._free)):
            self._evict_oldest()
        taken = self._free.take(count)
        for block in taken:
            self._owners[block] = 1
        self._num_held += count
        return taken

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Add an owner to each block; all must be held or cached."""
        for block in blocks:
            if self._owners[block] == 0:
                assert block in self._cached, f"block {block} is free"
                del self._cached[block]
                self._num_held += 1
            self._owners[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drop one owner of each block. Without owners a retained block is cached, others free.

        Of blocks cached by one call the last is evicted first: without its head, the tail of a
        prefix is useless.
        """
        for block in reversed(blocks):
            assert self._owners[block] > 0, f"block {block} released twice"
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._num_held -= 1
                if block in self._retained:
                    self._cached[block] = None
                else:
                    self._free.give(block)

    def retain(self, block: BlockId) -> None:
        """Keep the contents of a held block when its last owner has released it."""
        assert self._owners[block] > 0, f"block {block} is not held"
        self._retained.add(block)

    def forget(self, block: BlockId) -> None:
        """Undo ``retain``; a cached block becomes free at once."""
        self._retained.discard(block)
        if block in self._cached:
            del self._cached[block]
            self._free.give(block)

    def check(self) -> None:
        """Recount every block and assert that the books balance. Costs O(``num_blocks``)."""
        free = set(self._free)
        held = sum(owners > 0 for owners in self._owners)
        assert held == self._num_held, f"{held} blocks have owners, {self._num_held} booked"
        assert len(free) == self.num_free, "a free block is listed twice"
        assert free.isdisjoint(self._cached), "a block is free and cached"
        assert not any(self._owners[block] for block in (*free, *self._cached)), "owned, not held"
        assert self._retained.issuperset(self._cached), "a cached block is not retained"
        assert self._retained.isdisjoint(free), "a free block is retained"
        total = self.num_free + self.num_cached + self.num_held
        assert total == self.num_blocks, f"free + cached + held is {total}, not {self.num_blocks}"

    def _evict_oldest(self) -> None:
        block = next(iter(self._cached))
        self.forget(block)
        if self._on_evict is not None:
            self._on_evict(block)
