"""The receiving side's record of grants: who may write which pages, and when nobody can any more.

    EXPECTED ── bind ──► OPEN ── all pieces and finishes ──► COMMITTED
        │                  │
        └──── abort ───────┴──► QUARANTINED ── proof ──► QUIET

Pure, single-owner and without a clock: every call returns what to tell the role (``events``) and
the prefill workers (``notices``). A grant ends exactly once; afterwards its generation is a
tombstone, and whatever still arrives for it is counted and never acts. A quarantined grant
becomes quiet by proof only: a receiver that has stopped copying, a source that has drained, or
a connection whose other end is gone. Where several ranks of a prefill worker have a share of the
heads or layers each, a grant is filled by as many connections: all must finish, and all must be
proven.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from kvtransfer.entries import Entry, Writer
from kvtransfer.interface import Committed, Fence, Quiet
from kvtransfer.plan import Chunk, check_blocks
from kvtransfer.shares import WHOLE, Share, layers_of
from kvtransfer.steps import NO_GRANT, NOTHING, ConnectionId, Notice, Step, one_after_another
from protocol.errors import TransferAborted, TransferCorrupt, TransferError
from protocol.ids import AttemptRef, BlockId, Generation, WorkerRef
from protocol.kv import Grant, KVLayout

MAX_TOMBSTONES = 4096


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
        self._live: dict[Generation, Entry] = {}
        self._ended: OrderedDict[Generation, Literal["committed", "quiet"]] = OrderedDict()
        self.counts = LedgerCounts()

    @property
    def num_live(self) -> int:
        """Grants that are expected, open or quarantined."""
        return len(self._live)

    @property
    def num_open(self) -> int:
        """Live grants that a prefill worker has opened."""
        return sum(bool(entry.writers) for entry in self._live.values())

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
        self._live[grant.generation] = Entry(grant=grant)

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
        return self._quarantine(entry, TransferAborted("the decode rank has aborted the grant"))

    def bind(
        self,
        generation: Generation,
        ref: AttemptRef,
        *,
        connection: ConnectionId,
        fence: Fence,
        on_device: bool = False,
        share: Share = WHOLE,
    ) -> Step:
        """A prefill rank asks to fill its share of the grant; the answer is a notice to it."""
        entry = self._live.get(generation)
        refusal = TransferError
        if entry is None:
            self._count_late(generation)
            problem = "the grant is not known here, or has ended"
            if self._ended.get(generation) == "quiet":
                refusal = TransferAborted
        elif entry.quarantined:
            self.counts.stale += 1
            problem, refusal = "the grant has been aborted", TransferAborted
        elif entry.grant.ref != ref:
            self.counts.refused += 1
            problem = "the grant is another request's"
        elif share in entry.writers or entry.writer(connection) is not None:
            self.counts.refused += 1
            problem = "the grant is being filled already"
        elif entry.is_divided_otherwise(share) or (entry.writers and entry.on_device != on_device):
            self.counts.refused += 1
            problem = "the grant is being filled in other shares, or in other memory"
        else:
            layers = layers_of(share, self._layout)
            pieces = len(layers) * len(entry.grant.block_ids)
            entry.on_device = on_device
            entry.writers[share] = Writer(
                layers=layers,
                connection=connection,
                fence=fence,
                arrived=bytearray(pieces),
                missing=pieces,
            )
            return Step(
                notices=(Notice(connection=connection, kind="opened", generation=generation),)
            )
        notice = Notice(
            connection=connection,
            kind="refused",
            generation=generation,
            error=refusal(problem),
        )
        return Step(notices=(notice,))

    def begin_chunk(
        self, generation: Generation, chunk: Chunk, *, connection: ConnectionId
    ) -> tuple[tuple[BlockId, ...] | None, Step]:
        """The pages of an arriving chunk, or None where its bytes must not be written or counted.

        With pages the caller answers by ``end_chunk``. A chunk outside its grant, or one that
        overlaps another, fails the grant.
        """
        entry, writer = self._bound(generation, connection)
        if entry is None or writer is None or entry.quarantined:
            self._count_late(generation)
            return None, NOTHING
        problem = entry.outside(chunk, writer.layers)
        if problem is None:
            held = [writer.arrived.count(1, *row) for row in entry.rows(writer, chunk)]
            if not any(held):
                writer.copying = True
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

    def end_chunk(
        self, generation: Generation, chunk: Chunk, *, intact: bool, connection: ConnectionId
    ) -> Step:
        """The chunk that ``begin_chunk`` admitted is in place, or is known to be damaged."""
        entry, writer = self._bound(generation, connection)
        assert entry is not None
        assert writer is not None
        writer.copying = False
        if entry.quarantined:
            writer.quiet = writer.quiet or writer.fence == "receiver_checked"
            return self._quiet_if_proven(entry)
        if not intact:
            self.counts.corrupt += 1
            return self._fail(entry, TransferCorrupt("KV bytes do not match their checksum"))
        for start, stop in entry.rows(writer, chunk):
            writer.arrived[start:stop] = b"\1" * (stop - start)
        pieces = chunk.num_layers * chunk.num_blocks
        self.counts.chunks += 1
        writer.missing -= pieces
        entry.num_bytes += pieces * self._layout.layer_block_bytes // entry.parts
        return NOTHING

    def finish(self, generation: Generation, payload: bytes, *, connection: ConnectionId) -> Step:
        """A prefill rank has sent its whole share: commits where it is the last one, or fails where
        a piece is missing. ``payload`` is empty but for one of the ranks.
        """
        entry, writer = self._bound(generation, connection)
        if entry is None or writer is None or entry.quarantined:
            self._count_late(generation)
            return NOTHING
        if writer.missing:
            problem = f"finished with {writer.missing} of {len(writer.arrived)} pieces missing"
            return self._fail(entry, TransferError(problem))
        writer.finished = True
        entry.payload = entry.payload or payload
        if not entry.finished:
            return NOTHING
        self._end(entry, "committed")
        self.counts.committed += 1
        self.counts.bytes_committed += entry.num_bytes
        event = Committed(
            ref=entry.grant.ref,
            generation=generation,
            payload=entry.payload,
            bytes_received=entry.num_bytes,
            on_device=entry.on_device,
        )
        notices = (
            Notice(connection=other.connection, kind="committed", generation=generation)
            for other in entry.writers.values()
        )
        return Step(events=(event,), notices=tuple(notices))

    def source_stopped(
        self, generation: Generation, error: TransferError, *, connection: ConnectionId
    ) -> Step:
        """The source says that it writes nothing more: of its own accord, or asked to."""
        entry, writer = self._bound(generation, connection)
        if entry is None or writer is None:
            self._count_late(generation)
            return NOTHING
        return self._stop(entry, writer, error)

    @staticmethod
    def probed(connection: ConnectionId) -> Step:
        """Bytes that measure the connection have come, and concern no grant."""
        notice = Notice(connection=connection, kind="probed", generation=NO_GRANT)
        return Step(notices=(notice,))

    def connection_cut(self, connection: ConnectionId, error: TransferError) -> Step:
        """The connection is of no more use, but its other end may still write: what it has open
        fails now and is quiet only when the connection is lost.
        """
        steps: list[Step] = []
        for entry, _ in self._of(connection):
            if not entry.quarantined:
                self.counts.failed += 1
                steps.append(self._give_up(entry, error, without=connection))
        return one_after_another(steps)

    def connection_lost(self, connection: ConnectionId, error: TransferError) -> Step:
        """The other end is gone for certain, so nothing it had open can be written any more."""
        steps: list[Step] = []
        for entry, writer in self._of(connection):
            writer.copying = False
            steps.append(self._stop(entry, writer, error))
        return one_after_another(steps)

    def _stop(self, entry: Entry, writer: Writer, error: TransferError) -> Step:
        writer.quiet = True
        if entry.quarantined:
            return self._quiet_if_proven(entry)
        self.counts.failed += 1
        return self._give_up(entry, error, without=writer.connection)

    def _fail(self, entry: Entry, error: TransferError) -> Step:
        self.counts.failed += 1
        return self._give_up(entry, error)

    def _give_up(
        self, entry: Entry, error: TransferError, *, without: ConnectionId | None = None
    ) -> Step:
        """Of its own accord: the role is told. ``without`` is not asked to stop."""
        step = self._quarantine(entry, error, without=without)
        return Step(events=(entry.failure(error), *step.events), notices=step.notices)

    def _quarantine(
        self, entry: Entry, error: TransferError, *, without: ConnectionId | None = None
    ) -> Step:
        entry.quarantined = True
        notices: list[Notice] = []
        for writer in entry.writers.values():
            if writer.fence == "receiver_checked" and not writer.copying:
                writer.quiet = True
            if writer.connection != without:
                notices.append(
                    Notice(
                        connection=writer.connection,
                        kind="cancel",
                        generation=entry.grant.generation,
                        error=error,
                    )
                )
        return Step(events=self._quiet_if_proven(entry).events, notices=tuple(notices))

    def _quiet_if_proven(self, entry: Entry) -> Step:
        if not all(writer.quiet for writer in entry.writers.values()):
            return NOTHING
        self._end(entry, "quiet")
        return Step(events=(Quiet(ref=entry.grant.ref, generation=entry.grant.generation),))

    def _abort_ended(self, grant: Grant) -> Step:
        if self._ended.get(grant.generation) == "quiet":
            return NOTHING
        self.counts.aborted += 1
        self._bury(grant.generation, "quiet")
        return Step(events=(Quiet(ref=grant.ref, generation=grant.generation),))

    def _end(self, entry: Entry, how: Literal["committed", "quiet"]) -> None:
        del self._live[entry.grant.generation]
        self._bury(entry.grant.generation, how)

    def _bury(self, generation: Generation, how: Literal["committed", "quiet"]) -> None:
        self._ended[generation] = how
        while len(self._ended) > self._max_tombstones:
            self._ended.popitem(last=False)

    def _bound(
        self, generation: Generation, connection: ConnectionId
    ) -> tuple[Entry | None, Writer | None]:
        entry = self._live.get(generation)
        return entry, None if entry is None else entry.writer(connection)

    def _of(self, connection: ConnectionId) -> list[tuple[Entry, Writer]]:
        found = ((entry, entry.writer(connection)) for entry in self._live.values())
        return [(entry, writer) for entry, writer in found if writer is not None]

    def _count_late(self, generation: Generation) -> None:
        if generation in self._ended or generation in self._live:
            self.counts.stale += 1
        else:
            self.counts.unknown += 1
