"""The seam between expert layers and what carries their rows between ranks.

The layout is rank-major and deduplicated: a token travels once to every rank that holds at least
one of its experts, and what arrives is ordered by source rank, then by token. Payloads are opaque:
a transport knows rows and slots, neither experts' maths nor dtypes. Every rank makes the same
calls in every layer, with zero tokens if it has none, and a rank without tokens still computes.

Shape suffixes: T tokens of this rank   K chosen experts   B rows that arrived   R result rows
J rows that add up to a token   W width
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Tokens that have experts on this rank.

    ``present_BK`` is None where every slot is local. With a count-free exchange there can be rows
    without any local slot; they are carried along and come to nothing.
    """

    payloads: tuple[Tensor, ...]  # (B, W) each, as sent
    slot_BK: Tensor  # local slots; -1: that expert is elsewhere
    present_BK: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """Results back at their tokens' own rank.

    ``place_TJ[t]`` are the rows of token t, in k order when results came back one per expert.
    Where ``present_TJ`` is False there is no such row. ``absent_is_own``: the place then names some
    row of the same token, so multiplying by zero instead of leaving it out harms no other token.
    """

    rows_RW: Tensor
    place_TJ: Tensor
    present_TJ: Tensor | None
    absent_is_own: bool = False


class Dispatch(Protocol):
    """One layer's exchange under way.

    Called once each, in this order: ``ExpertTransport.send``, ``receive``, one of ``return_each``
    and ``return_sums``, ``collect``. Each raises ``WorkerLost`` when a rank is gone; the exchange
    is then dead on every rank.
    """

    @property
    def sent_bytes(self) -> int:
        """To other ranks, up to now."""
        ...

    def receive(self) -> Arrived: ...

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        """Send home one row per (token, expert here); ``place_BK`` says which of ``rows_RW``."""
        ...

    def return_sums(self, rows_BW: Tensor) -> None:
        """Send home one row per arrived row."""
        ...

    def collect(self) -> Returned: ...


class ExpertTransport(Protocol):
    def connect(self) -> None:
        """The ranks have met, for the first time or again; all call it before they exchange rows.

        Raises:
            WorkerLost: a rank is gone again.
        """
        ...

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        """Send each token to the ranks of its slots: rank * slots per rank + local slot, or -1.

        Payloads are (T, W) each. What their rows mean is agreed between sender and receiver.
        """
        ...


class LocalTransport:
    """One rank holds every expert: nothing travels."""

    def connect(self) -> None:
        """There is nobody to connect to."""

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        return _LocalDispatch(payloads, slot_TK)


class OwnSlotsTransport:
    """Every rank has every token and computes only what its own slots hold: nothing travels.

    What comes home is this rank's share; whoever calls adds the ranks' shares up.
    """

    def __init__(self, *, rank: int, slots_per_rank: int) -> None:
        self._first_slot = rank * slots_per_rank
        self._end_slot = self._first_slot + slots_per_rank

    def connect(self) -> None:
        """There is nobody to connect to."""

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        here_TK = (slot_TK >= self._first_slot) & (slot_TK < self._end_slot)
        return _LocalDispatch(payloads, torch.where(here_TK, slot_TK - self._first_slot, -1))


class _LocalDispatch:
    sent_bytes = 0

    def __init__(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> None:
        present_TK = slot_TK >= 0
        self._arrived = Arrived(
            payloads=tuple(payloads),
            slot_BK=slot_TK,
            present_BK=None if bool(present_TK.all()) else present_TK,  # host sync
        )
        self._returned: Returned | None = None

    def receive(self) -> Arrived:
        return self._arrived

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        present_BK = self._arrived.present_BK
        self._returned = Returned(rows_RW=rows_RW, place_TJ=place_BK, present_TJ=present_BK)

    def return_sums(self, rows_BW: Tensor) -> None:
        place_B = torch.arange(rows_BW.shape[0], device=rows_BW.device)
        self._returned = Returned(rows_RW=rows_BW, place_TJ=place_B.unsqueeze(1), present_TJ=None)

    def collect(self) -> Returned:
        assert self._returned is not None
        return self._returned
