"""Where the KV of preempted requests waits, bit for bit, until blocks are free again."""

from collections.abc import Sequence

from torch import Tensor

from engine.kvcache.storage import KVStorage
from protocol.ids import AttemptRef, BlockId


class SwapSpace:
    """Bounded by the requests that the rank admitted: each waits here once at most."""

    def __init__(self, storage: KVStorage) -> None:
        self._storage = storage
        self._contents: dict[AttemptRef, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(contents.nbytes for contents in self._contents.values())

    def put(self, ref: AttemptRef, block_ids: Sequence[BlockId]) -> None:
        """Copy the blocks out. They may be reused as soon as this returns."""
        self._contents[ref] = self._storage.read_blocks(block_ids)

    def take(self, ref: AttemptRef, block_ids: Sequence[BlockId]) -> None:
        """Copy the contents back into as many blocks, which may be other ones than before."""
        self._storage.write_blocks(block_ids, self._contents.pop(ref))

    def discard(self, ref: AttemptRef) -> None:
        self._contents.pop(ref, None)
