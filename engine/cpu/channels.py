"""Bytes between the processes of one host, through memory that they all map.

From every rank to every rank there is a channel: a ring of bytes with two counters, of what its
sender has written and of what its receiver has read, each on cache lines that one of them alone
writes. Bytes are copied in by the sender and out by the receiver, in the order in which operations
were begun. A rank that has to wait watches for a while, then sleeps until a rank it needs rings its
bell; it says beforehand whom it needs, so no rank makes a system call for one that is awake. What
operations mean, and who is alive, is unknown here.

An operation is ``4 * size + 1`` words: by rank, where to read what goes there, how many bytes are
left of it, where to put what comes from there, how many are left of that; and how many are left in
all.
"""

import platform
from functools import cache
from typing import Any

import numba
from numba import njit, types

from engine.cpu.atomics import count_up, observe, observe_counter, publish, settle
from engine.cpu.threads import Kernel
from engine.cpu.values import load_integer, store_integer

HEADER_BYTES = 128
RANK_BYTES = 128  # the bell, and a line further whether the rank has left
LEFT_AT = 64
CHANNEL_BYTES = 256  # the sender's line or two, then the receiver's
RECEIVER_AT = 128
WAITS_AT = 8  # after each counter: whether its writer sleeps until the other one moves
WORD = 8

DONE, SLICE_OVER = 1, 0  # outcomes; -1 - rank: that rank has left, and its bytes are needed
OUTCOME_AT, WAITED_AT, CROWDED_AT, SCRATCH_WORDS = 2, 3, 4, 5

_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}
FUTEX = _FUTEX_NUMBERS.get(platform.machine()) if platform.system() == "Linux" else None
"""The number of the system call; None where it is not known, and nothing here can be used."""

_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1
_MONOTONIC = 1
_SECOND = 10**9
_STOLEN_NS = 200_000  # a core that was given away and came back so late is wanted by others
_CROWDED_WAITS = 50  # then this rank does not watch: who sleeps is soon given a core when woken

_system_call = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_copy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
_give_way = types.ExternalFunction("sched_yield", types.int32())


def ring_offset(size: int) -> int:
    """Where the rings begin; the one from rank s to rank d is the ``s * size + d``-th."""
    lines = HEADER_BYTES + size * RANK_BYTES + size * size * CHANNEL_BYTES
    return -(-lines // 4096) * 4096


@njit(inline="always")
def _now(scratch: int) -> Any:
    _clock(_MONOTONIC, scratch)
    return load_integer(scratch, 0) * _SECOND + load_integer(scratch, 1)


@njit(inline="always")
def _rank_line(memory: int, rank: int) -> int:
    return memory + HEADER_BYTES + rank * RANK_BYTES


@njit(inline="always")
def _channel(memory: int, size: int, source: int, target: int) -> int:
    lines = memory + HEADER_BYTES + size * RANK_BYTES
    return lines + (source * size + target) * CHANNEL_BYTES


@njit(inline="always")
def _ring(memory: int, ring_bytes: int, size: int, source: int, target: int) -> int:
    lines = HEADER_BYTES + size * RANK_BYTES + size * size * CHANNEL_BYTES
    rings = memory + (lines + 4095) // 4096 * 4096
    return rings + (source * size + target) * ring_bytes


@njit(inline="always")
def _wake(memory: int, rank: int, futex: int) -> None:
    bell = _rank_line(memory, rank)
    count_up(bell)
    _system_call(futex, bell, _WAKE, _ALL, 0, 0, 0)


@njit
def _send(  # a function of its own: it is called from two places
    memory: int,
    ring_bytes: int,
    size: int,
    me: int,
    target: int,
    operations: int,
    count: int,
    futex: int,
) -> int:
    """Move on what goes to ``target`` as far as there is room; the bytes that moved."""
    channel = _channel(memory, size, me, target)
    ring = _ring(memory, ring_bytes, size, me, target)
    written = load_integer(channel, 0)
    room = ring_bytes - (written - observe(channel + RECEIVER_AT))
    moved = 0
    for number in range(count):
        operation = load_integer(operations, number)
        left = load_integer(operation, size + target)
        if left == 0:
            continue
        part = min(left, room - moved)
        source = load_integer(operation, target)
        at = (written + moved) % ring_bytes
        first = min(part, ring_bytes - at)
        _copy(ring + at, source, first)
        if part > first:
            _copy(ring, source + first, part - first)
        store_integer(operation, target, source + part)
        store_integer(operation, size + target, left - part)
        store_integer(operation, 4 * size, load_integer(operation, 4 * size) - part)
        moved += part
        if part < left:
            break
    if moved > 0:
        publish(channel, written + moved)
        settle()
        if observe(channel + RECEIVER_AT + WAITS_AT) != 0:
            _wake(memory, target, futex)
    return moved


@njit
def _receive(
    memory: int,
    ring_bytes: int,
    size: int,
    me: int,
    source: int,
    operations: int,
    count: int,
    futex: int,
) -> int:
    """Move on what comes from ``source`` as far as it has come; the bytes that moved."""
    channel = _channel(memory, size, source, me)
    ring = _ring(memory, ring_bytes, size, source, me)
    read = load_integer(channel + RECEIVER_AT, 0)
    here = observe(channel) - read
    moved = 0
    if here == 0:
        return moved
    for number in range(count):
        operation = load_integer(operations, number)
        left = load_integer(operation, 3 * size + source)
        if left == 0:
            continue
        part = min(left, here - moved)
        target = load_integer(operation, 2 * size + source)
        at = (read + moved) % ring_bytes
        first = min(part, ring_bytes - at)
        _copy(target, ring + at, first)
        if part > first:
            _copy(target + first, ring, part - first)
        store_integer(operation, 2 * size + source, target + part)
        store_integer(operation, 3 * size + source, left - part)
        store_integer(operation, 4 * size, load_integer(operation, 4 * size) - part)
        moved += part
        if part < left:
            break
    if moved > 0:
        publish(channel + RECEIVER_AT, read + moved)
        settle()
        if observe(channel + WAITS_AT) != 0:
            _wake(memory, source, futex)
    return moved


@njit(inline="always")
def _keep(size: int, me: int, operations: int, count: int) -> int:
    """Copy what this rank sends itself."""
    moved = 0
    for number in range(count):
        operation = load_integer(operations, number)
        part = load_integer(operation, size + me)
        if part > 0:
            _copy(load_integer(operation, 2 * size + me), load_integer(operation, me), part)
            store_integer(operation, size + me, 0)
            store_integer(operation, 3 * size + me, 0)
            left = load_integer(operation, 4 * size) - 2 * part
            store_integer(operation, 4 * size, left)
            moved += part
    return moved


@njit
def _move(
    memory: int, ring_bytes: int, size: int, me: int, operations: int, count: int, futex: int
) -> Any:
    """Send and receive what can be, of all operations; the bytes that moved."""
    moved = _keep(size, me, operations, count)
    for distance in range(1, size):
        rank = (me + distance) % size
        moved += _send(memory, ring_bytes, size, me, rank, operations, count, futex)
    for distance in range(1, size):
        rank = (me + distance) % size
        moved += _receive(memory, ring_bytes, size, me, rank, operations, count, futex)
    return moved


@njit(inline="always")
def _is_done(size: int, operations: int, awaited: int) -> bool:
    for number in range(awaited + 1):
        if load_integer(load_integer(operations, number), 4 * size) != 0:
            return False
    return True


@njit(inline="always")
def _needs(size: int, rank: int, operations: int, awaited: int) -> bool:
    """Whether what is awaited waits for ``rank``."""
    for number in range(awaited + 1):
        operation = load_integer(operations, number)
        if load_integer(operation, size + rank) + load_integer(operation, 3 * size + rank) > 0:
            return True
    return False


@njit(inline="always")
def _needed_that_left(memory: int, size: int, me: int, operations: int, awaited: int) -> int:
    for rank in range(size):
        left = rank != me and observe(_rank_line(memory, rank) + LEFT_AT) != 0
        if left and _needs(size, rank, operations, awaited):
            return rank
    return -1


@njit(inline="always")
def _say_waiting(memory: int, size: int, me: int, operations: int, count: int, awaited: int) -> int:
    """Let the first rank whose bytes are awaited, and all that lack room, wake this one; the first.

    The others' bytes are looked for when that one's have come.
    """
    first = -1
    for rank in range(size):
        for number in range(count):
            operation = load_integer(operations, number)
            if first < 0 and number <= awaited and load_integer(operation, 3 * size + rank) > 0:
                first = rank
                publish(_channel(memory, size, rank, me) + RECEIVER_AT + WAITS_AT, 1)
            if load_integer(operation, size + rank) > 0:
                publish(_channel(memory, size, me, rank) + WAITS_AT, 1)
    return first


@njit(inline="always")
def _say_awake(memory: int, size: int, me: int, first: int) -> None:
    if first >= 0:
        publish(_channel(memory, size, first, me) + RECEIVER_AT + WAITS_AT, 0)
    for rank in range(size):
        flag = _channel(memory, size, me, rank) + WAITS_AT
        if load_integer(flag, 0) != 0:
            publish(flag, 0)


@njit(inline="always")
def _sleep(
    memory: int,
    ring_bytes: int,
    size: int,
    me: int,
    operations: int,
    count: int,
    awaited: int,
    slice_ns: int,
    scratch: int,
    futex: int,
) -> int:
    """Until a rank that this one waits for has moved something, or left; who has, or -1."""
    bell = _rank_line(memory, me)
    rung = observe_counter(bell)
    first = _say_waiting(memory, size, me, operations, count, awaited)
    settle()
    gone = _needed_that_left(memory, size, me, operations, awaited)
    moved = _move(memory, ring_bytes, size, me, operations, count, futex)
    if gone < 0 and moved == 0:
        store_integer(scratch, 0, 0)
        store_integer(scratch, 1, slice_ns)
        _system_call(futex, bell, _WAIT, rung, scratch, 0, 0)
    _say_awake(memory, size, me, first)
    return gone if moved == 0 else -1


@cache
def advance() -> Kernel:
    """``(memory, ring_bytes, size, me, operations, count, awaited, watch_ns, slice_ns, scratch,
    futex)``: move on all ``count`` operations, whose addresses are at ``operations`` in the order
    of their beginning; and if ``awaited`` is not -1, until that one and those before it are done.

    Watches for ``watch_ns`` and sleeps after that; sleeps at once where watching would have been in
    vain the last time, or where others kept the core that was offered to them, lately. Word
    ``OUTCOME_AT`` of ``scratch`` is then ``DONE``; ``SLICE_OVER`` after ``slice_ns``, or without
    ``awaited``; or tells who has left.
    """

    def run(arguments: Any) -> None:
        memory, ring_bytes, size, me = arguments[0], arguments[1], arguments[2], arguments[3]
        operations, count, awaited = arguments[4], arguments[5], arguments[6]
        watch_ns, slice_ns = arguments[7], arguments[8]
        scratch, futex = arguments[9], arguments[10]
        began, now, gone = -1, -1, -1
        crowded = load_integer(scratch, CROWDED_AT)
        if load_integer(scratch, WAITED_AT) > watch_ns or crowded > 0:
            watch_ns = 0
        outcome = SLICE_OVER
        while now - began < slice_ns and outcome == SLICE_OVER:
            moved = _move(memory, ring_bytes, size, me, operations, count, futex)
            if awaited < 0:
                break
            if _is_done(size, operations, awaited):
                outcome = DONE
            elif moved > 0:
                gone = -1
            elif gone >= 0:  # what it sent before it left has come
                outcome = -1 - gone
            else:
                now = _now(scratch)
                began = now if began < 0 else began
                if now - began < watch_ns:
                    _give_way()
                    if _now(scratch) - now > _STOLEN_NS:
                        crowded, watch_ns = _CROWDED_WAITS, 0
                else:
                    watch_ns = 0
                    gone = _sleep(
                        memory,
                        ring_bytes,
                        size,
                        me,
                        operations,
                        count,
                        awaited,
                        slice_ns,
                        scratch,
                        futex,
                    )
        store_integer(scratch, OUTCOME_AT, outcome)
        if awaited >= 0:
            store_integer(scratch, WAITED_AT, 0 if began < 0 else _now(scratch) - began)
            store_integer(scratch, CROWDED_AT, max(crowded - 1, 0))

    return Kernel(run, ("advance", numba.__version__))


@cache
def leave() -> Kernel:
    """``(memory, size, rank, futex)``: say for ``rank`` that it has left, and wake all."""

    def run(arguments: Any) -> None:
        memory, size, rank, futex = arguments[0], arguments[1], arguments[2], arguments[3]
        publish(_rank_line(memory, rank) + LEFT_AT, 1)
        for other in range(size):
            _wake(memory, other, futex)

    return Kernel(run, ("leave", numba.__version__))
