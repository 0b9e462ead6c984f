"""What a call of the ledger has decided: events for the role, notices for prefill workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NewType

from kvtransfer.interface import SinkEvent
from protocol.errors import TransferError
from protocol.ids import Generation

ConnectionId = NewType("ConnectionId", int)  # one authenticated connection of one prefill worker
NoticeKind = Literal["opened", "refused", "committed", "cancel", "probed"]
NO_GRANT = Generation(0)  # of notices about no grant


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    connection: ConnectionId
    kind: NoticeKind
    generation: Generation
    error: TransferError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one call has decided, in the order in which it is to be said."""

    events: tuple[SinkEvent, ...] = ()
    notices: tuple[Notice, ...] = ()


NOTHING = Step()


def one_after_another(steps: Sequence[Step]) -> Step:
    """All of them, in order."""
    return Step(
        events=tuple(event for step in steps for event in step.events),
        notices=tuple(notice for step in steps for notice in step.notices),
    )
