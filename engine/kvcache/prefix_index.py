"""Which cached blocks hold which prompt prefix: SHA-256 chain hashes to block ids.

A block is in the index under at most one hash, and exactly the indexed blocks are retained by
the pool. A hash names a whole prefix (``protocol.prefix``), so equal hashes mean equal contents;
tokens, namespaces and requests are not known here.
"""

from collections.abc import Sequence

from engine.kvcache.block_pool import BlockPool
from protocol.ids import BlockId
from protocol.prefix import HINT_BYTES
from protocol.workers import PrefixEvents


class PrefixIndex:
    """The only index of ``pool``, whose evictions it follows."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._block_of: dict[bytes, BlockId] = {}
        self._hash_of: dict[BlockId, bytes] = {}
        self._stored: dict[bytes, None] = {}  # hints, ordered: a prefix is told head first
        self._removed: dict[bytes, None] = {}
        self._reports = 0
        pool.on_evict(self._drop)

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    def num_matching(self, hashes: Sequence[bytes]) -> int:
        """How many leading hashes ``match`` would find now; takes nothing."""
        for index, name in enumerate(hashes):
            if name not in self._block_of:
                return index
        return len(hashes)

    def match(self, hashes: Sequence[bytes]) -> list[BlockId]:
        """The blocks of the longest known prefix, each with one owner more: the caller's.

        A prompt needs logits, so it must compute at least its last token: pass only the hashes of
        the blocks that end before it.
        """
        blocks = [self._block_of[name] for name in hashes[: self.num_matching(hashes)]]
        self._pool.share(blocks)
        return blocks

    def insert(self, hashes: Sequence[bytes], blocks: Sequence[BlockId]) -> None:
        """Make full blocks findable; the caller holds them and will not write to them again.

        Where a hash is known already the first block stays the one that is found, and the new
        one becomes free when its owner releases it.
        """
        for name, block in zip(hashes, blocks, strict=True):
            if name in self._block_of or block in self._hash_of:
                continue
            self._pool.retain(block)
            self._block_of[name] = block
            self._hash_of[block] = name
            self._note(name, now=self._stored, undone=self._removed)

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """Make blocks unfindable, whoever holds them; for contents that turned out to be bad."""
        for block in blocks:
            if block in self._hash_of:
                self._pool.forget(block)
                self._drop(block)

    def forget_all(self) -> None:
        self.forget(list(self._hash_of))

    def take_events(self, *, snapshot: bool = False) -> PrefixEvents | None:
        """Changes since the previous report, or with ``snapshot`` all there is; None if nothing.

        What was stored and evicted again in between is not reported.
        """
        if not snapshot and not self._stored and not self._removed:
            return None
        self._reports += 1
        events = PrefixEvents(
            sequence=self._reports,
            stored=tuple(
                (name[:HINT_BYTES] for name in self._block_of) if snapshot else self._stored
            ),
            removed=() if snapshot else tuple(self._removed),
            snapshot=snapshot,
        )
        self._stored.clear()
        self._removed.clear()
        return events

    def _drop(self, block: BlockId) -> None:
        name = self._hash_of.pop(block)
        del self._block_of[name]
        self._note(name, now=self._removed, undone=self._stored)

    @staticmethod
    def _note(name: bytes, *, now: dict[bytes, None], undone: dict[bytes, None]) -> None:
        hint = name[:HINT_BYTES]
        if hint in undone:
            del undone[hint]
        else:
            now[hint] = None
