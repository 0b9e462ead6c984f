"""What the ranks of one prefill worker tell one another before each step.

One rank leads: it has the requests, the blocks and the sampler. The others follow. Before a step
all ranks exchange a ``Row`` of one width, and where the leader's row says so its ``Orders`` come
after it. Now and then the leader's row also asks for ``LinkNews``. So every rank makes the same
collective calls whatever it has to say, and a follower has only to do what it is told, in order.
How rows travel and what a step computes is unknown here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

import msgspec

from protocol.codec import Decoder, encode
from protocol.errors import ProtocolError
from protocol.ids import AttemptRef, BlockId
from protocol.kv import Grant
from protocol.workers import LinkReport

ROW_VERSION: Final = 2
REPORTS_PER_ROW: Final = 16  # further ones come with the next row
ROW_WIDTH: Final = 4 + 2 * REPORTS_PER_ROW
LINK_WORDS: Final = 256  # of each rank, when the leader asks
_WORD_BYTES: Final = 8


class Say(IntEnum):
    """``LEAVING``: the leader has ended its last request, and the group ends; a follower has been
    told to drain, and asks the leader to.
    """

    SERVING = 0
    LEAVING = 1


class PushOutcome(IntEnum):
    """Of a follower's share of a push. ``FAILED`` may be told before it has ended."""

    ENDED = 0
    FAILED = 1


class PushReport(msgspec.Struct, frozen=True):
    """``push`` counts from 0 in a group's life, in the order in which pushes were opened."""

    push: int
    outcome: PushOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``order_words`` is the leader's, the length of the orders that follow, and before them come
    all ranks' link news where it says ``ask_links``. ``reports`` are a follower's, at most
    ``REPORTS_PER_ROW``.
    """

    say: Say = Say.SERVING
    order_words: int = 0
    ask_links: bool = False
    reports: tuple[PushReport, ...] = ()

    def to_ints(self) -> list[int]:
        assert len(self.reports) <= REPORTS_PER_ROW
        told = [number for report in self.reports for number in (report.push, int(report.outcome))]
        row = [int(self.say), self.order_words, int(self.ask_links), len(self.reports), *told]
        return row + [0] * (ROW_WIDTH - len(row))

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> "Row":
        """
        Raises:
            ProtocolError: these numbers are no row.
        """
        say, words, ask_links, count, *told = row
        try:
            if len(row) != ROW_WIDTH or words < 0 or not 0 <= count <= REPORTS_PER_ROW:
                raise ValueError
            if ask_links not in (0, 1):
                raise ValueError
            reports = tuple(
                PushReport(told[2 * which], PushOutcome(told[2 * which + 1]))
                for which in range(count)
            )
            return cls(say=Say(say), order_words=words, ask_links=bool(ask_links), reports=reports)
        except ValueError:
            raise ProtocolError(f"not a row of a prefill rank: {list(row[:8])}") from None


class EndPush(msgspec.Struct, frozen=True):
    """``abort`` is why nothing more is to be sent; None: all has been computed."""

    push: int
    abort: str | None


class Part(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a rank has to know of one chunk of a prompt: tokens that continue the ``start`` cached.

    ``blocks`` has a block for every block of tokens so far, and those from ``first_block`` on are
    final with this step and are to be pushed.
    """

    ref: AttemptRef
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[BlockId, ...]
    first_block: int
    final: bool  # its last token's logits are wanted
    scored: bool  # and those of all its tokens

    @property
    def final_blocks(self) -> tuple[BlockId, ...]:
        return self.blocks[self.first_block :]

    @property
    def num_rows(self) -> int:
        """Tokens whose logits are wanted."""
        return len(self.token_ids) if self.scored else int(self.final)


class Orders(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """In this order: open, end, compute while pushing. ``parts`` enter at the first stage."""

    opened: tuple[Grant, ...] = ()
    ended: tuple[EndPush, ...] = ()
    parts: tuple[Part, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.opened or self.ended or self.parts)

    def to_words(self) -> list[int]:
        """As int64, the first of which is the length in bytes."""
        return _words_of(encode(self))

    @classmethod
    def from_words(cls, words: Sequence[int]) -> "Orders":
        """
        Raises:
            ProtocolError: these words are no orders.
        """
        return _ORDERS.decode(_bytes_of(words))


class LinkNews(msgspec.Struct, frozen=True, array_like=True):
    """Some of a follower's links, as they are now. ``ROOM`` is how many bytes they may have."""

    ROOM: ClassVar[int] = (LINK_WORDS - 2) * _WORD_BYTES

    links: tuple[LinkReport, ...] = ()

    def to_words(self) -> list[int]:
        """As those of ``Orders``, but always ``LINK_WORDS`` of them."""
        words = _words_of(encode(self))
        assert len(words) <= LINK_WORDS
        return words + [0] * (LINK_WORDS - len(words))

    @classmethod
    def from_words(cls, words: Sequence[int]) -> "LinkNews":
        """
        Raises:
            ProtocolError: these words are no link news.
        """
        return _NEWS.decode(_bytes_of(words))


_ORDERS: Final = Decoder[Orders](Orders)
_NEWS: Final = Decoder[LinkNews](LinkNews)


def _words_of(body: bytes) -> list[int]:
    padded = body + bytes(-len(body) % _WORD_BYTES)
    return [len(body), *memoryview(padded).cast("q")]


def _bytes_of(words: Sequence[int]) -> bytes:
    length, *body = words
    data = b"".join(word.to_bytes(_WORD_BYTES, "little", signed=True) for word in body)
    if not 0 < length <= len(data):
        raise ProtocolError(f"{length} bytes came in {len(data)}")
    return data[:length]
