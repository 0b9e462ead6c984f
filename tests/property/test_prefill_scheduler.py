from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.prefix_index import PrefixIndex
from prefill.scheduler import PrefillLimits, PrefillScheduler, PrefillStep
from protocol.errors import Overloaded
from protocol.ids import AttemptRef, BlockId
from protocol.requests import GenerateRequest
from tests.support.generation import a_request

BLOCK_TOKENS = 2
NUM_BLOCKS = 10
NUM_STAGES = 3
LIMITS = PrefillLimits(max_batch_tokens=5, max_batch_sequences=3, max_queued_requests=5)


class PrefillMachine(RuleBasedStateMachine):
    """Whatever arrives, leaves and is pushed: each token is computed once, in the right order,
    with the right tokens before it in the cache; the books balance; and all get their turn."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.scheduler = PrefillScheduler(
            self.pool,
            PrefixIndex(self.pool),
            block_tokens=BLOCK_TOKENS,
            fingerprint="f",
            limits=LIMITS,
        )
        self.requests: dict[AttemptRef, GenerateRequest] = {}  # not yet computed, by arrival
        self.computed: dict[AttemptRef, int] = {}
        self.pushed: dict[AttemptRef, list[BlockId]] = {}
        self.pinned: list[AttemptRef] = []
        self.contents: dict[BlockId, tuple[int, ...]] = {}
        self.steps: deque[PrefillStep] = deque()  # in the stages, the oldest first
        self.count = 0

    @rule(
        tail=st.lists(st.integers(0, 1), min_size=1, max_size=17),
        now=st.integers(0, 9),
        caller=st.sampled_from("abc"),
        priority=st.integers(0, 1),
    )
    def add(self, tail: list[int], now: int, caller: str, priority: int) -> None:
        request = a_request(f"r{self.count}", prompt=tail, caller=caller, priority=priority)
        self.count += 1
        try:
            gives_way = self.scheduler.add(request, float(now), float(now))
        except Overloaded:
            assert self.scheduler.books().waiting == LIMITS.max_queued_requests
            return
        if gives_way is not None:
            other = self.requests.pop(gives_way)
            assert gives_way not in self.computed
            assert (other.caller, other.priority) != (caller, priority)
            assert other.priority <= priority
        self.requests[request.ref] = request

    @precondition(lambda self: len(self.steps) < NUM_STAGES)
    @rule()
    def schedule(self) -> None:
        step = self.scheduler.schedule()
        assert step.num_tokens <= LIMITS.max_batch_tokens
        assert len(step.chunks) <= LIMITS.max_batch_sequences
        if not step.chunks:
            in_the_way = self.pinned or self.steps
            assert not self.requests or in_the_way, "work waits and nothing is in the way"
            return
        self.steps.append(step)
        for chunk in step.chunks:
            prompt = self.requests[chunk.ref].prompt_token_ids
            start = self.computed.setdefault(chunk.ref, chunk.start)
            assert chunk.start == start, "a token was skipped or computed twice"
            assert chunk.token_ids == prompt[chunk.start : chunk.stop]
            assert chunk.start < chunk.stop
            assert chunk.final == (chunk.stop == len(prompt))
            for index in range(chunk.start // BLOCK_TOKENS):
                block = chunk.table.blocks[index]
                assert self.contents[block] == prompt[: (index + 1) * BLOCK_TOKENS]
            for position in range(chunk.start, chunk.stop):
                block = chunk.table.blocks[position // BLOCK_TOKENS]
                self.contents[block] = prompt[: position + 1]
            self.computed[chunk.ref] = chunk.stop
            pushed = self.pushed.setdefault(chunk.ref, [])
            assert chunk.first_block == len(pushed)
            pushed += chunk.source_blocks
            whole = -(-chunk.stop // BLOCK_TOKENS) if chunk.final else chunk.stop // BLOCK_TOKENS
            assert pushed == chunk.table.blocks[:whole]

    @precondition(lambda self: self.steps)
    @rule()
    def complete(self) -> None:
        step = self.steps.popleft()
        self.scheduler.complete(step)
        for chunk in step.chunks:
            if chunk.final and chunk.ref in self.requests:
                del self.requests[chunk.ref]
                self.pinned.append(chunk.ref)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), rejected=st.booleans())
    def cancel(self, data: st.DataObject, rejected: bool) -> None:
        ref = data.draw(st.sampled_from(list(self.requests)))
        held = self.scheduler.reject(ref) if rejected else self.scheduler.cancel(ref)
        assert held == (ref in self.computed)
        self.withdraw(ref)

    @rule(now=st.integers(0, 9))
    def expire(self, now: int) -> None:
        for ref in self.scheduler.expire(float(now)):
            self.withdraw(ref)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.pinned))
        self.pinned.remove(ref)
        self.scheduler.release(ref)

    def withdraw(self, ref: AttemptRef) -> None:
        del self.requests[ref]
        if ref in self.computed:
            self.pinned.append(ref)

    @invariant()
    def every_owner_is_a_prompt(self) -> None:
        self.scheduler.check()

    @invariant()
    def blocks_that_are_being_pushed_are_unchanged(self) -> None:
        writing = {chunk.ref for step in self.steps for chunk in step.chunks}
        for ref in self.pinned:
            if ref not in writing:
                assert all(self.pool.owners(block) > 0 for block in self.pushed[ref])

    def teardown(self) -> None:
        """After anything at all, finishing the rest in order empties everything within bounds."""
        turns = 0
        while self.requests or self.pinned or self.steps:
            if self.steps:
                self.complete()
            for ref in self.pinned:
                self.scheduler.release(ref)
            self.pinned.clear()
            self.schedule()
            turns += 1
            assert turns < 1000, "starved"
        self.scheduler.check()
        assert self.pool.num_held == 0


TestPrefillScheduler = PrefillMachine.TestCase
TestPrefillScheduler.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
