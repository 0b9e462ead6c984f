"""Prompts that are not computed yet, and whose turn it is. No blocks are taken or given here.

Each caller has an account of the tokens that were computed for it. Higher priorities come first,
and among equals the caller that has been given least; its own prompts follow in order of arrival.
So a flood of one caller costs another one that asks for little a step, and a caller that is alone
is served in order of arrival. Who comes begins level with the one that has been given least, and
before it: nobody saves up turns by staying away. Source: Sheng et al., "Fairness in serving large
language models", OSDI 2024, section 4 (virtual token counter).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import chain, count, islice
from typing import Literal

from engine.kvcache.block_table import BlockTable
from protocol.ids import AttemptRef
from protocol.requests import GenerateRequest

Phase = Literal["waiting", "computing", "computed", "withdrawn"]


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One request on a prefill worker, from its arrival until its blocks are released."""

    request: GenerateRequest
    tokens: tuple[int, ...]  # the prompt, and what earlier attempts wrote
    arrived_s: float
    deadline_s: float | None
    hashes: list[bytes]
    matchable: list[bytes]  # hashes of the blocks that may be prefix hits
    table: BlockTable
    phase: Phase = "waiting"
    computed: int = 0  # tokens whose KV is in the blocks, prefix hits included
    given: int = 0  # and those of steps that are not complete
    hits: int = 0  # blocks
    pushed: int = 0  # blocks that some chunk has named final
    blocked_on: bytes | None = None  # a block that another prompt is computing
    in_steps: int = 0  # that are not complete
    release_after_steps: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """Of one caller at one priority."""

    priority: int
    given: int = 0  # tokens, or as many as the one had with which it began level
    came: int = 0  # the order in which accounts came to have prompts here
    is_new: bool = True  # it has been given nothing since then
    waiting: dict[AttemptRef, Prompt] = field(default_factory=dict[AttemptRef, Prompt])
    computing: dict[AttemptRef, Prompt] = field(default_factory=dict[AttemptRef, Prompt])

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.computing

    @property
    def place(self) -> tuple[int, int, bool, int]:
        """The smallest is next."""
        return -self.priority, self.given, not self.is_new, self.came

    def prompts(self, most_waiting: int) -> list[Prompt]:
        """Those that compute, then those that wait, each in order of arrival."""
        return [*self.computing.values(), *islice(self.waiting.values(), most_waiting)]


class PromptQueue:
    def __init__(self) -> None:
        self._accounts: dict[tuple[str, int], Account] = {}
        self._owners: dict[AttemptRef, Account] = {}
        self._comings = count()

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, ref: AttemptRef) -> bool:
        return ref in self._owners

    def __iter__(self) -> Iterator[Prompt]:
        """Every prompt, in no particular order."""
        for account in self._accounts.values():
            yield from chain(account.waiting.values(), account.computing.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def add(self, prompt: Prompt) -> None:
        request = prompt.request
        account = self._accounts.setdefault(
            (request.caller, request.priority), Account(priority=request.priority)
        )
        if account.is_empty:
            equals = (a.given for a in self._active() if a.priority == account.priority)
            account.given = max(account.given, min(equals, default=0))
            account.came, account.is_new = next(self._comings), True
        account.waiting[request.ref] = prompt
        self._owners[request.ref] = account

    def find(self, ref: AttemptRef) -> Prompt | None:
        account = self._owners.get(ref)
        if account is None:
            return None
        return account.computing.get(ref) or account.waiting[ref]

    def started(self, prompt: Prompt) -> None:
        """It computes from now on: it comes before those of its caller that wait."""
        ref = prompt.request.ref
        account = self._owners[ref]
        account.computing[ref] = account.waiting.pop(ref)

    def charge(self, prompt: Prompt, tokens: int) -> None:
        account = self._owners[prompt.request.ref]
        account.given += tokens
        account.is_new = False

    def remove(self, ref: AttemptRef) -> None:
        account = self._owners.pop(ref)
        account.computing.pop(ref, None) or account.waiting.pop(ref)
        if not self._owners:
            self._accounts.clear()  # nobody is there for whom it would matter who was given what

    def turns(self, most_waiting: int) -> Iterator[Prompt]:
        """Prompts in the order in which they may use a step, of each caller at most so many that
        wait. What is charged between two of them decides who is next.
        """
        heap = [
            (account.place, account, iter(account.prompts(most_waiting)))
            for account in self._active()
        ]
        heapify(heap)
        while heap:
            _, account, prompts = heap[0]
            prompt = next(prompts, None)
            if prompt is None:
                heappop(heap)
            else:
                yield prompt
                heapreplace(heap, (account.place, account, prompts))

    def last_behind(self, request: GenerateRequest) -> AttemptRef | None:
        """The waiting prompt that gives its place up to ``request`` where there is only one: the
        youngest of the caller of the lowest priority that has most of them. None if that is no
        worse off than the request's own caller would be.
        """
        crowded = [account for account in self._accounts.values() if account.waiting]
        if not crowded:
            return None
        longest = max(crowded, key=lambda account: (-account.priority, len(account.waiting)))
        own = self._accounts.get((request.caller, request.priority))
        own_waiting = len(own.waiting) if own is not None else 0
        if longest.priority == request.priority and len(longest.waiting) <= own_waiting + 1:
            return None
        return None if longest.priority > request.priority else next(reversed(longest.waiting))

    def _active(self) -> list[Account]:
        return [account for account in self._accounts.values() if not account.is_empty]
