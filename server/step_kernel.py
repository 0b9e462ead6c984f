"""The compiled part of ``server.step_writer``: from the records of a step to the sockets.

Between two frames other processes use this core's caches, so what Python touches for a token has to
come from memory again, and that is most of what a token costs. Here a token touches three or four
lines of its own.
"""

import socket
from typing import Any

from numba import njit, types

(
    NUMBER,  # the stream's; 0 while nobody writes to it from here
    OFFSET,  # of its next token
    DESCRIPTOR,
    BEFORE_BYTES,  # how many of the bytes around each text come before it, and after it
    AFTER_BYTES,
    COUNT,  # of tokens taken since the stream came here
    SENT,  # how many of them are on their way
    LAST_NS,  # when its last tokens came
    UNSENT,  # where in the scratch memory what the socket did not take begins, and ends
    UNSENT_END,
) = range(10)
ROW_WORDS = 16  # two cache lines
AROUND_BYTES = 768  # that there is room for
SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
TOKENS = 128  # that a stream has room for; then Python has a look
LEFT, BEHIND, TOUCHED = range(3)  # lists of ``write_tokens``: records, slots, and its own notes
FRAMING_BYTES = 16  # of a chunk, around its data: at most eight digits, and two line ends

_LAST_DIGIT = 9  # then letters follow
_NOWAIT = getattr(socket, "MSG_DONTWAIT", 0)
_SECOND = 10**9
_MONOTONIC = 1

_send = types.ExternalFunction(
    "send", types.int64(types.int32, types.int64, types.int64, types.int32)
)
_copy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@njit(inline="always")
def _put_length(scratch: Any, at: int, length: int) -> Any:
    """The hexadecimal length and a line end; where the data begins."""
    shift = 0
    while length >> (shift + 4):
        shift += 4
    while shift >= 0:
        digit = (length >> shift) & 15
        scratch[at] = digit + (48 if digit <= _LAST_DIGIT else 87)
        at += 1
        shift -= 4
    return _put_line_end(scratch, at)


@njit(inline="always")
def _put_line_end(scratch: Any, at: int) -> Any:
    scratch[at] = 13
    scratch[at + 1] = 10
    return at + 2


@njit(inline="always")
def _put_event(scratch: Any, at: int, before: Any, text: Any, after: Any) -> Any:
    """One chunk; where it ends."""
    at = _put_length(scratch, at, before.shape[0] + text.shape[0] + after.shape[0])
    for part in (before, text, after):
        _copy(scratch.ctypes.data + at, part.ctypes.data, part.shape[0])
        at += part.shape[0]
    return _put_line_end(scratch, at)


def _write_tokens(  # noqa: PLR0917  numba has no keywords in signatures
    records: Any,
    rows: Any,
    around: Any,
    tokens: Any,
    starts: Any,
    texts: Any,
    scratch: Any,
    bounds: Any,
    gap_counts: Any,
    gap_sum: Any,
    told: Any,
    words: Any,
) -> None:
    """Take the records of streams that are here and send what they make; tell in ``told[LEFT]``
    which were not taken, in ``told[BEHIND]`` which slots' sockets did not take all, and in
    ``words`` how many there are of each. Each stream's bytes leave in one call, however many
    tokens of it there are.

    A record is left if its stream is not here, if its offset is not the next (so is whatever
    follows it), if its token has no text by itself, or if there is no room.
    """
    left, touched, behind = 0, 0, 0
    for number in range(records.shape[0] // 2):
        stream = records[2 * number]
        slot = stream & (SLOTS - 1)
        row = rows[slot]
        offset = records[2 * number + 1] & 0xFFFFFFFF
        token = records[2 * number + 1] >> 32
        count = row[COUNT]
        if (
            row[NUMBER] != stream
            or stream == 0
            or row[OFFSET] != offset
            or count == TOKENS
            or token >= starts.shape[0] - 1
            or starts[token] == starts[token + 1]
        ):
            told[LEFT, left] = number
            left += 1
            continue
        tokens[slot, count] = token
        if row[SENT] == count:
            told[TOUCHED, touched] = slot
            touched += 1
        row[OFFSET] = offset + 1
        row[COUNT] = count + 1
    if touched:
        _clock(_MONOTONIC, words.ctypes.data)
    now = words[0] * _SECOND + words[1]
    filled = 0
    for place in range(touched):
        slot = told[TOUCHED, place]
        row = rows[slot]
        before = around[slot, : row[BEFORE_BYTES]]
        after = around[slot, row[BEFORE_BYTES] : row[BEFORE_BYTES] + row[AFTER_BYTES]]
        begin = filled
        for position in range(row[SENT], row[COUNT]):
            token = tokens[slot, position]
            text = texts[starts[token] : starts[token + 1]]
            filled = _put_event(scratch, filled, before, text, after)
            gap = 1e-9 * (now - row[LAST_NS])
            row[LAST_NS] = now
            bucket = 0
            while bucket < bounds.shape[0] and bounds[bucket] < gap:
                bucket += 1
            gap_counts[bucket] += 1
            gap_sum[0] += gap
        row[SENT] = row[COUNT]
        sent = _send(row[DESCRIPTOR], scratch.ctypes.data + begin, filled - begin, _NOWAIT)
        if sent == filled - begin:
            filled = begin
        else:
            row[UNSENT], row[UNSENT_END] = begin + max(sent, 0), filled
            told[BEHIND, behind] = slot
            behind += 1
    words[LEFT], words[BEHIND] = left, behind


def _compiled() -> Any:
    signature = (
        "void(int64[::1], int64[:, ::1], uint8[:, ::1], int32[:, ::1], int64[::1], uint8[::1],"
        " uint8[::1], float64[::1], int64[::1], float64[::1], int32[:, ::1], int64[::1])"
    )
    try:
        return njit(signature, cache=True)(_write_tokens)
    except RuntimeError:  # no folder to keep it in can be written to: it is compiled at each start
        return njit(signature)(_write_tokens)


write_tokens = _compiled()
