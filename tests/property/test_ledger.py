"""Any order of grants, chunks, aborts and losses: pages are reused by proof, ends come once."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.interface import Committed, Fence, Quiet, TransferFailed
from kvtransfer.ledger import GrantLedger
from kvtransfer.plan import Chunk
from kvtransfer.shares import WHOLE, Share
from kvtransfer.steps import ConnectionId, Step
from protocol.errors import TransferError
from protocol.ids import Generation
from protocol.kv import Grant
from tests.support.transfers import LAYOUT, a_grant, a_worker

DECODE = a_worker()
NUM_BLOCKS = 6
LOST = TransferError("lost")
CONNECTIONS = st.sampled_from([ConnectionId(1), ConnectionId(2)])
FENCES: dict[ConnectionId, Fence] = {
    ConnectionId(1): "receiver_checked",
    ConnectionId(2): "one_sided",
}


def share(generation: Generation, connection: ConnectionId) -> Share:
    """Two of three grants are filled by two connections, half of the heads or layers each."""
    half = connection - 1
    return (WHOLE, Share(half, 2), Share(stage=half, stages=2))[generation % 3]


class LedgerMachine(RuleBasedStateMachine):
    """The model of a writer: who may still write which generation's pages, by the rules of its
    transport. A page in ``free`` or in a later grant must have no such writer."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = GrantLedger(worker=DECODE, layout=LAYOUT, num_blocks=NUM_BLOCKS)
        self.free = set(range(NUM_BLOCKS))
        self.held: dict[Generation, Grant] = {}
        self.writers: dict[Generation, set[ConnectionId]] = {}
        self.sent: dict[Generation, int] = {}
        self.copying: dict[ConnectionId, Generation] = {}
        self.pending: dict[ConnectionId, Chunk] = {}
        self.ends: dict[Generation, list[type]] = {}
        self.generation = 0

    def heed(self, step: Step) -> None:
        for notice in step.notices:
            if notice.kind == "opened":
                self.writers.setdefault(notice.generation, set()).add(notice.connection)
        for event in step.events:
            seen = self.ends.setdefault(event.generation, [])
            assert type(event) not in seen, "an end was told twice"
            assert not (isinstance(event, TransferFailed) and Committed in seen)
            assert not (isinstance(event, Committed | TransferFailed) and Quiet in seen)
            seen.append(type(event))
            if isinstance(event, Committed):
                parts = share(event.generation, ConnectionId(1)).parts
                assert self.sent[event.generation] == LAYOUT.num_layers * parts
                self.writers.pop(event.generation)
            if isinstance(event, Quiet):
                still = self.writers.get(event.generation, set())
                assert all(FENCES[connection] == "receiver_checked" for connection in still)
                assert event.generation not in self.copying.values()
            if isinstance(event, Committed | Quiet) and event.generation in self.held:
                self.free |= set(self.held.pop(event.generation).block_ids)

    @precondition(lambda self: len(self.free) > 1)
    @rule(count=st.integers(1, 2))
    def expect(self, count: int) -> None:
        self.generation += 1
        blocks = [self.free.pop() for _ in range(count)]
        grant = a_grant(DECODE, blocks, generation=self.generation)
        self.ledger.expect(grant)
        self.held[grant.generation] = grant

    @rule(data=st.data(), connection=CONNECTIONS)
    def bind(self, data: st.DataObject, connection: ConnectionId) -> None:
        generation = data.draw(self.generations())
        ref = a_grant(DECODE, []).ref
        self.heed(
            self.ledger.bind(
                generation,
                ref,
                connection=connection,
                fence=FENCES[connection],
                share=share(generation, connection),
            )
        )

    @rule(data=st.data(), connection=CONNECTIONS, layer=st.integers(0, LAYOUT.num_layers))
    def begin(self, data: st.DataObject, connection: ConnectionId, layer: int) -> None:
        if connection in self.copying:
            return
        generation = data.draw(self.generations())
        grant = self.held.get(generation)
        blocks = len(grant.block_ids) if grant else 1
        found, step = self.ledger.begin_chunk(
            generation, Chunk(layer, 1, 0, blocks), connection=connection
        )
        if found is not None:
            assert grant is not None
            assert found == grant.block_ids
            assert connection in self.writers[generation]
            self.copying[connection] = generation
            self.pending[connection] = Chunk(layer, 1, 0, blocks)
        self.heed(step)

    @rule(connection=CONNECTIONS, intact=st.sampled_from([True, True, True, False]))
    def end(self, connection: ConnectionId, intact: bool) -> None:
        generation = self.copying.pop(connection, None)
        if generation is not None:
            chunk = self.pending[connection]
            if intact:
                self.sent[generation] = self.sent.get(generation, 0) + 1
            self.heed(
                self.ledger.end_chunk(generation, chunk, intact=intact, connection=connection)
            )

    @rule(data=st.data(), connection=CONNECTIONS)
    def finish(self, data: st.DataObject, connection: ConnectionId) -> None:
        if connection not in self.copying:
            generation = data.draw(self.generations())
            self.heed(self.ledger.finish(generation, b"", connection=connection))

    @rule(data=st.data(), connection=CONNECTIONS)
    def drain(self, data: st.DataObject, connection: ConnectionId) -> None:
        if connection not in self.copying:
            generation = data.draw(self.generations())
            self.writers.get(generation, set()).discard(connection)
            self.heed(self.ledger.source_stopped(generation, LOST, connection=connection))

    @rule(connection=CONNECTIONS)
    def lose(self, connection: ConnectionId) -> None:
        self.copying.pop(connection, None)
        for writers in self.writers.values():
            writers.discard(connection)
        self.heed(self.ledger.connection_lost(connection, LOST))

    @rule(connection=CONNECTIONS)
    def cut(self, connection: ConnectionId) -> None:
        if connection not in self.copying:
            self.heed(self.ledger.connection_cut(connection, LOST))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.held:
            grant = self.held[data.draw(st.sampled_from(sorted(self.held)))]
            self.heed(self.ledger.abort(grant))

    def generations(self) -> st.SearchStrategy[Generation]:
        return st.integers(1, self.generation + 1).map(Generation)

    @invariant()
    def every_block_is_free_or_held_once(self) -> None:
        held = [block for grant in self.held.values() for block in grant.block_ids]
        assert sorted([*self.free, *held]) == list(range(NUM_BLOCKS))

    @invariant()
    def the_ledger_holds_what_has_not_ended(self) -> None:
        assert self.ledger.num_live == len(self.held)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
