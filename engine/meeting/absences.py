"""Which ranks one attempt to meet has found gone, and when it is worth looking for them again.

A rank whose port refuses, or that is busy and receives nobody, costs nothing to look for, and is
looked for again at once; a frozen one costs as long as a silence may last. So a look waits for
twice as long as the last one took. Pure: who looks, and how, is unknown here.
"""

from collections.abc import Iterator

LEAST_S = 0.5
TIMES = 2


class Absences:
    """Iterating gives the ranks that are gone, ``in`` tells whether one is."""

    def __init__(self) -> None:
        self._again_at: dict[int, float] = {}

    def __contains__(self, rank: object) -> bool:
        return rank in self._again_at

    def __iter__(self) -> Iterator[int]:
        return iter(self._again_at)

    def __len__(self) -> int:
        return len(self._again_at)

    def missed(self, rank: int, *, now: float, took_s: float) -> None:
        """``rank`` is gone; it took so long to find out."""
        self._again_at[rank] = now + max(LEAST_S, TIMES * took_s)

    def found(self, rank: int) -> None:
        self._again_at.pop(rank, None)

    def lately(self, rank: int, *, now: float) -> bool:
        """It is gone, and looking again is not worth it yet."""
        again_at = self._again_at.get(rank)
        return again_at is not None and now < again_at
