"""Whose turn it is on a rank that is too small for what all callers ask of it.

Each caller has an account of what it holds. Where one is alone, its oldest sequences come first.
Where there are several, higher priorities come first, and among equals whoever holds least:
``protocol.holdings`` says how much that is. Orders depend on the accounts and on age only, so equal
books give equal decisions. No blocks are taken or given here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from engine.kvcache.block_table import BlockTable
from protocol.holdings import Holding, fair_part, standing
from protocol.ids import AttemptRef


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """Of one caller at one priority."""

    caller: str
    priority: int
    blocks: int = 0  # granted, active and quarantined
    requests: int = 0  # in whatever state
    swapped: int = 0  # of them those that are swapped out


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceEntry:
    """One committed request."""

    ref: AttemptRef
    account: Account
    ordinal: int  # order of commit: the youngest has the highest
    position: int  # of the newest token, whose KV the next step computes
    token_id: int
    max_total_tokens: int
    table: BlockTable
    stays_until: int = 0  # the position before which no reservation swaps it out


age = attrgetter("ordinal")


class Accounts:
    def __init__(self) -> None:
        self._accounts: dict[tuple[str, int], Account] = {}

    def __len__(self) -> int:
        return len(self._accounts)

    def find(self, caller: str, priority: int) -> Account:
        """The caller's account, a new one if it holds nothing; ``keep`` enters it."""
        return self._accounts.get((caller, priority)) or Account(caller=caller, priority=priority)

    def keep(self, account: Account) -> None:
        """One request more."""
        account.requests += 1
        self._accounts[account.caller, account.priority] = account

    def drop(self, account: Account) -> None:
        """One request less; an account without any is forgotten."""
        account.requests -= 1
        if not account.requests:
            assert not account.blocks, f"{account.blocks} blocks of nobody"
            assert not account.swapped, f"{account.swapped} swapped requests of nobody"
            del self._accounts[account.caller, account.priority]

    @property
    def blocks(self) -> int:
        return sum(account.blocks for account in self._accounts.values())

    def rows(self, resident: Sequence[SequenceEntry], most: int) -> list[SequenceEntry]:
        """Those that take part in a step, by age: the first of each caller, then the second ..."""
        if len(resident) <= most or len(self._accounts) == 1:
            return list(resident[:most])
        older: dict[Account, int] = {}
        places = []
        for sequence in resident:
            account = sequence.account
            place = older[account] = older.get(account, -1) + 1
            places.append((-account.priority, place, sequence.ordinal, sequence))
        places.sort(key=lambda place: place[:3])
        return sorted((place[3] for place in places[:most]), key=age)

    def first_back(self, swapped: Sequence[SequenceEntry]) -> SequenceEntry:
        """Of those that are swapped out, the one that resumes first."""
        if len(self._accounts) == 1:
            return swapped[0]
        return min(swapped, key=lambda one: (standing(one.account), one.ordinal))

    def first_out(self, resident: Sequence[SequenceEntry]) -> SequenceEntry:
        """The one to preempt for a running sequence, which may be that one itself."""
        if len(self._accounts) == 1:
            return resident[-1]
        return max(resident, key=lambda one: (standing(one.account), one.ordinal))

    def giving_way(
        self,
        resident: Sequence[SequenceEntry],
        account: Account,
        *,
        wanted: int,
        missing: int,
        total: int,
    ) -> list[SequenceEntry]:
        """Sequences to preempt so that ``account`` gets ``wanted`` blocks, ``missing`` of which are
        not there; empty where it may not ask for so much.

        Others of its priority give way only while they hold more than their part, and only to one
        that stays within. A sequence that has just been brought back stays until it has a token for
        each block that was copied. A caller's own swapped requests come before its new ones.
        """
        if account.swapped:
            return []
        part = fair_part(total, account.priority, self._others(account))
        within = account.blocks + wanted <= part
        held: dict[Account, int] = {}
        free_to_go = []
        for one in resident:
            below = one.account.priority < account.priority
            equal = one.account.priority == account.priority and one.account is not account
            if (below or (equal and within)) and one.position >= one.stays_until:
                held[one.account] = one.account.blocks
                free_to_go.append(one)
        found: list[SequenceEntry] = []
        while missing > 0:
            able = [
                one
                for one in free_to_go
                if one.account.priority < account.priority or held[one.account] > part
            ]
            if not able:
                return []
            chosen = max(
                able, key=lambda one: (-one.account.priority, held[one.account], one.ordinal)
            )
            free_to_go.remove(chosen)
            found.append(chosen)
            held[chosen.account] -= len(chosen.table.blocks)
            missing -= len(chosen.table.blocks)
        return found

    def holdings(self, resident: Iterable[SequenceEntry]) -> tuple[Holding, ...]:
        yielding = dict.fromkeys(self._accounts.values(), 0)
        for one in resident:
            if one.position >= one.stays_until:
                yielding[one.account] += len(one.table.blocks)
        return tuple(
            Holding(
                caller=account.caller,
                priority=account.priority,
                blocks=account.blocks,
                yielding=blocks,
                swapped_requests=account.swapped,
            )
            for account, blocks in yielding.items()
        )

    def _others(self, account: Account) -> list[Account]:
        return [other for other in self._accounts.values() if other is not account]
