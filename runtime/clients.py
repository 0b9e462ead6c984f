"""Which gateway owns which request at a worker, and which gateways have fallen silent.

Requests belong to a bus peer. A peer that sends nothing for ``silent_s`` is taken for dead and
what it owned is to be cancelled: a crashed gateway must not hold blocks.
"""

from protocol.ids import AttemptRef


class Clients:
    def __init__(self, *, silent_s: float) -> None:
        self._silent_s = silent_s
        self._heard_at: dict[bytes, float] = {}
        self._owned: dict[bytes, set[AttemptRef]] = {}
        self._owner: dict[AttemptRef, bytes] = {}

    def heard(self, peer: bytes, now: float) -> None:
        self._heard_at[peer] = now

    def own(self, peer: bytes, ref: AttemptRef) -> None:
        self._owner[ref] = peer
        self._owned.setdefault(peer, set()).add(ref)

    def owner(self, ref: AttemptRef) -> bytes | None:
        return self._owner.get(ref)

    def disown(self, ref: AttemptRef) -> None:
        """The request has ended; unknown ones are fine, an end may be told twice."""
        peer = self._owner.pop(ref, None)
        if peer is not None:
            self._owned[peer].discard(ref)

    def remove_silent(self, now: float) -> list[AttemptRef]:
        """Forget the peers that are taken for dead; what they owned, for the caller to cancel."""
        silent = [peer for peer, at in self._heard_at.items() if now - at > self._silent_s]
        orphans: list[AttemptRef] = []
        for peer in silent:
            del self._heard_at[peer]
            orphans.extend(self._owned.pop(peer, ()))
        for ref in orphans:
            del self._owner[ref]
        return orphans

    def __len__(self) -> int:
        return len(self._owner)
