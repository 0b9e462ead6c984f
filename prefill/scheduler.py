"""Which prompt tokens the next prefill step computes: queue, chunks, blocks. No torch, no I/O.

Prompts are served in the order of their turns (``prefill.queue``); a prompt behind another one only
gets what the ones before it leave of a step's token budget, and none starts behind one that waits
for blocks, so nothing starves. A prompt takes all its blocks when it starts, so whatever has
started can finish. Its blocks stay pinned until ``release``, and every chunk starts at a block
boundary. The scheduler does not know models, transfers or clocks. All calls come from one thread.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.block_table import BlockTable, blocks_for
from engine.kvcache.prefix_index import PrefixIndex
from prefill.queue import Prompt, PromptQueue
from protocol.errors import ContextLengthExceeded, Overloaded
from protocol.ids import AttemptRef, BlockId
from protocol.prefix import block_hashes
from protocol.requests import GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    max_batch_tokens: int = 512
    max_batch_sequences: int = 64
    max_queued_requests: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens ``start ... stop - 1`` of one prompt, whose earlier tokens are in the cache.

    Once the chunk has been computed, grant blocks ``first_block ...`` are final and lie in
    ``source_blocks``; the first ``hit_blocks`` of these were final before (a prefix hit).
    """

    ref: AttemptRef
    start: int
    stop: int
    token_ids: tuple[int, ...]
    next_token_ids: tuple[int, ...]  # after each of them; one fewer at the prompt's end
    table: BlockTable
    final: bool  # the prompt's last chunk: its last token's logits give the first output token
    first_block: int
    source_blocks: tuple[BlockId, ...]
    hit_blocks: int
    scored: bool  # the logits of all its tokens are wanted

    @property
    def context_len(self) -> int:
        return self.stop

    @property
    def num_rows(self) -> int:
        """Tokens whose logits are wanted."""
        return self.stop - self.start if self.scored else int(self.final)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStep:
    """One batch. No chunks: nothing more can be computed until a call changes something."""

    chunks: tuple[Chunk, ...]

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillBooks:
    """Requests by phase, and token counts for ``protocol.workers.WorkerLoad``."""

    waiting: int
    computing: int
    pinned: int  # computed or withdrawn, blocks held until ``release``
    queued_tokens: int  # not computed yet, of waiting and computing prompts
    prompt_tokens: int  # of all prompts started so far
    prefix_hit_tokens: int  # those of them that were not computed anew


class PrefillScheduler:
    """Chunks for one prefill worker.

    ``fingerprint`` is the model's; with a request's namespace it makes the prefix cache's keys.
    A step is ``schedule``, compute, ``complete``; other calls may come in between, and also the
    ``schedule`` of later steps, which the caller completes in the same order.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix_index: PrefixIndex,
        *,
        block_tokens: int,
        fingerprint: str,
        limits: PrefillLimits,
    ) -> None:
        if limits.max_batch_tokens < block_tokens:
            raise ValueError(
                f"max_batch_tokens must be at least block_tokens ({block_tokens}), "
                f"got {limits.max_batch_tokens}"
            )
        self._pool = pool
        self._index = prefix_index
        self._block_tokens = block_tokens
        self._fingerprint = fingerprint
        self._limits = limits
        self._queue = PromptQueue()  # not computed yet
        self._pinned: dict[AttemptRef, Prompt] = {}
        self._in_flight: dict[bytes, AttemptRef] = {}  # blocks being computed, by whom
        self._steps: deque[PrefillStep] = deque()  # not complete, the oldest first
        self._prompt_tokens = 0
        self._hit_tokens = 0

    def __contains__(self, ref: AttemptRef) -> bool:
        """Whether anything waits, is computed or is held for this attempt."""
        return ref in self._queue or ref in self._pinned

    def add(
        self, request: GenerateRequest, arrived_s: float, deadline_s: float | None = None
    ) -> AttemptRef | None:
        """Queue a prompt. Times are the caller's clock's; ``expire`` compares with them.

        Returns:
            The waiting prompt of another account that left a full queue for it, if one had to.

        Raises:
            ContextLengthExceeded: the prompt can never fit into this worker's blocks.
            Overloaded: the queue is full, and nobody has to leave it for this one.
        """
        ref, tokens = request.ref, request.context_token_ids
        num_tokens = len(tokens)
        assert num_tokens > 0, "an empty prompt has no logits"
        assert ref not in self, f"{ref} was added twice"
        needed = blocks_for(num_tokens, self._block_tokens)
        if needed > self._pool.num_blocks:
            room = self._pool.num_blocks * self._block_tokens
            raise ContextLengthExceeded(
                f"the prompt has {num_tokens} tokens; a prefill worker here has room for {room}",
                stage="queue",
            )
        gives_way = None
        if self._queue.num_waiting >= self._limits.max_queued_requests:
            gives_way = self._queue.last_behind(request)
            if gives_way is None:
                raise self.queue_full()
            self.cancel(gives_way)
        hashes = block_hashes(
            tokens,
            block_tokens=self._block_tokens,
            namespace=request.namespace,
            fingerprint=self._fingerprint,
        )
        prompt = Prompt(
            request=request,
            tokens=tokens,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            hashes=hashes,
            matchable=hashes[: _matchable_tokens(request) // self._block_tokens],
            table=BlockTable(self._block_tokens),
        )
        self._queue.add(prompt)
        return gives_way

    def queue_full(self) -> Overloaded:
        """What whoever is not let into the queue, or has to leave it, is told."""
        return Overloaded(
            f"the prefill queue is full ({self._limits.max_queued_requests} requests)",
            stage="queue",
        )

    def cancel(self, ref: AttemptRef) -> bool:
        """Compute no more of a prompt, in whatever phase; unknown ones are ignored.

        Returns:
            Whether blocks are held: the caller then stops its push and calls ``release``.
        """
        prompt = self._queue.find(ref)
        if prompt is not None:
            self._queue.remove(ref)
            if prompt.phase == "waiting":
                return False
        else:
            prompt = self._pinned.get(ref)
        if prompt is None:
            return False
        self._withdraw(prompt)
        return True

    def reject(self, ref: AttemptRef) -> bool:
        """``cancel``, and keep nothing of the prompt for reuse: its KV is not to be trusted."""
        held = self.cancel(ref)
        if held:
            self._index.forget(self._pinned[ref].table.blocks)
        return held

    def expire(self, now_s: float) -> list[AttemptRef]:
        """Cancel every prompt that is not computed by its deadline, and name them.

        For each, call ``release`` as after ``cancel``; it is harmless where no blocks are held.
        """
        late = [
            prompt.request.ref
            for prompt in self._queue
            if prompt.deadline_s is not None and prompt.deadline_s <= now_s
        ]
        for ref in late:
            self.cancel(ref)
        return late

    def schedule(self) -> PrefillStep:
        """The next batch, within ``max_batch_tokens`` and ``max_batch_sequences``."""
        budget = self._limits.max_batch_tokens
        chunks: list[Chunk] = []
        no_blocks = False
        # a bound on how far past deferred prompts a step looks
        for prompt in self._queue.turns(most_waiting=self._limits.max_batch_sequences):
            if budget == 0 or len(chunks) == self._limits.max_batch_sequences:
                break
            if prompt.phase == "waiting":
                started = "no blocks" if no_blocks else self._start(prompt, budget)
                no_blocks = started == "no blocks"
                if started != "started":
                    continue
            start, stop = prompt.given, self._chunk_end(prompt.given, prompt.num_tokens, budget)
            if stop == start:
                continue
            chunks.append(self._chunk(prompt, start, stop))
            self._queue.charge(prompt, stop - start)
            budget -= stop - start
        step = PrefillStep(chunks=tuple(chunks))
        if chunks:
            self._steps.append(step)
        return step

    def complete(self, step: PrefillStep) -> None:
        """The step's KV is in the cache. Final full blocks become prefix hits for later prompts.

        After a failed step, ``cancel`` or ``reject`` its requests first: what is cancelled counts
        as not computed.
        """
        if not step.chunks:
            return
        assert step is self._steps[0], "complete the oldest step"
        self._steps.popleft()
        for chunk in step.chunks:
            prompt = self._find(chunk.ref)
            prompt.in_steps -= 1
            if prompt.phase == "computing":
                self._advance(prompt, chunk)
            elif prompt.release_after_steps:
                self.release(chunk.ref)

    def release(self, ref: AttemptRef) -> None:
        """Unpin a computed or cancelled prompt's blocks: nothing reads them any more.

        Full blocks stay in the prefix cache. Harmless for what is not held, or twice. During steps
        that still write into the blocks it takes effect when they are complete.
        """
        prompt = self._pinned.get(ref)
        if prompt is None:
            assert ref not in self._queue, f"{ref} is not computed yet"
            return
        if prompt.in_steps:
            prompt.release_after_steps = True
            return
        del self._pinned[ref]
        self._pool.release(prompt.table.take_all())

    def books(self) -> PrefillBooks:
        waiting = self._queue.num_waiting
        return PrefillBooks(
            waiting=waiting,
            computing=len(self._queue) - waiting,
            pinned=len(self._pinned),
            queued_tokens=sum(prompt.num_tokens - prompt.computed for prompt in self._queue),
            prompt_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._hit_tokens,
        )

    def cached_tokens(self, ref: AttemptRef) -> int:
        """How many tokens of a started prompt were prefix hits; it is not released yet."""
        return self._find(ref).hits * self._block_tokens

    def _find(self, ref: AttemptRef) -> Prompt:
        return self._queue.find(ref) or self._pinned[ref]

    def check(self) -> None:
        """Assert that the pool's books balance and that every owner is one of the prompts here."""
        self._pool.check()
        holders: dict[BlockId, int] = {}
        for prompt in chain(self._queue, self._pinned.values()):
            for block in prompt.table.blocks:
                holders[block] = holders.get(block, 0) + 1
        assert len(holders) == self._pool.num_held, "blocks are held by nobody known"
        for block, count in holders.items():
            assert self._pool.owners(block) == count, f"block {block} has a wrong owner count"

    def _start(self, prompt: Prompt, budget: int) -> Literal["started", "not now", "no blocks"]:
        """Give a waiting prompt all its blocks, prefix hits first, if it can use the budget."""
        if prompt.blocked_on is not None and self._is_coming(prompt.blocked_on, prompt):
            return "not now"
        matching = self._index.num_matching(prompt.matchable)
        missing = prompt.matchable[matching : matching + 1]
        if missing and self._is_coming(missing[0], prompt):
            prompt.blocked_on = missing[0]  # computed once, by whoever came first
            return "not now"
        computed = matching * self._block_tokens
        if self._chunk_end(computed, prompt.num_tokens, budget) == computed:
            return "not now"
        hits = self._index.match(prompt.matchable)
        needed = blocks_for(prompt.num_tokens, self._block_tokens) - len(hits)
        if needed > self._pool.num_available:
            self._pool.release(hits)
            return "no blocks"
        prompt.table = BlockTable(self._block_tokens, hits + self._pool.allocate(needed))
        prompt.hits, prompt.phase = len(hits), "computing"
        prompt.computed = prompt.given = computed
        self._prompt_tokens += prompt.num_tokens
        self._hit_tokens += computed
        for name in prompt.hashes[len(hits) :]:
            self._in_flight.setdefault(name, prompt.request.ref)
        self._queue.started(prompt)
        return "started"

    def _is_coming(self, block: bytes, prompt: Prompt) -> bool:
        """Whether somebody computes the block whom ``prompt`` can wait for: one of a lower priority
        may have to wait for others.
        """
        owner = self._queue.find(self._in_flight[block]) if block in self._in_flight else None
        return owner is not None and owner.request.priority >= prompt.request.priority

    def _chunk_end(self, start: int, num_tokens: int, budget: int) -> int:
        if num_tokens - start <= budget:
            return num_tokens
        return start + budget // self._block_tokens * self._block_tokens

    def _chunk(self, prompt: Prompt, start: int, stop: int) -> Chunk:
        final = stop == prompt.num_tokens
        final_blocks = blocks_for(stop, self._block_tokens)
        first_block, prompt.pushed = prompt.pushed, final_blocks
        prompt.in_steps += 1
        prompt.given = stop
        return Chunk(
            ref=prompt.request.ref,
            start=start,
            stop=stop,
            token_ids=prompt.tokens[start:stop],
            next_token_ids=prompt.tokens[start + 1 : stop + 1],
            table=prompt.table,
            final=final,
            first_block=first_block,
            source_blocks=tuple(prompt.table.blocks[first_block:final_blocks]),
            hit_blocks=prompt.hits if first_block == 0 else 0,
            scored=prompt.request.sampling.prompt_logprobs is not None,
        )

    def _advance(self, prompt: Prompt, chunk: Chunk) -> None:
        first, last = chunk.start // self._block_tokens, chunk.stop // self._block_tokens
        hashes = prompt.hashes[first:last]
        self._index.insert(hashes, prompt.table.blocks[first:last])
        self._land(prompt, hashes)
        prompt.computed = chunk.stop
        if chunk.final:
            prompt.phase = "computed"
            self._queue.remove(chunk.ref)
            self._pinned[chunk.ref] = prompt

    def _withdraw(self, prompt: Prompt) -> None:
        prompt.phase = "withdrawn"
        self._pinned[prompt.request.ref] = prompt
        self._land(prompt, prompt.hashes)

    def _land(self, prompt: Prompt, hashes: Sequence[bytes]) -> None:
        """``prompt`` does not compute these blocks any more: they are done or never will be."""
        for name in hashes:
            if self._in_flight.get(name) == prompt.request.ref:
                del self._in_flight[name]


def _matchable_tokens(request: GenerateRequest) -> int:
    """Tokens that a prefix hit may spare: not the last one, because its logits are wanted, and
    none at all where every token's are.
    """
    if request.sampling.prompt_logprobs is not None:
        return 0
    return request.num_context_tokens - 1
