"""The receiving side's record of grants: who may write which pages, and when nobody can any more.

    EXPECTED ── bind ──► OPEN ── last piece and finish ──► COMMITTED
        │                  │
        └──── abort ───────┴──► QUARANTINED ── proof ──► QUIET

Pure, single-owner and without a clock: every call returns what to tell the role (``events``) and
the prefill workers (``notices``). A grant ends exactly once; afterwards its generation is a
tombstone, and whatever still arrives for it is counted and never acts. A quarantined grant
becomes quiet by proof only: a receiver that has stopped copying, a source that has drained, or
a connection whose other end is gone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NewType

from kvtransfer.interface import Committed, Fence, Quiet, SinkEvent, TransferFailed
from kvtransfer.plan import Chunk, check_blocks
from protocol.errors import TransferCorrupt, TransferError
from protocol.ids import AttemptRef, BlockId, Generation, WorkerRef
from protocol.kv import Grant, KVLayout

ConnectionId = NewType("ConnectionId", int)  # one authenticated connection of one prefill worker
NoticeKind = Literal["opened", "refused", "committed", "cancel", "probed"]
NO_GRANT = Generation(0)  # of notices about no grant

MAX_TOMBSTONES = 4096


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


@dataclass(slots=True, kw_only=True)
class _Entry:
    grant: Grant
    arrived: bytearray  # (layers x blocks), 1 where the piece has arrived and matched
    missing: int
    connection: ConnectionId | None = None
    fence: Fence = "receiver_checked"
    on_device: bool = False
    quarantined: bool = False
    copying: bool = False  # the receiver is writing a chunk into the pages
    num_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class LedgerCounts:
    """Totals since the start. ``stale`` is the late, ``unknown`` the never granted; both were
    dropped. ``refused`` grants were known, but not to be opened that way.
    """

    committed: int = 0
    failed: int = 0
    aborted: int = 0
    corrupt: int = 0
    chunks: int = 0
    duplicate_chunks: int = 0
    stale: int = 0
    unknown: int = 0
    refused: int = 0
    bytes_committed: int = 0


class GrantLedger:
    """The grants of one decode incarnation. Not thread-safe: its owner brings the lock."""

    def __init__(
        self,
        *,
        worker: WorkerRef,
        layout: KVLayout,
        num_blocks: int,
        max_tombstones: int = MAX_TOMBSTONES,
    ) -> None:
        self._worker = worker
        self._layout = layout
        self._num_blocks = num_blocks
        self._max_tombstones = max_tombstones
        self._live: dict[Generation, _Entry] = {}
        self._ended: OrderedDict[Generation, Literal["committed", "quiet"]] = OrderedDict()
        self.counts = LedgerCounts()

    @property
    def num_live(self) -> int:
        """Grants that are expected, open or quarantined."""
        return len(self._live)

    @property
    def num_open(self) -> int:
        """Live grants that a prefill worker has opened."""
        return sum(entry.connection is not None for entry in self._live.values())

    @property
    def num_quarantined_blocks(self) -> int:
        return sum(len(e.grant.block_ids) for e in self._live.values() if e.quarantined)

    def expect(self, grant: Grant) -> None:
        """From now on ``grant`` may be opened; does nothing where it was aborted before.

        Raises:
            ValueError: the grant is not this rank's, is known already, or names blocks that it
                cannot name. The decode role made it, so this is a bug there.
        """
        if grant.decode != self._worker:
            raise ValueError(f"a grant of {grant.decode} came to {self._worker}")
        if grant.layout_digest != self._layout.digest():
            raise ValueError("the grant's layout is not this rank's")
        if len(set(grant.block_ids)) != len(grant.block_ids):
            raise ValueError("the grant names a block twice")
        check_blocks(grant.block_ids, self._num_blocks, side="granted")
        if grant.generation in self._live:
            raise ValueError(f"generation {grant.generation} is expected already")
        if grant.generation in self._ended:
            return
        pieces = self._layout.num_layers * len(grant.block_ids)
        self._live[grant.generation] = _Entry(
            grant=grant, arrived=bytearray(pieces), missing=pieces
        )

    def abort(self, grant: Grant) -> Step:
        """The role gives the grant up. Exactly one ``Quiet`` follows every first abort, now or
        with the proof; also for a grant that has committed meanwhile or was never expected.
        """
        entry = self._live.get(grant.generation)
        if entry is None:
            return self._abort_ended(grant)
        if entry.quarantined:
            return NOTHING  # its Quiet is on the way
        self.counts.aborted += 1
        return self._quarantine(entry, TransferError("the decode rank has aborted the grant"))

    def bind(
        self,
        generation: Generation,
        ref: AttemptRef,
        *,
        connection: ConnectionId,
        fence: Fence,
        on_device: bool = False,
    ) -> Step:
        """A prefill worker asks to fill the grant; the answer is a notice to it."""
        entry = self._live.get(generation)
        if entry is None:
            self._count_late(generation)
            problem = "the grant is not known here, or has ended"
        elif entry.quarantined:
            self.counts.stale += 1
            problem = "the grant has been aborted"
        elif entry.grant.ref != ref:
            self.counts.refused += 1
            problem = "the grant is another request's"
        elif entry.connection is not None:
            self.counts.refused += 1
            problem = "the grant is being filled already"
        else:
            entry.connection, entry.fence, entry.on_device = connection, fence, on_device
            return Step(
                notices=(Notice(connection=connection, kind="opened", generation=generation),)
            )
        notice = Notice(
            connection=connection,
            kind="refused",
            generation=generation,
            error=TransferError(problem),
        )
        return Step(notices=(notice,))

    def begin_chunk(
        self, generation: Generation, chunk: Chunk, *, connection: ConnectionId
    ) -> tuple[tuple[BlockId, ...] | None, Step]:
        """The pages of an arriving chunk, or None where its bytes must not be written or counted.

        With pages the caller answers by ``end_chunk``. A chunk outside its grant, or one that
        overlaps another, fails the grant.
        """
        entry = self._bound(generation, connection)
        if entry is None or entry.quarantined:
            self._count_late(generation)
            return None, NOTHING
        problem = self._outside(entry, chunk)
        if problem is None:
            held = [entry.arrived.count(1, *row) for row in self._rows(entry, chunk)]
            if not any(held):
                entry.copying = True
                end = chunk.first_block + chunk.num_blocks
                return entry.grant.block_ids[chunk.first_block : end], NOTHING
            if sum(held) == chunk.num_layers * chunk.num_blocks:
                self.counts.duplicate_chunks += 1
                return None, NOTHING
            problem = "a chunk overlaps what has arrived before"
        return None, self._fail(entry, TransferError(problem))

    def may_copy(self, generation: Generation) -> bool:
        """Whether the chunk being copied may go on into its pages."""
        entry = self._live.get(generation)
        return entry is not None and not entry.quarantined

    def end_chunk(self, generation: Generation, chunk: Chunk, *, intact: bool) -> Step:
        """The chunk that ``begin_chunk`` admitted is in place, or is known to be damaged."""
        entry = self._live[generation]
        entry.copying = False
        if entry.quarantined:
            return self._quiet(entry) if entry.fence == "receiver_checked" else NOTHING
        if not intact:
            self.counts.corrupt += 1
            return self._fail(entry, TransferCorrupt("KV bytes do not match their checksum"))
        for start, stop in self._rows(entry, chunk):
            entry.arrived[start:stop] = b"\1" * (stop - start)
        pieces = chunk.num_layers * chunk.num_blocks
        self.counts.chunks += 1
        entry.missing -= pieces
        entry.num_bytes += pieces * self._layout.layer_block_bytes
        return NOTHING

    def finish(self, generation: Generation, payload: bytes, *, connection: ConnectionId) -> Step:
        """Prefill has sent everything: commits, or fails where a piece is missing."""
        entry = self._bound(generation, connection)
        if entry is None or entry.quarantined:
            self._count_late(generation)
            return NOTHING
        if entry.missing:
            problem = f"finished with {entry.missing} of {len(entry.arrived)} pieces missing"
            return self._fail(entry, TransferError(problem))
        self._end(entry, "committed")
        self.counts.committed += 1
        self.counts.bytes_committed += entry.num_bytes
        event = Committed(
            ref=entry.grant.ref,
            generation=generation,
            payload=payload,
            bytes_received=entry.num_bytes,
            on_device=entry.on_device,
        )
        notice = Notice(connection=connection, kind="committed", generation=generation)
        return Step(events=(event,), notices=(notice,))

    def source_stopped(
        self, generation: Generation, error: TransferError, *, connection: ConnectionId
    ) -> Step:
        """The source says that it writes nothing more: of its own accord, or asked to."""
        entry = self._bound(generation, connection)
        if entry is None:
            self._count_late(generation)
            return NOTHING
        return self._stop(entry, error)

    @staticmethod
    def probed(connection: ConnectionId) -> Step:
        """Bytes that measure the connection have come, and concern no grant."""
        notice = Notice(connection=connection, kind="probed", generation=NO_GRANT)
        return Step(notices=(notice,))

    def connection_cut(self, connection: ConnectionId, error: TransferError) -> Step:
        """The connection is of no more use, but its other end may still write: what it has open
        fails now and is quiet only when the connection is lost.
        """
        events: list[SinkEvent] = []
        for entry in self._live.values():
            if entry.connection == connection and not entry.quarantined:
                entry.quarantined = True
                self.counts.failed += 1
                events.append(self._failure(entry, error))
        return Step(events=tuple(events))

    def connection_lost(self, connection: ConnectionId, error: TransferError) -> Step:
        """The other end is gone for certain, so nothing it had open can be written any more."""
        events: list[SinkEvent] = []
        for entry in [e for e in self._live.values() if e.connection == connection]:
            entry.copying = False
            events += self._stop(entry, error).events
        return Step(events=tuple(events))

    def _stop(self, entry: _Entry, error: TransferError) -> Step:
        failed: tuple[SinkEvent, ...] = ()
        if not entry.quarantined:
            self.counts.failed += 1
            failed = (self._failure(entry, error),)
        return Step(events=failed + self._quiet(entry).events)

    def _fail(self, entry: _Entry, error: TransferError) -> Step:
        self.counts.failed += 1
        step = self._quarantine(entry, error)
        return Step(events=(self._failure(entry, error), *step.events), notices=step.notices)

    def _quarantine(self, entry: _Entry, error: TransferError) -> Step:
        if entry.connection is None:
            return self._quiet(entry)
        entry.quarantined = True
        notice = Notice(
            connection=entry.connection,
            kind="cancel",
            generation=entry.grant.generation,
            error=error,
        )
        proven = entry.fence == "receiver_checked" and not entry.copying
        return Step(events=self._quiet(entry).events if proven else (), notices=(notice,))

    def _quiet(self, entry: _Entry) -> Step:
        self._end(entry, "quiet")
        return Step(events=(Quiet(ref=entry.grant.ref, generation=entry.grant.generation),))

    def _abort_ended(self, grant: Grant) -> Step:
        if self._ended.get(grant.generation) == "quiet":
            return NOTHING
        self.counts.aborted += 1
        self._bury(grant.generation, "quiet")
        return Step(events=(Quiet(ref=grant.ref, generation=grant.generation),))

    def _end(self, entry: _Entry, how: Literal["committed", "quiet"]) -> None:
        del self._live[entry.grant.generation]
        self._bury(entry.grant.generation, how)

    def _bury(self, generation: Generation, how: Literal["committed", "quiet"]) -> None:
        self._ended[generation] = how
        while len(self._ended) > self._max_tombstones:
            self._ended.popitem(last=False)

    def _bound(self, generation: Generation, connection: ConnectionId) -> _Entry | None:
        entry = self._live.get(generation)
        return entry if entry is not None and entry.connection == connection else None

    def _count_late(self, generation: Generation) -> None:
        if generation in self._ended or generation in self._live:
            self.counts.stale += 1
        else:
            self.counts.unknown += 1

    def _outside(self, entry: _Entry, chunk: Chunk) -> str | None:
        blocks, layers = len(entry.grant.block_ids), self._layout.num_layers
        if not chunk.num_layers or chunk.first_layer + chunk.num_layers > layers:
            return f"a chunk's layers are not within the model's {layers}"
        if not chunk.num_blocks or chunk.first_block + chunk.num_blocks > blocks:
            return f"a chunk's blocks are not within the grant's {blocks}"
        return None

    @staticmethod
    def _rows(entry: _Entry, chunk: Chunk) -> Sequence[tuple[int, int]]:
        width = len(entry.grant.block_ids)
        starts = (
            layer * width + chunk.first_block
            for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers)
        )
        return [(start, start + chunk.num_blocks) for start in starts]

    @staticmethod
    def _failure(entry: _Entry, error: TransferError) -> TransferFailed:
        return TransferFailed(ref=entry.grant.ref, generation=entry.grant.generation, error=error)
