"""Writes the plain tokens of a step to their clients' sockets, without Python for each.

A stream comes here when nothing but its tokens' text is to be written any more
(``server.generation.SteadyText``), and leaves with the first token of which that is not true, or
when its socket does not take what is written. Everything else happens to a stream outside.

Invariant: a token is taken here or left to the caller, never both; and per stream in order, because
what follows a record that was left is left as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from struct import Struct

import numpy as np
import numpy.typing as npt

from protocol.plain_tokens import RECORD_BYTES
from server.metrics import Latencies
from server.step_kernel import (
    AROUND_BYTES,
    BEHIND,
    COUNT,
    FRAMING_BYTES,
    LAST_NS,
    LEFT,
    NUMBER,
    ROW_WORDS,
    SLOT_BITS,
    SLOTS,
    TOKENS,
    UNSENT,
    UNSENT_END,
    write_tokens,
)
from server.text.token_texts import TokenTexts

_FIRST_RECORDS = 512  # that there is room for at first
_NS = 1e9
_ROW = Struct("=10q")  # what a stream comes with: in the order of ``server.step_kernel``


@dataclass(frozen=True, slots=True)
class Written:
    """``at`` is when the last of the tokens came, monotonic seconds."""

    token_ids: Sequence[int]
    at: float
    unsent: bytes  # of what they made, that the socket did not take: it must be sent next


class StepWriter:
    """For the streams of one model and one event loop."""

    def __init__(self, texts: TokenTexts, gaps: Latencies) -> None:
        """``gaps`` gets the times between the tokens that are written here."""
        self._texts = texts
        self._longest_text = int(np.diff(texts.starts).max(initial=0))
        self._gaps = (np.array(gaps.bounds), *map(np.asarray, gaps.memory()))
        self._rows: npt.NDArray[np.int64] = np.zeros((SLOTS, ROW_WORDS), np.int64)
        self._around: npt.NDArray[np.uint8] = np.zeros((SLOTS, AROUND_BYTES), np.uint8)
        self._tokens: npt.NDArray[np.int32] = np.zeros((SLOTS, TOKENS), np.int32)
        self._words: npt.NDArray[np.int64] = np.zeros(2, np.int64)
        # The same memory, for single values: an array's own access takes several times as long.
        self._row_values = self._rows.data.cast("B").cast("q")
        self._word_values = self._words.data.cast("B").cast("q")
        self._row_bytes = self._rows.data.cast("B")
        self._around_bytes = self._around.data.cast("B")
        self._token_values = self._tokens.data.cast("B").cast("i")
        self._free = list(reversed(range(SLOTS)))  # a slot that was just in use is in the cache
        self._serials = count(1)
        self._make_room(_FIRST_RECORDS)

    def number(self) -> int:
        """A number for a stream that may come here, never given before; 0 when there are too many.
        Give it back with ``release``.
        """
        return next(self._serials) << SLOT_BITS | self._free.pop() if self._free else 0

    def release(self, stream: int) -> None:
        """The stream has left, and comes no more."""
        self._free.append(stream & (SLOTS - 1))

    def takes(self, around: tuple[bytes, bytes]) -> bool:
        """Whether there is room for what is ``around`` each text of a stream."""
        return len(around[0]) + len(around[1]) <= AROUND_BYTES

    def enter(
        self, stream: int, *, offset: int, descriptor: int, around: tuple[bytes, bytes], at: float
    ) -> None:
        """From now on write the stream's tokens, the one at ``offset`` first, to ``descriptor``,
        each between the bytes ``around`` it, as a chunk of HTTP/1.1. ``at``: when its last came.
        """
        before, after = around
        slot = stream & (SLOTS - 1)
        start = slot * AROUND_BYTES
        joined = before + after
        self._around_bytes[start : start + len(joined)] = joined
        row = (stream, offset, descriptor, len(before), len(after), 0, 0, int(at * _NS), 0, 0)
        _ROW.pack_into(self._row_bytes, slot * ROW_WORDS * 8, *row)

    def leave(self, stream: int) -> Written:
        """Write nothing to the stream any more; what was written since it came."""
        slot = stream & (SLOTS - 1)
        row, first = slot * ROW_WORDS, slot * TOKENS
        values = self._row_values
        unsent, end = values[row + UNSENT], values[row + UNSENT_END]
        values[row + NUMBER] = 0
        return Written(
            self._token_values[first : first + values[row + COUNT]].tolist(),
            values[row + LAST_NS] / _NS,
            self._scratch[unsent:end].tobytes() if end else b"",
        )

    def write(self, records: bytearray) -> tuple[Sequence[int], Sequence[int]]:
        """Write what ``records`` (``protocol.plain_tokens``) make of streams that are here. Which
        records are left to the caller, by place; and which streams' sockets did not take all: these
        must ``leave`` before the next call.
        """
        number = len(records) // RECORD_BYTES
        if number > len(self._told[0]):
            self._make_room(number)
        write_tokens(
            np.frombuffer(records, np.int64),
            self._rows,
            self._around,
            self._tokens,
            self._texts.starts,
            self._texts.block,
            self._scratch,
            *self._gaps,
            self._told,
            self._words,
        )
        left, behind = self._word_values
        return (
            self._told[LEFT, :left].tolist() if left else (),
            self._rows[self._told[BEHIND, :behind], NUMBER].tolist() if behind else (),
        )

    def _make_room(self, records: int) -> None:
        event = AROUND_BYTES + self._longest_text + FRAMING_BYTES
        self._told: npt.NDArray[np.int32] = np.zeros((3, records), np.int32)
        self._scratch: npt.NDArray[np.uint8] = np.empty(records * event, np.uint8)
