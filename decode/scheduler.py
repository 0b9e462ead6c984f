"""Which sequences of one decode rank step next, and in which blocks. No torch, no I/O.

Every block is free, cached, granted (promised to a transfer), active (of a committed sequence) or
quarantined (of an aborted transfer, until it is proven that nothing writes there): the sum is
always the pool, and only proof, never time, ends quarantine. The oldest sequences run first; when
blocks run out the youngest gives up its own and resumes later, so the oldest always advances and
nothing fails. Tokens, models and transfers are not known here. All calls come from one thread,
between steps: a step's swaps are done before the next call.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.block_table import BlockTable, blocks_for
from protocol.errors import ContextLengthExceeded, Overloaded
from protocol.ids import AttemptRef, BlockId

State = Literal["granted", "active", "swapped", "quarantined"]
_age = attrgetter("ordinal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The blocks, in token order, whose contents move between the rank and the host."""

    ref: AttemptRef
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """One batch, column by column: row ``i`` computes one token of ``refs[i]``.

    Do all of ``swap_out``, then all of ``swap_in``, then compute: blocks that are swapped out may
    be used again in this very step. ``tables`` are the live ones and change at the next call.
    """

    refs: list[AttemptRef]
    token_ids: list[int]  # each row's newest token, the step's input
    positions: list[int]
    slots: list[int]  # where its KV goes
    tables: list[BlockTable]
    same_rows: bool  # the same sequences in the same rows as in the previous step
    grown_rows: list[int]  # rows whose table got a block since the previous step
    swap_out: list[Swap]
    swap_in: list[Swap]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBooks:
    """Blocks by state, and requests by state."""

    free: int
    cached: int
    granted: int
    active: int
    quarantined: int
    total: int
    reservable: int  # blocks that one ``reserve`` could take now
    granted_requests: int
    running_requests: int
    waiting_requests: int  # committed, beyond ``max_batch``
    swapped_requests: int
    quarantined_requests: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    ref: AttemptRef
    ordinal: int  # order of commit: the youngest has the highest
    position: int  # of the newest token, whose KV the next step computes
    token_id: int
    max_total_tokens: int
    table: BlockTable


@dataclass(slots=True, kw_only=True)
class _Grant:
    prompt_tokens: int
    max_total_tokens: int
    blocks: list[BlockId]


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What changed while a step was being planned."""

    swap_out: list[Swap] = field(default_factory=list)
    swap_in: list[Swap] = field(default_factory=list)
    grown: list[_Sequence] = field(default_factory=list)


class DecodeScheduler:
    """Continuous batching of one rank.

    ``headroom_blocks`` per sequence stay unreserved, so that a new grant does not at once force
    running sequences out. A step is ``schedule``, swaps, compute, ``advance``, then ``finish`` or
    ``cancel`` for the sequences that ended.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_tokens: int,
        max_batch: int,
        headroom_blocks: int = 1,
    ) -> None:
        if max_batch <= 0:
            raise ValueError(f"max_batch must be positive, got {max_batch}")
        self._pool = pool
        self._block_tokens = block_tokens
        self._max_batch = max_batch
        self._headroom_blocks = headroom_blocks
        self._grants: dict[AttemptRef, _Grant] = {}
        self._quarantined: dict[AttemptRef, list[BlockId]] = {}
        self._sequences: dict[AttemptRef, _Sequence] = {}  # all committed ones
        self._resident: list[_Sequence] = []  # those with blocks, oldest first
        self._swapped: list[_Sequence] = []  # those without, oldest first
        self._last_rows: list[_Sequence] = []
        self._last_refs: list[AttemptRef] = []
        self._commits = 0

    def state(self, ref: AttemptRef) -> State | None:
        """Where a request is in these books; None when nothing is held for it."""
        if ref in self._grants:
            return "granted"
        if ref in self._quarantined:
            return "quarantined"
        sequence = self._sequences.get(ref)
        if sequence is None:
            return None
        return "active" if sequence.table.blocks else "swapped"

    def reserve(
        self, ref: AttemptRef, prompt_tokens: int, max_total_tokens: int
    ) -> tuple[BlockId, ...]:
        """Grant blocks for a prompt's KV; ``max_total_tokens`` counts prompt and output.

        Raises:
            ContextLengthExceeded: even alone on this rank the request would not fit.
            Overloaded: not now; nothing was taken.
        """
        assert 0 < prompt_tokens < max_total_tokens, "a prompt, and at least one token of output"
        assert self.state(ref) is None, f"{ref} is known already"
        room = self._pool.num_blocks * self._block_tokens
        if max_total_tokens > room:
            raise ContextLengthExceeded(
                f"the request may reach {max_total_tokens} tokens; a decode rank here has room "
                f"for {room}",
                stage="reserve",
            )
        needed = blocks_for(prompt_tokens, self._block_tokens)
        if needed > self._reservable():
            raise Overloaded(
                f"{needed} KV blocks wanted, {self._reservable()} can be reserved",
                stage="reserve",
                wanted=needed,
                available=self._reservable(),
            )
        blocks = self._pool.allocate(needed)
        self._grants[ref] = _Grant(
            prompt_tokens=prompt_tokens, max_total_tokens=max_total_tokens, blocks=blocks
        )
        return tuple(blocks)

    def commit(self, ref: AttemptRef, first_token_id: int) -> None:
        """A granted request's prompt KV is complete: it joins the batch with its first token."""
        grant = self._grants.pop(ref)
        sequence = _Sequence(
            ref=ref,
            ordinal=self._commits,
            position=grant.prompt_tokens,
            token_id=first_token_id,
            max_total_tokens=grant.max_total_tokens,
            table=BlockTable(self._block_tokens, grant.blocks),
        )
        self._commits += 1
        self._sequences[ref] = sequence
        self._resident.append(sequence)

    def schedule(self) -> DecodeStep:
        """The next step; without rows when no sequence can run."""
        plan = _Plan()
        self._grow(plan)
        if not plan.swap_out:
            self._resume(plan)
        rows = self._resident[: self._max_batch]
        same_rows = rows == self._last_rows
        if not same_rows:
            self._last_rows, self._last_refs = rows, [sequence.ref for sequence in rows]
        size = self._block_tokens
        positions = [sequence.position for sequence in rows]
        return DecodeStep(
            refs=self._last_refs,
            token_ids=[sequence.token_id for sequence in rows],
            positions=positions,
            slots=[
                sequence.table.blocks[position // size] * size + position % size
                for sequence, position in zip(rows, positions, strict=True)
            ],
            tables=[sequence.table for sequence in rows],
            same_rows=same_rows,
            grown_rows=[rows.index(sequence) for sequence in plan.grown if sequence in rows],
            swap_out=plan.swap_out,
            swap_in=plan.swap_in,
        )

    def advance(self, step: DecodeStep, token_ids: Sequence[int]) -> None:
        """Each row of ``step`` has its KV written and a new token; ended sequences are skipped.

        A sequence that has reached its ``max_total_tokens`` must end before the next ``schedule``.
        """
        for ref, token_id in zip(step.refs, token_ids, strict=True):
            sequence = self._sequences.get(ref)
            if sequence is not None:
                sequence.position += 1
                sequence.token_id = token_id

    def finish(self, ref: AttemptRef) -> None:
        """A committed sequence has ended: its blocks are free. A host copy is the caller's."""
        sequence = self._sequences.pop(ref)
        if sequence.table.blocks:
            self._remove(self._resident, sequence)
            self._pool.release(sequence.table.take_all())
        else:
            self._remove(self._swapped, sequence)

    def cancel(self, ref: AttemptRef) -> State | None:
        """Withdraw a request in whatever state; the state it was in.

        ``granted``: its blocks are quarantined now, and the caller aborts the transfer.
        ``swapped``: the caller drops the host copy. ``quarantined`` or None: nothing was done.
        """
        state = self.state(ref)
        if state == "granted":
            self.quarantine(ref)
        elif state in ("active", "swapped"):
            self.finish(ref)
        return state

    def quarantine(self, ref: AttemptRef) -> bool:
        """Keep a grant's blocks out of use until ``quiet``; False when ``ref`` is not granted.

        For aborted, failed and expired transfers: bytes may still be on their way.
        """
        grant = self._grants.pop(ref, None)
        if grant is None:
            return False
        self._quarantined[ref] = grant.blocks
        return True

    def quiet(self, ref: AttemptRef) -> bool:
        """Free quarantined blocks, on proof that nothing writes there any more.

        The proof is the transport's ``Quiet``, or a ``Committed`` that crossed the abort. False
        when ``ref`` is not quarantined: proof that comes twice changes nothing.
        """
        blocks = self._quarantined.pop(ref, None)
        if blocks is None:
            return False
        self._pool.release(blocks)
        return True

    def books(self) -> DecodeBooks:
        """Counts, after asserting that free + cached + granted + active + quarantined == total."""
        running = min(len(self._resident), self._max_batch)
        books = DecodeBooks(
            free=self._pool.num_free,
            cached=self._pool.num_cached,
            granted=sum(len(grant.blocks) for grant in self._grants.values()),
            active=sum(len(sequence.table.blocks) for sequence in self._resident),
            quarantined=sum(map(len, self._quarantined.values())),
            total=self._pool.num_blocks,
            reservable=self._reservable(),
            granted_requests=len(self._grants),
            running_requests=running,
            waiting_requests=len(self._resident) - running,
            swapped_requests=len(self._swapped),
            quarantined_requests=len(self._quarantined),
        )
        parts = books.free + books.cached + books.granted + books.active + books.quarantined
        assert parts == books.total, f"blocks do not add up: {books}"
        return books

    def _reservable(self) -> int:
        if self._swapped:
            return 0  # what becomes free is for those that were running before
        headroom = self._headroom_blocks * (len(self._resident) + len(self._grants))
        return max(0, self._pool.num_available - headroom)

    def _grow(self, plan: _Plan) -> None:
        """Give each row a slot for its newest token, oldest first, at the youngest's cost."""
        row = 0
        while row < min(len(self._resident), self._max_batch):
            sequence = self._resident[row]
            if sequence.position == sequence.table.capacity_tokens:
                while not self._pool.num_available and len(self._resident) > row:
                    self._preempt_youngest(plan)
                if len(self._resident) == row:
                    break  # it was the youngest itself
                sequence.table.append(self._pool.allocate(1)[0])
                plan.grown.append(sequence)
            assert sequence.position < sequence.max_total_tokens, (
                f"{sequence.ref} should have ended"
            )
            row += 1

    def _preempt_youngest(self, plan: _Plan) -> None:
        sequence = self._resident.pop()
        blocks = sequence.table.take_all()
        self._pool.release(blocks)
        insort(self._swapped, sequence, key=_age)
        filled = blocks_for(sequence.position, self._block_tokens)
        plan.swap_out.append(Swap(ref=sequence.ref, blocks=tuple(blocks[:filled])))

    def _resume(self, plan: _Plan) -> None:
        """Bring swapped sequences back, oldest first, while there is room to go on growing."""
        while self._swapped:
            sequence = self._swapped[0]
            needed = blocks_for(sequence.position + 1, self._block_tokens)
            headroom = self._headroom_blocks * len(self._resident)
            row = bisect_left(self._resident, sequence.ordinal, key=_age)
            if row >= self._max_batch or needed + headroom > self._pool.num_available:
                return
            sequence.table = BlockTable(self._block_tokens, self._pool.allocate(needed))
            del self._swapped[0]
            self._resident.insert(row, sequence)
            filled = blocks_for(sequence.position, self._block_tokens)
            plan.swap_in.append(
                Swap(ref=sequence.ref, blocks=tuple(sequence.table.blocks[:filled]))
            )

    @staticmethod
    def _remove(ordered: list[_Sequence], sequence: _Sequence) -> None:
        index = bisect_left(ordered, sequence.ordinal, key=_age)
        assert ordered[index] is sequence, f"{sequence.ref} is not where its age says"
        del ordered[index]
