"""One frame for one frame, with a child process on the other end of two pipes.

The child reads and writes with ``read_frame`` and ``write_frame``; the parent asks with
``write_frame`` and waits, for a time, with ``answer_of``. Killing the child ends every wait.
"""

import select
import struct
import subprocess
import time
from typing import IO, BinaryIO, TypeVar, cast

import msgspec

_FRAME = struct.Struct("<I")
_READ_BYTES = 1 << 16
M = TypeVar("M")


def read_frame(source: BinaryIO) -> bytes | None:
    """None: the other end has closed the pipe."""
    head = source.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    (length,) = _FRAME.unpack(head)
    body = source.read(length)
    return body if len(body) == length else None


def write_frame(target: BinaryIO, message: object) -> None:
    body = msgspec.msgpack.encode(message)
    target.write(_FRAME.pack(len(body)) + body)
    target.flush()


def answer_of(child: subprocess.Popen[bytes], within_s: float, kind: type[M]) -> M:
    """
    Raises:
        TimeoutError: there is none in time.
        EOFError: the process has ended.
    """
    pipe = pipe_of(child.stdout)
    until = time.monotonic() + within_s
    received = bytearray()
    while len(received) < _FRAME.size or len(received) < _FRAME.size + _length(received):
        left_s = until - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            raise TimeoutError
        part = pipe.read1(_READ_BYTES)  # type: ignore[attr-defined]  # pipes are buffered readers
        if not part:
            raise EOFError
        received += part
    return msgspec.msgpack.decode(received[_FRAME.size :], type=kind)


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill the process, and close our ends."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.wait()


def pipe_of(pipe: IO[bytes] | None) -> BinaryIO:
    assert pipe is not None
    return cast("BinaryIO", pipe)


def _length(received: bytearray) -> int:
    (length,) = _FRAME.unpack_from(received)
    return int(length)
