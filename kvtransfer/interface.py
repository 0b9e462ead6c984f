"""The seam between the roles and the transports: pushes on the prefill side, a sink on the other.

Bytes flow one way, prefill to decode. A grant's chunks, its finish and its abort travel on one
ordered connection per pair of workers, so nothing can overtake anything. A transport says with
``fence`` whether the receiver can refuse late bytes: ``receiver_checked`` (tcp: it copies each
frame itself) or ``one_sided`` (shm: the sender writes into the granted pages). Both run the same
state machine; what differs is when a page of an aborted grant is proven quiet. A timeout is
never proof.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from protocol.errors import TransferError
from protocol.ids import AttemptRef, BlockId, Generation, WorkerRef
from protocol.kv import Grant, KVEndpoint, KVLayout
from protocol.workers import LinkReport

Fence = Literal["receiver_checked", "one_sided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVMemory:
    """One rank's KV blocks as plain memory, layer-major (``protocol.kv``).

    ``layout`` is of what it holds: the model's layers from ``first_layer`` on. ``address`` is valid
    while ``owner`` lives. ``share`` is a file descriptor that another process on this host can map
    to reach the same bytes, or None where there is none. ``device`` is the number of the GPU that
    the memory is on, or None.
    """

    layout: KVLayout
    num_blocks: int
    address: int
    owner: object
    share: int | None = None
    device: int | None = None
    first_layer: int = 0

    @property
    def layers(self) -> range:
        """Those that it holds, numbered as in the model."""
        return range(self.first_layer, self.first_layer + self.layout.num_layers)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """Every block of the grant has arrived, each chunk has matched its checksum, and prefill has
    said that it is done.
    """

    ref: AttemptRef
    generation: Generation
    payload: bytes  # what prefill gave to ``Push.finish``
    bytes_received: int
    on_device: bool = False  # the bytes are in the GPU's memory, not in the host's


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """The grant cannot complete. Its pages stay quarantined until ``Quiet`` for the same grant."""

    ref: AttemptRef
    generation: Generation
    error: TransferError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """Proof that no byte can be written for this grant any more: its pages may be reused."""

    ref: AttemptRef
    generation: Generation


SinkEvent = Committed | TransferFailed | Quiet


class KVSink(Protocol):
    """The decode side of all transports of one rank."""

    @property
    def endpoint(self) -> KVEndpoint: ...

    def expect(self, grant: Grant) -> None:
        """Accept chunks for ``grant`` from now on. Thread-safe, returns at once.

        Raises:
            ValueError: the grant is not this rank's or names blocks that it cannot name.
        """
        ...

    def abort(self, grant: Grant) -> None:
        """Accept nothing more for ``grant``. Thread-safe, returns at once.

        ``Quiet`` follows once, when it is proven, maybe from within this call; also where the
        grant has committed meanwhile. No ``Quiet`` follows where one has been reported before.
        """
        ...

    def close(self) -> None: ...


class Push(Protocol):
    """One grant being filled. Calls come from one thread, the prefill worker's engine thread."""

    def send(self, layers: range, first_block: int, source_blocks: Sequence[BlockId]) -> None:
        """Queue the given layers of grant blocks ``first_block ...``; returns at once.

        ``source_blocks`` must stay unchanged until ``finish`` or ``abort`` has completed, which
        one of them must be called for every push, also after an error.

        Raises:
            TransferError: the connection is down or the peer has aborted the grant.
            ValueError: layers or blocks out of range.
        """
        ...

    def finish(self, payload: bytes, on_done: Callable[[TransferError | None], None]) -> None:
        """Queue the end. ``on_done`` is called once, from a transport thread, when the source
        blocks are no longer read: with None when the peer has committed.
        """
        ...

    def abort(self, reason: str, on_done: Callable[[], None]) -> None:
        """Send nothing more and tell the peer. ``on_done``: the source blocks are free."""
        ...


class KVSource(Protocol):
    """The prefill side: opens a push over the best transport that both ends have."""

    def open(self, grant: Grant) -> Push:
        """Returns at once: what goes wrong with connecting shows at the push.

        Raises:
            LayoutMismatch: the two ends' layouts differ.
            TransferError: the two ends have no transport in common.
        """
        ...

    def links(self) -> tuple[LinkReport, ...]:
        """Of every decode rank that has been reached. Thread-safe."""
        ...

    def close(self) -> None: ...


OnSinkEvent = Callable[[SinkEvent], None]
"""Called one at a time, from transport threads and from within ``abort``; must not block."""

MakeSink = Callable[[KVMemory, WorkerRef, OnSinkEvent], KVSink]
