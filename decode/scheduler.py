"""Which sequences of one decode rank step next, and in which blocks. No torch, no I/O.

Every block is free, cached, granted (promised to a transfer), active (of a committed sequence) or
quarantined (of an aborted transfer, until it is proven that nothing writes there): the sum is
always the pool, and only proof, never time, ends quarantine. The oldest sequences run first; when
blocks run out the youngest of the caller that holds most gives up its own and resumes later, so the
oldest of some caller always advances and nothing fails. Who gives way to whom ``decode.callers``
says; tokens, models and transfers are not known here. All calls come from one thread, between
steps: a step's swaps are done before the next call.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from decode.books import DecodeBooks
from decode.callers import Account, Accounts, SequenceEntry, age
from engine.kvcache.block_pool import BlockPool
from engine.kvcache.block_table import BlockTable, blocks_for
from protocol.errors import ContextLengthExceeded, Overloaded
from protocol.holdings import Holding, standing
from protocol.ids import AttemptRef, BlockId

State = Literal["granted", "active", "swapped", "quarantined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The blocks, in token order, whose contents move between the rank and the host."""

    ref: AttemptRef
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Granted blocks. ``swap_out`` comes first: before that nobody may write to ``blocks``."""

    blocks: tuple[BlockId, ...]
    swap_out: tuple[Swap, ...] = ()


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


@dataclass(slots=True, kw_only=True)
class _Grant:
    account: Account
    prompt_tokens: int
    max_total_tokens: int
    blocks: list[BlockId]


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What changed while a step was being planned."""

    swap_out: list[Swap] = field(default_factory=list)
    swap_in: list[Swap] = field(default_factory=list)
    grown: list[SequenceEntry] = field(default_factory=list)


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
        self._quarantined: dict[AttemptRef, _Grant] = {}
        self._sequences: dict[AttemptRef, SequenceEntry] = {}  # all committed ones
        self._resident: list[SequenceEntry] = []  # those with blocks, oldest first
        self._swapped: list[SequenceEntry] = []  # those without, oldest first
        self._last_rows: list[SequenceEntry] = []
        self._last_refs: list[AttemptRef] = []
        self._commits = 0
        self._accounts = Accounts()

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
        self,
        ref: AttemptRef,
        prompt_tokens: int,
        max_total_tokens: int,
        *,
        caller: str = "",
        priority: int = 0,
    ) -> Reservation:
        """Grant blocks for a prompt's KV; ``max_total_tokens`` counts prompt and output.

        Other callers' sequences may have to give way for it: do the swaps before anything else.

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
        account = self._accounts.find(caller, priority)
        needed = blocks_for(prompt_tokens, self._block_tokens)
        swap_out = self._make_room(account, needed)
        blocks = self._pool.allocate(needed)
        account.blocks += needed
        self._accounts.keep(account)
        self._grants[ref] = _Grant(
            account=account,
            prompt_tokens=prompt_tokens,
            max_total_tokens=max_total_tokens,
            blocks=blocks,
        )
        return Reservation(blocks=tuple(blocks), swap_out=swap_out)

    def commit(self, ref: AttemptRef, first_token_id: int) -> None:
        """A granted request's prompt KV is complete: it joins the batch with its first token."""
        grant = self._grants.pop(ref)
        sequence = SequenceEntry(
            ref=ref,
            account=grant.account,
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
        rows = self._rows()
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
            self._give_back(sequence.account, sequence.table.take_all())
        else:
            self._remove(self._swapped, sequence)
            sequence.account.swapped -= 1
        self._accounts.drop(sequence.account)

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
        self._quarantined[ref] = grant
        return True

    def quiet(self, ref: AttemptRef) -> bool:
        """Free quarantined blocks, on proof that nothing writes there any more.

        The proof is the transport's ``Quiet``, or a ``Committed`` that crossed the abort. False
        when ``ref`` is not quarantined: proof that comes twice changes nothing.
        """
        grant = self._quarantined.pop(ref, None)
        if grant is None:
            return False
        self._give_back(grant.account, grant.blocks)
        self._accounts.drop(grant.account)
        return True

    def books(self) -> DecodeBooks:
        """Counts, after asserting that free + cached + granted + active + quarantined == total."""
        running = min(len(self._resident), self._max_batch)
        books = DecodeBooks(
            free=self._pool.num_free,
            cached=self._pool.num_cached,
            granted=sum(len(grant.blocks) for grant in self._grants.values()),
            active=sum(len(sequence.table.blocks) for sequence in self._resident),
            quarantined=sum(len(grant.blocks) for grant in self._quarantined.values()),
            total=self._pool.num_blocks,
            reservable=0 if self._swapped else self._spare(),
            spare=self._spare(),
            granted_requests=len(self._grants),
            running_requests=running,
            waiting_requests=len(self._resident) - running,
            swapped_requests=len(self._swapped),
            quarantined_requests=len(self._quarantined),
        )
        parts = books.free + books.cached + books.granted + books.active + books.quarantined
        assert parts == books.total, f"blocks do not add up: {books}"
        held = books.granted + books.active + books.quarantined
        assert self._accounts.blocks == held, f"accounts do not add up to {held}"
        return books

    def holdings(self) -> tuple[Holding, ...]:
        """What callers hold, where one that holds nothing might get more than what is free."""
        scarce = self._spare() * (len(self._accounts) + 1) < self._pool.num_blocks
        return self._accounts.holdings(self._resident) if self._swapped or scarce else ()

    def _spare(self) -> int:
        headroom = self._headroom_blocks * (len(self._resident) + len(self._grants))
        return max(0, self._pool.num_available - headroom)

    def _make_room(self, account: Account, needed: int) -> tuple[Swap, ...]:
        """Preempt who has to give way, if so many blocks are not free for ``account``.

        Raises:
            Overloaded: nobody has to, or not so many; nobody was preempted.
        """
        room = self._spare()
        if self._swapped:  # what becomes free is for those that were running before
            first = self._accounts.first_back(self._swapped)
            room = room if standing(account) < standing(first.account) else 0
        if needed <= room:
            return ()
        giving_way = self._accounts.giving_way(
            self._resident,
            account,
            wanted=needed,
            missing=needed - room,
            total=self._pool.num_blocks,
        )
        if not giving_way:
            raise Overloaded(
                f"{needed} KV blocks wanted, {room} can be reserved",
                stage="reserve",
                wanted=needed,
                available=room,
            )
        return tuple(map(self._preempt, giving_way))

    def _rows(self) -> list[SequenceEntry]:
        return self._accounts.rows(self._resident, self._max_batch)

    def _grow(self, plan: _Plan) -> None:
        """Give each row a slot for its newest token, oldest first, at the cost of the youngest of
        the caller that holds most.
        """
        rows = self._rows()
        row = 0
        while row < len(rows):
            sequence = rows[row]
            if sequence.position == sequence.table.capacity_tokens:
                if not self._pool.num_available:
                    plan.swap_out.append(self._preempt(self._accounts.first_out(self._resident)))
                    rows, row = self._rows(), 0  # others may have come into the batch
                    continue
                sequence.table.append(self._pool.allocate(1)[0])
                sequence.account.blocks += 1
                plan.grown.append(sequence)
            assert sequence.position < sequence.max_total_tokens, (
                f"{sequence.ref} should have ended"
            )
            row += 1

    def _preempt(self, sequence: SequenceEntry) -> Swap:
        self._remove(self._resident, sequence)
        blocks = sequence.table.take_all()
        self._give_back(sequence.account, blocks)
        sequence.account.swapped += 1
        insort(self._swapped, sequence, key=age)
        filled = blocks_for(sequence.position, self._block_tokens)
        return Swap(ref=sequence.ref, blocks=tuple(blocks[:filled]))

    def _resume(self, plan: _Plan) -> None:
        """Bring swapped sequences back, in turn, while there is room to go on growing."""
        while self._swapped:
            sequence = self._accounts.first_back(self._swapped)
            needed = blocks_for(sequence.position + 1, self._block_tokens)
            headroom = self._headroom_blocks * len(self._resident)
            if needed + headroom > self._pool.num_available or not self._would_run(sequence):
                return
            blocks = self._pool.allocate(needed)
            sequence.table = BlockTable(self._block_tokens, blocks)
            sequence.stays_until = sequence.position + needed
            sequence.account.blocks += needed
            sequence.account.swapped -= 1
            self._remove(self._swapped, sequence)
            insort(self._resident, sequence, key=age)
            filled = blocks_for(sequence.position, self._block_tokens)
            plan.swap_in.append(Swap(ref=sequence.ref, blocks=tuple(blocks[:filled])))

    def _would_run(self, sequence: SequenceEntry) -> bool:
        if len(self._resident) < self._max_batch:
            return True
        with_it = self._resident.copy()
        insort(with_it, sequence, key=age)
        return sequence in self._accounts.rows(with_it, self._max_batch)

    def _give_back(self, account: Account, blocks: list[BlockId]) -> None:
        self._pool.release(blocks)
        account.blocks -= len(blocks)

    @staticmethod
    def _remove(ordered: list[SequenceEntry], sequence: SequenceEntry) -> None:
        index = bisect_left(ordered, sequence.ordinal, key=age)
        assert ordered[index] is sequence, f"{sequence.ref} is not where its age says"
        del ordered[index]
