"""One request's blocks in token order, and the cache slots of its tokens.

Token ``p`` lives in slot ``blocks[p // block_tokens] * block_tokens + p % block_tokens``. The table
owns nothing: whoever fills it took the blocks from a pool and gives them back.
"""

from collections.abc import Iterable

from protocol.ids import BlockId


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """How many blocks hold ``num_tokens`` tokens."""
    return -(-num_tokens // block_tokens)


class BlockTable:
    """``blocks`` is for reading; it changes in place as the table grows."""

    __slots__ = ("block_tokens", "blocks", "capacity_tokens")

    def __init__(self, block_tokens: int, blocks: Iterable[BlockId] = ()) -> None:
        self.block_tokens = block_tokens
        self.blocks: list[BlockId] = list(blocks)
        self.capacity_tokens = len(self.blocks) * block_tokens

    def append(self, block: BlockId) -> None:
        self.blocks.append(block)
        self.capacity_tokens += self.block_tokens

    def take_all(self) -> list[BlockId]:
        """Empty the table; its blocks, in order, are the caller's to give back."""
        blocks, self.blocks, self.capacity_tokens = self.blocks, [], 0
        return blocks

    def slot(self, position: int) -> int:
        return self.blocks[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )

    def slot_mapping(self, start: int, stop: int) -> list[int]:
        """The slots of tokens ``start ... stop - 1``, which the table must have room for."""
        assert 0 <= start <= stop <= self.capacity_tokens, f"no slots for tokens {start}..{stop}"
        if start == stop:
            return []
        size = self.block_tokens
        first, last = start // size, (stop - 1) // size
        slots = [
            slot
            for block in self.blocks[first : last + 1]
            for slot in range(block * size, (block + 1) * size)
        ]
        return slots[start - first * size : stop - first * size]
