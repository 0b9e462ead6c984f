"""The decode side of a rank: listens, lets prefill workers in, and keeps the ledger of grants.

One thread accepts; each connection has a thread of its own (``kvtransfer.inbound``). Every change
of the ledger, the events it leads to and the notices it sends happen under one lock, so the role
and each prefill worker hear of a grant in the order in which things happened.
"""

import contextlib
import importlib
import ipaddress
import itertools
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from kvtransfer import shm, tcp
from kvtransfer.carrier import Carrier, Transport, TransportChoice
from kvtransfer.carriers import make_carriers
from kvtransfer.checksum import ChecksumChoice
from kvtransfer.handshake import Payload
from kvtransfer.inbound import Inbound
from kvtransfer.interface import KVMemory, OnSinkEvent
from kvtransfer.ledger import GrantLedger
from kvtransfer.limits import TransferLimits
from kvtransfer.plan import Chunk
from kvtransfer.steps import ConnectionId, Step
from protocol.errors import ConfigError
from protocol.ids import BlockId, Generation, WorkerRef
from protocol.kv import Grant, KVEndpoint
from runtime.log import get_log

OFFERED_ON_GPU: tuple[Transport, ...] = ("cuda_ipc", "nccl")
OFFERED_BY_AUTO: tuple[Transport, ...] = ("shm", "tcp")

MIN_PACKED_WIDTH = 8

_log = get_log(__name__)
_REFUSALS_LOGGED_EVERY_S = 10.0
_PAUSE_S = 0.05


def make_sink(
    memory: KVMemory,
    worker: WorkerRef,
    on_event: OnSinkEvent,
    *,
    device_memory: KVMemory | None = None,
    transport: TransportChoice = "auto",
    host: str = "127.0.0.1",
    port: int = 0,
    advertise_host: str | None = None,
    cluster_key: bytes | None = None,
    checksum: ChecksumChoice = "auto",
    payload: Payload = "exact",
    limits: TransferLimits | None = None,
) -> "Sink":
    """A sink that listens already, with ``auto`` for every transport that ``memory`` allows, and
    ``device_memory``, where the same blocks lie on a GPU: KV is where ``Committed`` says.

    ``on_event`` is called under the sink's lock, from its threads and from within ``abort``: it
    must hand the event over and return. ``port`` 0 takes any free one.

    Raises:
        ConfigError: this process cannot do ``transport``, or the address cannot be bound or would
            be open to strangers.
    """
    limits = limits or TransferLimits()
    if payload == "fp8" and memory.layout.key_width < MIN_PACKED_WIDTH:
        raise ConfigError(
            f"kv.payload is fp8: rows of {memory.layout.key_width} elements are too short for a "
            f"scale each; it needs {MIN_PACKED_WIDTH}"
        )
    carriers = make_carriers(gpu=device_memory is not None)
    forced = transport != "auto"
    wanted: tuple[Transport, ...] = OFFERED_BY_AUTO if transport == "auto" else (transport,)
    if transport == "auto" and device_memory is not None:
        wanted = (*OFFERED_ON_GPU, *wanted)
    offered = [
        name for name in wanted if _can(name, carriers, memory, device_memory, forced=forced)
    ]
    gpu, domain = _gpu(device_memory)
    over_tcp = any(carriers[name].control == "tcp" for name in offered)
    if over_tcp and cluster_key is None and not _is_loopback(host):
        raise ConfigError(
            f"KV host is {host!r}: only loopback is open without a cluster key; set the key"
        )
    if over_tcp and advertise_host is None and _is_any(host):
        raise ConfigError(f"KV host is {host!r}: set the host that prefill workers can reach")
    listeners: dict[Transport, socket.socket] = {}
    addresses: dict[str, str] = {}
    for name in offered:
        if carriers[name].control == "unix":
            listeners[name], addresses[name] = shm.listen()
            continue
        at = port if name == "tcp" else 0
        try:
            listeners[name] = tcp.listen(host, at, limits.socket_buffer_bytes)
        except OSError as error:
            for listener in listeners.values():
                listener.close()
            raise ConfigError(f"cannot listen for KV on {host}:{at}: {error}") from error
        addresses[name] = tcp.address_of(listeners[name], advertise_host or host)
    endpoint = KVEndpoint(
        host_id=shm.host_id(),
        process_id=shm.process_id(),
        num_blocks=memory.num_blocks,
        addresses=addresses,
        gpu=gpu,
        domain=domain,
    )
    return Sink(
        memory=memory,
        device_memory=device_memory,
        worker=worker,
        on_event=on_event,
        carriers=carriers,
        listeners=listeners,
        endpoint=endpoint,
        cluster_key=cluster_key,
        checksum=checksum,
        payload=payload,
        limits=limits,
    )


class Sink:
    """A ``KVSink`` over any number of transports."""

    def __init__(
        self,
        *,
        memory: KVMemory,
        device_memory: KVMemory | None,
        worker: WorkerRef,
        on_event: OnSinkEvent,
        carriers: Mapping[Transport, Carrier],
        listeners: dict[Transport, socket.socket],
        endpoint: KVEndpoint,
        cluster_key: bytes | None,
        checksum: ChecksumChoice,
        payload: Payload,
        limits: TransferLimits,
    ) -> None:
        self.memory = memory
        self._device_memory = device_memory
        self.worker = worker
        self.cluster_key = cluster_key
        self.checksum: ChecksumChoice = checksum
        self.payload: Payload = payload
        self.limits = limits
        self._endpoint = endpoint
        self._on_event = on_event
        self._ledger = GrantLedger(
            worker=worker, layout=memory.layout, num_blocks=memory.num_blocks
        )
        self._lock = threading.RLock()
        self._connections: dict[ConnectionId, Inbound] = {}
        self._ids = itertools.count(1)
        self._closing = False
        self._refused_connections = 0
        self._last_logged_s = float("-inf")
        self._carriers = carriers
        self._listeners = listeners
        self._wake, self._woken = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    @property
    def endpoint(self) -> KVEndpoint:
        return self._endpoint

    def expect(self, grant: Grant) -> None:
        with self._lock:
            self._ledger.expect(grant)

    def abort(self, grant: Grant) -> None:
        self.apply(lambda ledger: ledger.abort(grant))

    def stats(self) -> dict[str, int]:
        """Totals since the start, and how much is live now. Names are metric names to be."""
        with self._lock:
            return asdict(self._ledger.counts) | {
                "refused_connections": self._refused_connections,
                "connections": len(self._connections),
                "live_grants": self._ledger.num_live,
                "open_grants": self._ledger.num_open,
                "quarantined_blocks": self._ledger.num_quarantined_blocks,
            }

    def apply(self, change: Callable[[GrantLedger], Step]) -> None:
        """Change the ledger, then say what follows, all in one piece."""
        with self._lock:
            step = change(self._ledger)
            for event in step.events:
                self._on_event(event)
            for notice in step.notices:
                connection = self._connections.get(notice.connection)
                if connection is not None:
                    connection.notify(notice)

    def begin_chunk(
        self, generation: Generation, chunk: Chunk, connection: ConnectionId
    ) -> tuple[BlockId, ...] | None:
        """The pages that an arriving chunk goes to, or None where it must be thrown away."""
        with self._lock:
            blocks, step = self._ledger.begin_chunk(generation, chunk, connection=connection)
            self.apply(lambda _: step)
            return blocks

    def may_copy(self, generation: Generation) -> bool:
        with self._lock:
            return self._ledger.may_copy(generation)

    def refused(self, reason: str) -> None:
        """Count a connection that was cut off, and say so in the log at most now and then."""
        with self._lock:
            self._refused_connections += 1
            now = time.monotonic()
            if now - self._last_logged_s < _REFUSALS_LOGGED_EVERY_S:
                return
            self._last_logged_s = now
            total = self._refused_connections
        _log.warning("kv connection refused", reason=reason, refused_so_far=total)

    def ended(self, connection: ConnectionId) -> None:
        with self._lock:
            self._connections.pop(connection, None)

    def close(self) -> None:
        """Stop listening and end all connections; grants that are still open fail."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.send(b"x")
        self._acceptor.join(self.limits.handshake_s)
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            connection.close()
        for connection in connections:
            connection.join(self.limits.handshake_s)
        self._wake.close()
        self._woken.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as sockets:
            selector.register(self._woken, selectors.EVENT_READ)
            for transport, listener in self._listeners.items():
                sockets.enter_context(listener)
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ, transport)
            while not self._closing:
                for key, _ in selector.select():
                    if key.data is not None:
                        self._take(key.data, key.fileobj)  # type: ignore[arg-type]

    def _take(self, transport: Transport, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:  # the peer has gone again, or descriptors have run out
            self.refused(str(error))
            select.select([self._woken], [], [], _PAUSE_S)
            return
        with self._lock:
            strangers = sum(not c.is_admitted for c in self._connections.values())
            full = (
                self._closing
                or len(self._connections) >= self.limits.max_connections
                or strangers >= self.limits.max_handshakes
            )
            if not full:
                number = ConnectionId(next(self._ids))
                carrier = self._carriers[transport]
                memory = self._device_memory if carrier.on_device else self.memory
                assert memory is not None
                connection = Inbound(
                    self,
                    number,
                    carrier=carrier,
                    memory=memory,
                    sock=sock,
                )
                self._connections[number] = connection
        if full:
            sock.close()
            self.refused("too many KV connections")
            return
        connection.start()


def _can(
    name: Transport,
    carriers: Mapping[Transport, Carrier],
    memory: KVMemory,
    device_memory: KVMemory | None,
    *,
    forced: bool,
) -> bool:
    carrier = carriers.get(name)
    problem: str | None = "this rank's KV blocks are not on a GPU"
    if carrier is not None:
        used = device_memory if carrier.on_device else memory
        problem = problem if used is None else carrier.problem(used)
    if name == "shm" and memory.share is None:
        problem = "this rank's KV memory is not shared memory"
    if problem is not None and forced:
        raise ConfigError(f"kv.transport is {name}: {problem}")
    if problem is not None:
        _log.warning("kv transport cannot be used", transport=name, reason=problem)
    return problem is None


def _gpu(device_memory: KVMemory | None) -> tuple[str, str]:
    """(GPU, NVLink domain), empty without one."""
    if device_memory is None or device_memory.device is None:
        return "", ""
    cuda = importlib.import_module("kvtransfer.cuda")
    gpu: str = cuda.gpu_id(device_memory.device)
    return gpu, cuda.domain_of(gpu)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(host: str) -> bool:
    return host in {"", "0.0.0.0", "::"}
