"""The bus: typed messages between processes over ZeroMQ, one frame a message.

A ``Listener`` (ROUTER) answers many ``Connection``s (DEALER). A connection is one life of one
socket pair: it never reconnects behind its user's back, so whoever holds a lost connection knows
that the peer may have forgotten everything. Frames that are not messages of the expected family
are dropped and counted; the sender is not told.
"""

import asyncio
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import anyio
import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from protocol.codec import MAX_FRAME_BYTES, Decoder, encode
from protocol.errors import ConfigError, ProtocolError, WorkerLost
from runtime.keys import ClusterKey, require_key_unless_loopback
from runtime.log import get_log

log = get_log(__name__)

M = TypeVar("M")
S = TypeVar("S", bound=zmq.Socket[Any])
QUEUE_FRAMES = 10_000  # per peer; a peer this far behind blocks its sender
HEARTBEAT_MS = 2_000  # ZeroMQ's own ping, so that a vanished host is noticed without traffic
HEARTBEAT_TIMEOUT_MS = 10_000
CONNECT_TIMEOUT_S = 5.0
FRAMES_A_TURN = 64  # then the event loop looks after others first
FULL_QUEUE_S = 0.005  # between tries while a peer's queue is full
_MONITORED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


def _configured(socket: S) -> S:
    socket.set(zmq.LINGER, 1000)
    socket.set(zmq.SNDHWM, QUEUE_FRAMES)
    socket.set(zmq.RCVHWM, QUEUE_FRAMES)
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return socket


class Listener(Generic[M]):
    """The answering end. Iterate it, in one task at a time, for ``(peer, message)``; ``peer`` is
    only good for ``send``.

    The socket is read on the event loop itself: a first token waits for two of these, and pyzmq's
    own futures made it wait longer.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", address: str, decoder: Decoder[M]) -> None:
        self._socket = socket
        self._decoder = decoder
        self._loop = asyncio.get_running_loop()
        self._arrival: asyncio.Future[None] | None = None  # while somebody waits for it
        self.address = address  # with the real port, to be told to others
        self.malformed_frames = 0
        self.undeliverable_frames = 0

    @classmethod
    @asynccontextmanager
    async def bind(
        cls, address: str, decoder: Decoder[M], *, key: ClusterKey | None = None
    ) -> "AsyncGenerator[Listener[M]]":
        """Listen on ``tcp://host:port``; port 0 takes a free one.

        Raises:
            ConfigError: the port is taken, or the host is not loopback and there is no key.
        """
        host, port = _host_and_port(address)
        require_key_unless_loopback(host, key, what="the bus")
        socket = _configured(zmq.Socket(zmq.asyncio.Context.instance(), zmq.ROUTER))
        socket.set(zmq.ROUTER_MANDATORY, 1)
        loop, descriptor = asyncio.get_running_loop(), socket.FD
        authenticator = None
        try:
            if key is not None:
                authenticator = _authenticate(socket, key)
            try:
                socket.bind(f"tcp://{host}:{port or '*'}")
            except zmq.ZMQError as error:
                raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
            bound = str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")
            listener = cls(socket, bound, decoder)
            loop.add_reader(descriptor, listener._arrived)
            yield listener
        finally:
            loop.remove_reader(descriptor)
            socket.close()
            if authenticator is not None:
                authenticator.stop()

    def __aiter__(self) -> AsyncIterator[tuple[bytes, M]]:
        return self

    async def __anext__(self) -> tuple[bytes, M]:
        while True:
            try:
                peer, frame = self._socket.recv_multipart(zmq.NOBLOCK)
                return peer, self._decoder.decode(frame)
            except zmq.Again:
                await self._until_arrival()
            except (ProtocolError, ValueError):
                self.malformed_frames += 1

    async def _until_arrival(self) -> None:
        """Return when frames may have come. All that are there have been read before."""
        self._arrival = self._loop.create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _arrived(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Hand the message to ``peer``'s queue; dropped and counted when the peer is gone."""
        parts = (peer, encode(message))
        while True:
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:
                await anyio.sleep(FULL_QUEUE_S)
                continue
            except zmq.ZMQError:
                self.undeliverable_frames += 1
            # Sending may take the note of an arrival off the socket's descriptor.
            self._loop.call_soon(self._arrived)
            return


class Connection(Generic[M]):
    """The asking end. ``read`` hands every message on, until the connection is lost.

    The socket is read on the event loop without a task or a future for each frame: all tokens of
    all streams come this way.
    """

    def __init__(self, socket: "zmq.Socket[bytes]", address: str, decoder: Decoder[M]) -> None:
        self._socket = socket
        self._decoder = decoder
        self._loop = asyncio.get_running_loop()
        self._hear: Callable[[M], None] | None = None  # set while ``read`` runs
        self._ended: asyncio.Future[None] | None = None  # likewise
        self.address = address
        self.lost = anyio.Event()
        self.malformed_frames = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        address: str,
        decoder: Decoder[M],
        *,
        key: ClusterKey | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> "AsyncGenerator[Connection[M]]":
        """Connect, and wait until the peer has answered.

        Raises:
            WorkerLost: nobody listens there, or they do not hold our key.
        """
        socket = _configured(zmq.Socket(zmq.asyncio.Context.instance(), zmq.DEALER))
        socket.set(zmq.RECONNECT_IVL, -1)
        if key is not None:
            socket.curve_publickey = key.public
            socket.curve_secretkey = key.secret
            socket.curve_serverkey = key.public
        monitor: Any = socket.get_monitor_socket(_MONITORED)
        try:
            socket.connect(address)
            event = None
            with anyio.move_on_after(timeout_s):
                event = (await recv_monitor_message(monitor))["event"]
            if event != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                raise WorkerLost(f"cannot connect to {address}")
            connection = cls(socket, address, decoder)
            failure: Exception | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connection._watch, monitor)
                try:
                    yield connection
                except Exception as error:  # noqa: BLE001  the user's own, raised again below
                    failure = error
                tasks.cancel_scope.cancel()
            if failure is not None:  # outside the task group, which would wrap it
                raise failure
        finally:
            socket.disable_monitor()
            monitor.close()
            socket.close()

    async def _watch(self, monitor: Any) -> None:  # pyzmq does not name its type
        while (await recv_monitor_message(monitor))["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            pass
        self.lost.set()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    async def send(self, message: msgspec.Struct) -> None:
        """Queue the message. On a lost connection it goes nowhere: watch ``lost``."""
        frame = encode(message)
        while not self.lost.is_set():
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                await anyio.sleep(FULL_QUEUE_S)
            else:
                # Sending may take the note of an arrival off the socket's descriptor.
                self._loop.call_soon(self._take_in)
                return

    async def read(self, hear: Callable[[M], None]) -> None:
        """Call ``hear`` with each message as it comes; return when the connection is lost and
        what had arrived before has been heard. One task at a time may read.

        Raises:
            Exception: what ``hear`` raised; messages after that one are still unread.
        """
        assert self._hear is None
        self._hear = hear
        self._ended = self._loop.create_future()
        self._loop.add_reader(self._socket.FD, self._take_in)
        try:
            self._take_in()
            if not self.lost.is_set():
                await self._ended
            while self._take_in():
                pass
        finally:
            self._loop.remove_reader(self._socket.FD)
            self._hear = self._ended = None

    def _take_in(self) -> bool:
        """Hear the frames that are there; whether some are left for another turn."""
        hear, ended = self._hear, self._ended
        if hear is None or ended is None:
            return False
        for _ in range(FRAMES_A_TURN):
            try:
                message = self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return False
            except ProtocolError:
                self.malformed_frames += 1
                continue
            try:
                hear(message)
            except Exception as error:
                self._hear = None
                if ended.done():
                    raise
                ended.set_exception(error)
                return False
        self._loop.call_soon(self._take_in)
        return True


def _host_and_port(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    if parts.scheme != "tcp" or parts.hostname is None or parts.port is None:
        raise ConfigError(f"a bus address looks like tcp://127.0.0.1:8100, not {address!r}")
    return parts.hostname, parts.port


def _authenticate(socket: "zmq.Socket[bytes]", key: ClusterKey) -> AsyncioAuthenticator:
    """Accept only peers whose public key is the cluster's own."""
    authenticator = AsyncioAuthenticator(zmq.asyncio.Context.instance())
    authenticator.start()
    authenticator.configure_curve_callback("*", _OnlyThisKey(key.public))
    socket.curve_server = True
    socket.curve_publickey = key.public
    socket.curve_secretkey = key.secret
    return authenticator


class _OnlyThisKey:
    """pyzmq's credentials provider: the Z85 key of the peer decides."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, _domain: str, peer_key: bytes) -> bool:
        return hmac.compare_digest(peer_key, self._public)
