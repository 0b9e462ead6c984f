"""How the ranks of one life settle on shared memory, or on why there is none.

Every rank says where it is; where that is one host, the first one makes the memory, all try to map
it, and each says whether it could. All read the same answers, so all come to the same end.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from torch._C._distributed_c10d import Store

from engine.one_host.segment import Life, Offer, create, opened
from engine.one_host.shared_rows import SharedRows
from engine.one_host.whereabouts import Mourner, Whereabouts, is_known

T = TypeVar("T")


def join(
    store: Store,
    life: Life,
    *,
    rank: int,
    seats: Sequence[int],
    where: Whereabouts,
    timeout_s: float,
) -> SharedRows | str:
    """This rank's end of the memory of ``life``; or, on all ranks, why they share none.

    ``rank`` is this process' place among ``seats``, and ``where`` is where it is. ``store`` is of
    this life alone. A rank that keeps the others waiting for ``timeout_s`` in an operation counts
    as lost.

    Raises:
        RuntimeError: a rank does not answer within the store's own timeout.
    """
    size = life.size
    store.set(f"where/{rank}", msgspec.json.encode(where).decode())
    found = _all(store, "where", size)
    processes = [_read(where, Whereabouts) for where in found]
    apart = _apart(processes, seats)
    if apart:
        return apart
    offered = _offer(store, life) if rank == 0 else None
    failure, rows = "", None
    try:
        offer = _read(store.get("memory"), Offer)
        segment = opened(offer, life, processes[0])
        others = {other: where for other, where in enumerate(processes) if other != rank}
        rows = SharedRows(
            segment, rank=rank, seats=seats, mourner=Mourner(others), timeout_s=timeout_s
        )
    except OSError as error:
        failure = f"rank {seats[rank]} cannot share memory: {error}"
    store.set(f"mapped/{rank}", failure)
    failures = [told.decode() for told in _all(store, "mapped", size) if told]
    if offered is not None:
        os.close(offered)
    if failures or rows is None:
        if rows is not None:
            rows.abort()
        return failures[0]
    return rows


def _offer(store: Store, life: Life) -> int | None:
    """Make the memory; its descriptor, to be closed when all have opened it."""
    descriptor, failure = None, ""
    try:
        descriptor = create(life)
    except OSError as error:
        failure = f"no memory to share: {error}"
    offer = Offer(pid=os.getpid(), descriptor=descriptor or 0, failure=failure)
    store.set("memory", msgspec.json.encode(offer).decode())
    return descriptor


def _apart(processes: list[Whereabouts], seats: Sequence[int]) -> str:
    """Why these share no memory; empty where they may."""
    for seat, process in zip(seats, processes, strict=True):
        if not is_known(process):
            return f"rank {seat} cannot share memory: {process.host}"
        if process.host != processes[0].host:
            return f"rank {seat} is on another host than rank {seats[0]}, or in another container"
    return ""


def _all(store: Store, name: str, size: int) -> list[bytes]:
    found: list[bytes] = store.multi_get([f"{name}/{rank}" for rank in range(size)])
    return found


def _read(told: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(told, type=kind)
    except msgspec.DecodeError as error:
        raise RuntimeError(f"a rank of another release says {told!r}") from error
