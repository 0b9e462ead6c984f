"""Which replica of an expert a token goes to.

The choice is a pure function of the request, the token's position, its k-th expert and the layer:
not of the batch, the rank or the time, so load is reproducible and survives migration. The hash is
compared with the placement's shares: a replica gets the part of its expert's tokens that its share
is of the whole. Replicas hold equal bytes, so it never changes a result. Tables keep their
addresses when the placement changes. What an expert costs, where its replicas should be, and which
shares they should have, is unknown here.

Shape suffixes: T tokens   K chosen experts   E experts   P slots
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from engine.experts.placement import EMPTY, WHOLE_BITS, ExpertPlacement

# Odd 64-bit multipliers as int64: Steele, Lea and Flood's splitmix64 (OOPSLA 2014) and the golden
# ratio that it counts by. Products wrap, on every device alike.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_LAYER = 0xD6E8FEB86659FD93 - 2**64
_BEYOND = 2**62  # no expert and no hash reaches it


def request_key(request_id: str) -> int:
    """63 bits that stand for a request on every worker, whatever the attempt."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def token_keys(request_keys_T: Tensor, positions_T: Tensor) -> Tensor:
    """(T,) int64: well-mixed bits of each token's request and position."""
    mixed = request_keys_T + positions_T * _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return mixed ^ _shifted(mixed, 31)


class ReplicaTable:
    """One layer's way from logical experts to physical slots."""

    def __init__(
        self, placement: ExpertPlacement, *, layer: int, device: torch.device, movable: bool = False
    ) -> None:
        """``movable``: ``load`` will be called, and the next placement may have more replicas."""
        num_slots = placement.num_ranks * placement.slots_per_rank
        self._salt = _int64((layer + 1) * _LAYER)
        self._first_E = torch.zeros(placement.num_experts, dtype=torch.int64, device=device)
        # Slots by expert, and where each one's share ends: whole shares of the experts before it
        # are below. What is behind the last is never reached.
        self._slot_P = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._end_P = torch.full_like(self._slot_P, _BEYOND)
        self._salt_K = self._first_E.new_empty(0)
        self._chooses = movable or placement.has_replicas
        self.load(placement)

    def load(self, placement: ExpertPlacement, members: Sequence[int] | None = None) -> None:
        """Take another placement of the same experts on the same slots, in place.

        ``members`` are the seats that are taken, and only they hold experts; None: all.
        """
        per_rank = placement.slots_per_rank
        rank_of = {seat: rank for rank, seat in enumerate(members or range(placement.num_ranks))}
        replicas = placement.replicas()
        places = [divmod(slot, per_rank) for held in replicas for slot in held]
        slots = [rank_of[seat] * per_rank + local for seat, local in places]
        ends = list(accumulate(placement.shares[seat][local] for seat, local in places))
        firsts = list(accumulate(map(len, replicas[:-1]), initial=0))
        unused = self._slot_P.shape[0] - len(slots)
        self._first_E.copy_(torch.tensor(firsts))
        self._slot_P.copy_(torch.tensor(slots + [0] * unused))
        self._end_P.copy_(torch.tensor(ends + [_BEYOND] * unused))

    def __call__(self, ids_TK: Tensor, key_T: Tensor | None) -> Tensor:
        """(T, K): the slot of each id, ``rank * slots per rank + local slot`` by the rank among the
        members; -1 where the id is -1.

        ``key_T`` is from ``token_keys``; it is needed where experts have replicas.
        """
        known_TK = ids_TK.clamp_min(0)
        if self._chooses:
            assert key_T is not None, "a choice among replicas needs the tokens' keys"
            hashed_TK = (key_T.unsqueeze(1) ^ self._salts(ids_TK.shape[1])) * _SECOND
            hashed_TK = _shifted(hashed_TK, 64 - WHOLE_BITS)
            # The place of the first share that ends behind the hash, of all experts' in a row.
            place_TK = torch.searchsorted(
                self._end_P, (known_TK << WHOLE_BITS) + hashed_TK, right=True
            )
        else:
            place_TK = self._first_E[known_TK]
        return torch.where(ids_TK < 0, EMPTY, self._slot_P[place_TK])

    def _salts(self, num_chosen: int) -> Tensor:
        if self._salt_K.shape[0] != num_chosen:
            k_K = torch.arange(num_chosen, device=self._first_E.device)
            self._salt_K = (k_K + 1) * _GOLDEN + self._salt
        return self._salt_K


def _shifted(bits: Tensor, by: int) -> Tensor:
    """``bits >> by`` with zeros, not the sign, moving in."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _int64(number: int) -> int:
    """``number`` modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63
