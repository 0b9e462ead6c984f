"""The prefill side of one connection to one decode rank, run by a thread of its own.

That thread connects, sends, copies (on shm) and listens; nobody else writes the decode rank's
pages. So when it answers DRAINED, or closes the socket, it has stopped writing: that is the whole
proof. The engine's thread only puts commands into a queue and never waits.
"""

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.choice import Route
from kvtransfer.frames import (
    FROM_SINK,
    HEADER_BYTES,
    NO_GRANT,
    Frame,
    Kind,
    Seal,
    check_tag,
    control,
    decode,
)
from kvtransfer.interface import Fence
from kvtransfer.limits import TransferLimits
from kvtransfer.links import PROBE_FRAME_BYTES, Link
from kvtransfer.outlet import Outlet, bound_sends, send_all
from kvtransfer.plan import Chunk, chunks, joined
from kvtransfer.pushing import Abort, Command, Finish, Pushing, Send, answer
from kvtransfer.reports import decode_error, encode_attempt, encode_error
from protocol.errors import ProtocolError, TransferAborted, TransferError, TransferTimeout
from protocol.ids import Generation
from protocol.kv import KVLayout

_APART = 2  # rectangles that may wait for a third one to join them
_LISTEN_BYTES = 4 * 1024 * 1024  # how much is sent before a look at what the peer has said


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A connection that is up."""

    sock: socket.socket
    outlet: Outlet
    fence: Fence
    route: Route
    incoming: Seal
    outgoing: Seal


class Dial(Protocol):
    def __call__(self) -> Line:
        """
        Raises:
            TransferError: the decode rank cannot be reached, or has declined.
        """
        ...


class Channel:
    """Starts connecting at once. ``on_ended`` is called from its thread when it is of no more
    use; pushes that are still on their way have failed by then.
    """

    def __init__(
        self,
        *,
        layout: KVLayout,
        pool_bytes: int,
        dial: Dial,
        limits: TransferLimits,
        link: Link,
        name: str,
        on_ended: Callable[["Channel"], None],
    ) -> None:
        self._layout = layout
        self._pool_bytes = pool_bytes
        self._dial = dial
        self._limits = limits
        self._link = link
        self._on_ended = on_ended
        self._lock = threading.Lock()  # over the queue and _ended, so that no command is lost
        self._queue: deque[tuple[Pushing, Command | None]] = deque()
        self._ended: TransferError | None = None
        self._ready: deque[Pushing] = deque()  # open, with something to send; each gets its turn
        self._asleep = False  # or about to be; a command that is queued then wakes the thread
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pushes: dict[Generation, Pushing] = {}
        self._inbox = bytearray()
        self._unit = layout.layer_block_bytes
        self._unheard_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"kv-out-{name}", daemon=True)
        self._thread.start()

    def open(self, push: Pushing) -> bool:
        """False where the channel has ended; then another one is needed."""
        return self._put(push, None)

    def submit(self, push: Pushing, command: Command) -> None:
        """Queue a command, or end it here and now where the channel has ended."""
        if not self._put(push, command):
            assert self._ended is not None
            answer(command, push.error or self._ended)

    def close(self) -> None:
        with self._lock:
            self._closing = True
            if self._ended is None:
                os.eventfd_write(self._wake, 1)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _put(self, push: Pushing, command: Command | None) -> bool:
        with self._lock:
            if self._ended is not None:
                return False
            self._queue.append((push, command))
            if self._asleep:
                self._asleep = False
                os.eventfd_write(self._wake, 1)
            return True

    def _run(self) -> None:
        error = TransferError("the KV channel has failed")
        line: Line | None = None
        try:
            line = self._dial()
            bound_sends(line.sock, self._limits.stall_s)
            self._measure(line)
            error = self._work(line)
        except TransferError as problem:
            error = problem
        except (OSError, ProtocolError, RuntimeError) as problem:  # the last from CUDA
            error = TransferError(f"the KV connection was lost: {problem}")
        finally:
            if line is not None:
                self._link.lost()
                self._hang_up(line)
            self._end(error)

    def _measure(self, line: Line) -> None:
        """How fast the link is; the answers may come while it is in use already."""
        self._link.up(line.route)
        while self._probe(line):
            pass

    def _probe(self, line: Line) -> bool:
        """Whether to do it once more. Where answers come, it is over with the last of them."""
        wanted = self._limits.probe_bytes
        size = min(wanted, self._pool_bytes, line.outlet.frame_bytes, PROBE_FRAME_BYTES)
        if not size:
            return False
        count = wanted // size
        self._link.probing(count, size)
        for _ in range(count):
            bytes_per_s = line.outlet.probe(size)
            if bytes_per_s is not None:
                return self._link.measured(bytes_per_s)
        return False

    @staticmethod
    def _hang_up(line: Line) -> None:
        """Nothing is written from here on, and where the peer cannot see that, it is told; but
        not where that is not certain.
        """
        with line.sock, contextlib.suppress(OSError, RuntimeError):
            line.outlet.close()
            if line.fence == "one_sided":
                frame = control(Kind.STOPPED, NO_GRANT, line.outgoing)
                line.sock.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _end(self, error: TransferError) -> None:
        with self._lock:
            self._ended = error
            left = list(self._queue)
            self._queue.clear()
            os.close(self._wake)
        self._on_ended(self)
        for push in list(self._pushes.values()):
            self._fail(push, error)
        for push, command in left:
            push.error = push.error or error
            if command is not None:
                answer(command, push.error)

    def _work(self, line: Line) -> TransferError:
        poller = select.poll()
        poller.register(line.sock, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while not self._closing:
            with self._lock:
                self._asleep = not self._queue and not self._ready
            poller.poll(self._wait_ms() if self._asleep else 0)
            self._asleep = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            self._listen(line)
            self._unheard_bytes = 0
            while self._queue or self._ready:
                if self._closing or self._unheard_bytes >= _LISTEN_BYTES:
                    break  # a CANCEL may have come meanwhile
                while self._queue:
                    self._take(line, *self._queue.popleft())
                if self._ready:
                    self._turn(line, self._ready.popleft())
            if not self._ready:
                line.outlet.flush()
            self._expire(line)
        return TransferError("the prefill worker is shutting down")

    def _wait_ms(self) -> float | None:
        deadline = min((push.deadline for push in self._pushes.values()), default=float("inf"))
        if deadline == float("inf"):
            return None
        return max(0.0, deadline - time.monotonic()) * 1000 + 1

    def _take(self, line: Line, push: Pushing, command: Command | None) -> None:
        """A command has come: open and abort at once, the rest when it is the push's turn."""
        generation = push.grant.generation
        if command is None:
            self._pushes[generation] = push
            push.deadline = time.monotonic() + self._limits.open_s
            self._say(line, generation, Kind.OPEN, encode_attempt(push.grant.ref))
        elif push.state == "ended":
            answer(command, push.error)
        elif isinstance(command, Abort):
            error = TransferAborted(command.reason)
            self._say(line, generation, Kind.ABORT, encode_error(error))
            self._fail(push, error)
            command.on_done()
        else:
            push.backlog.append(command)
            if push.state == "open" and len(push.backlog) == 1 and not push.pieces:
                self._ready.append(push)

    def _turn(self, line: Line, push: Pushing) -> None:
        """One frame of this push, then it is another's turn: no push waits for all of another."""
        if push.state == "ended":
            return
        if not push.pieces:
            command = push.backlog.popleft()
            if isinstance(command, Finish):
                push.state, push.on_finished = "finishing", command.on_done
                push.deadline = time.monotonic() + self._limits.commit_s
                self._say(line, push.grant.generation, Kind.FINISH, command.payload)
                return
            assert isinstance(command, Send)
            command = self._joined(push, command, line.outlet.frame_bytes)
            chunk = command.chunk
            push.send, push.pieces = (
                command,
                deque(
                    chunks(
                        self._layout,
                        layers=range(chunk.first_layer, chunk.first_layer + chunk.num_layers),
                        first_block=chunk.first_block,
                        num_blocks=chunk.num_blocks,
                        max_bytes=line.outlet.frame_bytes,
                    )
                ),
            )
        self._write(line, push, push.pieces.popleft())
        if push.pieces or push.backlog:
            self._ready.append(push)

    def _joined(self, push: Pushing, send: Send, frame_bytes: int) -> Send:
        """Sends of neighbouring rectangles are one, up to a frame. Groups of layers of the next
        blocks first join one another, and then what was there before.
        """
        held = [send]
        while push.backlog and len(held) <= _APART:
            other = push.backlog[0]
            pieces = sum(part.chunk.num_layers * part.chunk.num_blocks for part in held)
            if not isinstance(other, Send) or pieces * self._unit >= frame_bytes:
                break
            held.append(other)
            push.backlog.popleft()
            while len(held) > 1:
                one, two = held[-2:]
                both = joined(one.chunk, one.source_blocks, two.chunk, two.source_blocks)
                if both is None:
                    break
                held[-2:] = [Send(*both, two.ready)]  # which has come later
        push.backlog.extendleft(reversed(held[1:]))
        return held[0]

    def _write(self, line: Line, push: Pushing, piece: Chunk) -> None:
        send, granted = push.send, push.grant.block_ids
        assert send is not None
        first = piece.first_block - send.chunk.first_block
        line.outlet.after(send.ready)
        started = time.perf_counter()
        line.outlet.write(
            push.grant.generation,
            piece,
            send.source_blocks[first : first + piece.num_blocks],
            granted[piece.first_block : piece.first_block + piece.num_blocks],
        )
        size = piece.num_layers * piece.num_blocks * self._unit
        self._unheard_bytes += size
        self._link.moved(size, time.perf_counter() - started)

    def _listen(self, line: Line) -> None:
        """Act on every whole frame that has arrived; does not wait."""
        while True:
            try:
                data = line.sock.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not data:
                raise TransferError("the decode rank has closed the KV connection")
            self._inbox += data
        while len(self._inbox) >= HEADER_BYTES:
            frame = decode(self._inbox, FROM_SINK)
            end = HEADER_BYTES + frame.length
            if len(self._inbox) < end:
                return
            payload = bytes(self._inbox[HEADER_BYTES:end])
            check_tag(self._inbox, payload, line.incoming)
            del self._inbox[:end]
            self._heed(line, frame, payload)

    def _heed(self, line: Line, frame: Frame, payload: bytes) -> None:
        push = self._pushes.get(frame.generation)
        if frame.kind is Kind.CANCEL:
            # Also where the push is unknown: it has ended, so nothing of it is being written.
            error = decode_error(payload)
            if push is not None:
                self._fail(push, error)
            self._say(line, frame.generation, Kind.DRAINED, encode_error(error))
        elif frame.kind is Kind.PROBED:
            if self._link.probed():
                self._probe(line)
        elif push is None:
            return
        elif frame.kind is Kind.OPENED and push.state == "opening":
            push.state, push.deadline = "open", float("inf")
            if push.backlog:
                self._ready.append(push)
        elif frame.kind is Kind.REFUSED:
            self._fail(push, decode_error(payload))
        elif frame.kind is Kind.COMMITTED and push.state == "finishing":
            self._finish(push, None)
        else:
            raise ProtocolError("a KV frame that does not fit the push", kind=frame.kind)

    def _expire(self, line: Line) -> None:
        now = time.monotonic()
        for push in [push for push in self._pushes.values() if push.deadline <= now]:
            waited_for = "committed" if push.state == "finishing" else "opened"
            error = TransferTimeout(f"the decode rank has not {waited_for} the grant in time")
            self._say(line, push.grant.generation, Kind.ABORT, encode_error(error))
            self._fail(push, error)

    def _say(self, line: Line, generation: Generation, kind: Kind, payload: bytes) -> None:
        line.outlet.flush()
        frame = control(kind, generation, line.outgoing, payload)
        send_all(line.sock, [frame])

    def _fail(self, push: Pushing, error: TransferError) -> None:
        self._finish(push, error)
        for command in push.backlog:
            answer(command, error)
        push.backlog.clear()
        push.pieces.clear()

    def _finish(self, push: Pushing, error: TransferError | None) -> None:
        push.state, push.error, push.deadline = "ended", error, float("inf")
        self._pushes.pop(push.grant.generation, None)
        if push.on_finished is not None:
            push.on_finished(error)
            push.on_finished = None
