"""Which blocks of a pool are free, as runs of consecutive ids, so that requests get runs.

A KV transfer merges consecutive blocks into one copy. Runs never touch: two free neighbours are
always one run. This module does not know who holds the other blocks, or why.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from protocol.ids import BlockId


class FreeRuns:
    """All of ``num_blocks`` are free at first. ``len`` counts blocks, not runs."""

    def __init__(self, num_blocks: int) -> None:
        self._count = 0
        self._length_at: dict[int, int] = {}
        self._start_ending_at: dict[int, int] = {}  # key: one past the run's last block
        self._by_length: list[tuple[int, int]] = []  # (length, start), ascending
        self._add(0, num_blocks)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[BlockId]:
        for start, length in self._length_at.items():
            for block in range(start, start + length):
                yield BlockId(block)

    def take(self, count: int) -> list[BlockId]:
        """Remove ``count`` blocks, at most ``len(self)``, in as few runs as best fit finds.

        The shortest run that suffices is cut; so single blocks fill holes and long runs last.
        """
        assert count <= self._count, f"{count} blocks wanted, {self._count} free"
        taken: list[BlockId] = []
        while count:
            index = bisect_left(self._by_length, (count, -1))
            if index == len(self._by_length):
                index -= 1  # no run suffices: use up the longest
            length, start = self._by_length[index]
            used = min(length, count)
            self._remove(start)
            if used < length:
                self._add(start + used, length - used)
            taken += [BlockId(block) for block in range(start, start + used)]
            count -= used
        return taken

    def give(self, block: BlockId) -> None:
        """Add one block, which must not be free."""
        start, length = int(block), 1
        before = self._start_ending_at.get(block)
        if before is not None:
            start, length = before, length + self._remove(before)
        if block + 1 in self._length_at:
            length += self._remove(block + 1)
        self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_ending_at[start + length] = start
        insort(self._by_length, (length, start))
        self._count += length

    def _remove(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_ending_at[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self._count -= length
        return length
