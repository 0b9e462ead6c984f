from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode.scheduler import DecodeScheduler, Swap
from engine.kvcache.block_pool import BlockPool
from protocol.errors import Overloaded
from protocol.holdings import fair_part
from protocol.ids import AttemptRef, BlockId, RequestId

BLOCK_TOKENS = 2
NUM_BLOCKS = 9
ROOM = BLOCK_TOKENS * NUM_BLOCKS

Memory = dict[int, tuple[AttemptRef, int]]


class DecodeMachine(RuleBasedStateMachine):
    """A rank whose memory remembers which token is where: whatever is granted, aborted, preempted
    and cancelled, whoever calls, a step finds every earlier token of its rows, and everyone
    finishes."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DecodeScheduler(
            BlockPool(NUM_BLOCKS), block_tokens=BLOCK_TOKENS, max_batch=3, headroom_blocks=1
        )
        self.memory: Memory = {}  # slot -> (request, position)
        self.host: dict[AttemptRef, list[list[tuple[AttemptRef, int] | None]]] = {}
        self.granted: dict[AttemptRef, tuple[tuple[BlockId, ...], int, int]] = {}
        self.quarantined: dict[AttemptRef, tuple[BlockId, ...]] = {}
        self.lengths: dict[AttemptRef, int] = {}  # committed: tokens so far
        self.limits: dict[AttemptRef, int] = {}
        self.count = 0

    @rule(
        prompt=st.integers(1, ROOM - 1),
        output=st.integers(1, ROOM),
        caller=st.sampled_from(["", "", "one", "another"]),
        priority=st.sampled_from([0, 0, 0, 1]),
    )
    def reserve(self, prompt: int, output: int, caller: str, priority: int) -> None:
        ref = AttemptRef(RequestId(f"r{self.count}"), 0)
        self.count += 1
        total = min(prompt + output, ROOM)
        try:
            reserved = self.scheduler.reserve(ref, prompt, total, caller=caller, priority=priority)
        except Overloaded:
            assert self.granted or self.quarantined or self.lengths, "an idle rank refused"
            return
        if reserved.swap_out and priority == 0:
            after = {(held.caller, held.priority): held for held in self.scheduler.holdings()}
            others = [held for key, held in after.items() if key != (caller, priority)]
            mine = after[caller, priority]
            assert mine.blocks <= fair_part(NUM_BLOCKS, priority, others)
            assert not mine.swapped_requests
        for swap in reserved.swap_out:
            self.put_aside(swap)
        assert len(reserved.blocks) == -(-prompt // BLOCK_TOKENS)
        self.granted[ref] = (reserved.blocks, prompt, total)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(list(self.granted)))
        blocks, prompt, total = self.granted.pop(ref)
        for position in range(prompt):
            self.memory[self.slot(blocks, position)] = (ref, position)
        self.scheduler.commit(ref, prompt)
        self.lengths[ref], self.limits[ref] = prompt + 1, total
        self.end_if_full(ref)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(list(self.granted)))
        self.quarantined[ref] = self.granted.pop(ref)[0]
        assert self.scheduler.cancel(ref) == "granted"

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def prove_quiet(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(list(self.quarantined)))
        for block in self.quarantined.pop(ref):  # a late write, the last one possible
            self.memory[block * BLOCK_TOKENS] = (ref, 0)
        assert self.scheduler.quiet(ref)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(list(self.lengths)))
        state = self.scheduler.cancel(ref)
        assert (state == "swapped") == (ref in self.host)
        self.host.pop(ref, None)
        del self.lengths[ref]

    @rule()
    def step(self) -> None:
        plan = self.scheduler.schedule()
        for swap in plan.swap_out:
            self.put_aside(swap)
        for swap in plan.swap_in:
            for block, contents in zip(swap.blocks, self.host.pop(swap.ref), strict=True):
                for at, token in enumerate(contents):
                    if token is not None:
                        self.memory[block * BLOCK_TOKENS + at] = token
        assert len(plan.refs) <= 3
        assert plan.refs or plan.swap_out or not self.lengths or self.granted or self.quarantined
        assert len(set(plan.slots)) == len(plan.slots)
        for row, ref in enumerate(plan.refs):
            position = plan.positions[row]
            assert plan.token_ids[row] == position == self.lengths[ref] - 1
            assert plan.slots[row] == self.slot(tuple(plan.tables[row].blocks), position)
            self.memory[plan.slots[row]] = (ref, position)
            for earlier in range(position + 1):
                slot = self.slot(tuple(plan.tables[row].blocks), earlier)
                assert self.memory[slot] == (ref, earlier)
        self.scheduler.advance(plan, [position + 1 for position in plan.positions])
        for ref in plan.refs:
            self.lengths[ref] += 1
            self.end_if_full(ref)

    @invariant()
    def the_books_balance(self) -> None:
        books = self.scheduler.books()
        assert books.granted == sum(len(blocks) for blocks, _, _ in self.granted.values())
        assert books.quarantined == sum(map(len, self.quarantined.values()))
        assert books.swapped_requests == len(self.host)
        assert books.running_requests + books.waiting_requests + len(self.host) == len(self.lengths)

    def put_aside(self, swap: Swap) -> None:
        self.host[swap.ref] = [
            [self.memory.get(block * BLOCK_TOKENS + at) for at in range(BLOCK_TOKENS)]
            for block in swap.blocks
        ]

    def end_if_full(self, ref: AttemptRef) -> None:
        if self.lengths[ref] >= self.limits[ref]:
            self.scheduler.finish(ref)
            del self.lengths[ref]

    def slot(self, blocks: tuple[BlockId, ...], position: int) -> int:
        return blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

    def teardown(self) -> None:
        """With no more grants every sequence finishes, however often it was preempted."""
        for ref in list(self.granted):
            self.scheduler.cancel(ref)
            self.scheduler.quiet(ref)
        for ref in list(self.quarantined):
            self.scheduler.quiet(ref)
        bound = sum(self.limits.values()) + len(self.limits) + 1
        while self.lengths and bound:
            self.step()
            bound -= 1
        assert not self.lengths, "a sequence starved"
        assert self.scheduler.books().free == NUM_BLOCKS


TestDecodeScheduler = DecodeMachine.TestCase
TestDecodeScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
