"""What the engine asks of a push, and what its channel keeps of it while it is on its way."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvtransfer.plan import Chunk
from protocol.errors import TransferError
from protocol.ids import BlockId
from protocol.kv import Grant

OnFinished = Callable[[TransferError | None], None]


@dataclass(frozen=True, slots=True)
class Send:
    chunk: Chunk
    source_blocks: tuple[BlockId, ...]
    ready: object = None  # the engine's event behind which the blocks are final, on a GPU


@dataclass(frozen=True, slots=True)
class Finish:
    payload: bytes
    on_done: OnFinished


@dataclass(frozen=True, slots=True)
class Abort:
    reason: str
    on_done: Callable[[], None]


Command = Send | Finish | Abort


@dataclass(slots=True, eq=False)
class Pushing:
    """One grant on its way. Only ``error`` is read by other threads than the channel's."""

    grant: Grant
    state: Literal["opening", "open", "finishing", "ended"] = "opening"
    error: TransferError | None = None
    deadline: float = float("inf")
    backlog: deque[Command] = field(default_factory=deque)
    send: Send | None = None  # the one under way, of which these pieces are left
    pieces: deque[Chunk] = field(default_factory=deque)
    on_finished: OnFinished | None = None


def answer(command: Command, error: TransferError | None) -> None:
    """End a command that will not be carried out any more."""
    if isinstance(command, Finish):
        command.on_done(error)
    elif isinstance(command, Abort):
        command.on_done()
