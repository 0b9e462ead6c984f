"""The prefill side: one channel to each decode rank, opened when first needed and kept.

Nothing here waits: a decode rank that cannot be reached shows as a push that fails. The transport
is shared memory where both ends are on one host and the decode rank offers it, TCP elsewhere;
with ``auto``, TCP also takes over where shared memory turns out not to work.
"""

import contextlib
import importlib
import threading
from collections.abc import Callable, Sequence
from functools import partial

from kvtransfer import shm, tcp
from kvtransfer.carrier import Carrier, Sending, Transport, TransportChoice
from kvtransfer.carriers import make_carriers
from kvtransfer.channel import Channel, Line
from kvtransfer.choice import Here, Route, routes
from kvtransfer.handshake import connect
from kvtransfer.interface import KVMemory
from kvtransfer.limits import MAX_CONTROL_BYTES, TransferLimits
from kvtransfer.links import Link
from kvtransfer.plan import Chunk, check_blocks, check_layers
from kvtransfer.pushing import Abort, Finish, Pushing, Send
from kvtransfer.shares import WHOLE, Share, layers_of, layout_of
from protocol.errors import ConfigError, LayoutMismatch, ServingError, TransferError
from protocol.ids import BlockId, WorkerId, WorkerRef
from protocol.kv import Grant, KVLayout
from protocol.workers import LinkReport
from runtime.log import get_log

_log = get_log(__name__)
Lift = Callable[[range, Sequence[BlockId]], object]
"""Called on the engine's thread with what is final; the answer is what the copy must wait for."""


def make_source(
    memory: KVMemory,
    worker: WorkerRef,
    *,
    device_memory: KVMemory | None = None,
    lift: Lift | None = None,
    transport: TransportChoice = "auto",
    share: Share = WHOLE,
    whole: KVLayout | None = None,
    cluster_key: bytes | None = None,
    limits: TransferLimits | None = None,
) -> "Source":
    """``worker`` is this prefill worker, or a rank of it, and ``share`` what ``memory`` has of the
    decode rank's layout, which is ``whole``; None: it has all. ``transport`` other than ``auto``
    allows only that one. Where the blocks lie on a GPU, in ``device_memory``, ``lift`` brings them
    to ``memory`` for the transports that need them there.

    Raises:
        LayoutMismatch: ``memory`` is no such share.
        ConfigError: this process cannot do ``transport``.
    """
    return Source(
        memory=memory,
        device_memory=device_memory,
        lift=lift,
        worker=worker,
        transport=transport,
        share=share,
        whole=whole or memory.layout,
        cluster_key=cluster_key,
        limits=limits or TransferLimits(),
    )


class Source:
    """A ``KVSource``."""

    def __init__(
        self,
        *,
        memory: KVMemory,
        device_memory: KVMemory | None,
        lift: Lift | None,
        worker: WorkerRef,
        transport: TransportChoice,
        share: Share,
        whole: KVLayout,
        cluster_key: bytes | None,
        limits: TransferLimits,
    ) -> None:
        self._memory = memory
        self._device_memory = device_memory
        self._lift = lift
        self._worker = worker
        self._choice: TransportChoice = transport
        self._cluster_key = cluster_key
        self._limits = limits
        self._share = share
        self._whole = whole
        self._digest = whole.digest()
        if (memory.layout, memory.layers) != (layout_of(share, whole), layers_of(share, whole)):
            raise LayoutMismatch(f"these KV blocks are not {share} of the decode rank's")
        self._here = _here(device_memory)
        self._carriers = make_carriers(gpu=device_memory is not None)
        self._problems: dict[Transport, str | None] = {}
        if transport != "auto" and (problem := self._problem(transport)) is not None:
            raise ConfigError(f"kv.transport is {transport}: {problem}")
        self._lock = threading.Lock()
        self._channels: dict[WorkerRef, Channel] = {}
        self._links: dict[WorkerId, Link] = {}
        self._host_only: set[WorkerRef] = set()  # decode ranks that GPU to GPU did not reach
        self._closed = False

    def open(self, grant: Grant) -> "GrantPush":
        """See ``KVSource.open``. Returns at once; a connection is made in the background."""
        if grant.layout_digest != self._digest:
            raise LayoutMismatch(
                f"{grant.decode.worker_id} has KV layout {grant.layout_digest}, "
                f"this worker {self._digest}"
            )
        ways = routes(self._choice, grant.endpoint, self._here, self._problem)
        if grant.decode in self._host_only:
            ways = [way for way in ways if not self._carriers[way.transport].on_device] or ways
        on_device = self._carriers[ways[0].transport].on_device
        ways = [way for way in ways if self._carriers[way.transport].on_device == on_device]
        stage = _mark if on_device else self._lift
        pushing = Pushing(grant=grant)
        while True:
            channel = self._channel(grant.decode, ways)
            if channel.open(pushing):
                return GrantPush(pushing, channel, self._memory, stage)

    def close(self) -> None:
        """End all channels; what is still on its way fails, and its callbacks have been called
        on return unless a decode rank has stopped taking bytes.
        """
        with self._lock:
            self._closed = True
            channels = list(self._channels.values())
        for channel in channels:
            channel.close()
        for channel in channels:
            channel.join(self._limits.handshake_s)
        for carrier in self._carriers.values():
            carrier.close()

    def links(self) -> tuple[LinkReport, ...]:
        """Of every decode rank that has been reached. Thread-safe."""
        with self._lock:
            links = list(self._links.values())
        reports = (link.report() for link in links)
        return tuple(report for report in reports if report is not None)

    def _problem(self, transport: Transport) -> str | None:
        if transport not in self._problems:
            carrier = self._carriers.get(transport)
            memory = None if carrier is None else self._memory_of(carrier)
            self._problems[transport] = (
                "this worker's KV blocks are not on a GPU"
                if carrier is None or memory is None
                else carrier.problem(memory)
            )
            if self._device_memory is not None and self._problems[transport] is not None:
                _log.warning(
                    "kv transport cannot be used",
                    transport=transport,
                    reason=self._problems[transport],
                )
        return self._problems[transport]

    def _memory_of(self, carrier: Carrier) -> KVMemory | None:
        return self._device_memory if carrier.on_device else self._memory

    def _channel(self, decode: WorkerRef, ways: Sequence[Route]) -> Channel:
        with self._lock:
            if self._closed:
                raise TransferError("the prefill worker is shutting down")
            channel = self._channels.get(decode)
            if channel is None:
                channel = self._channels[decode] = Channel(
                    layout=self._memory.layout,
                    pool_bytes=self._memory.num_bytes,
                    link=self._links.setdefault(
                        decode.worker_id, Link(self._worker.worker_id, decode.worker_id)
                    ),
                    dial=partial(self._dial, decode, ways),
                    limits=self._limits,
                    name=decode.worker_id,
                    on_ended=partial(self._forget, decode),
                )
            return channel

    def _forget(self, decode: WorkerRef, channel: Channel) -> None:
        with self._lock:
            if self._channels.get(decode) is channel:
                del self._channels[decode]

    def _dial(self, decode: WorkerRef, ways: Sequence[Route]) -> Line:
        problem: TransferError | None = None
        for route in ways:
            try:
                return self._connect(decode, route)
            except LayoutMismatch:
                raise
            except TransferError as error:
                problem = error
                _log.warning(
                    "kv connection failed",
                    to=decode.worker_id,
                    transport=route.transport,
                    reason=str(error),
                )
        assert problem is not None
        if self._carriers[ways[0].transport].on_device:
            self._host_only.add(decode)  # this push fails; the next one goes by host memory
        raise problem

    def _connect(self, decode: WorkerRef, route: Route) -> Line:
        name, address = route.transport, route.address
        carrier, limits = self._carriers[name], self._limits
        memory = self._memory_of(carrier)
        assert memory is not None
        with contextlib.ExitStack() as undo:
            try:
                carrier.prepare(memory, self._worker)
                sock = undo.enter_context(
                    shm.connect(address, limits.handshake_s)
                    if carrier.control == "unix"
                    else tcp.connect(address, limits.handshake_s, limits.socket_buffer_bytes)
                )
                connected = connect(
                    sock,
                    source=self._worker,
                    decode=decode,
                    layout_digest=self._digest,
                    share=self._share,
                    cluster_key=self._cluster_key,
                    timeout_s=limits.handshake_s,
                )
                outlet = carrier.outlet(
                    Sending(
                        sock=sock,
                        memory=memory,
                        worker=self._worker,
                        connected=connected,
                        limits=limits,
                        whole=self._whole,
                        share=self._share,
                    )
                )
            except TransferError:
                raise
            except (
                ServingError,
                OSError,
                ValueError,
                RuntimeError,
            ) as error:  # CUDA's are the last
                raise TransferError(
                    f"cannot reach {decode.worker_id} by {name}: {error}"
                ) from error
            undo.pop_all()
            return Line(
                sock=sock,
                outlet=outlet,
                route=route,
                fence=carrier.fence,
                incoming=connected.incoming,
                outgoing=connected.outgoing,
            )


class GrantPush:
    """A ``Push``."""

    def __init__(
        self, pushing: Pushing, channel: Channel, memory: KVMemory, stage: Lift | None
    ) -> None:
        self._pushing = pushing
        self._channel = channel
        self._memory = memory
        self._stage = stage

    def send(self, layers: range, first_block: int, source_blocks: Sequence[BlockId]) -> None:
        granted = len(self._pushing.grant.block_ids)
        if first_block < 0 or first_block + len(source_blocks) > granted:
            raise ValueError(
                f"blocks {first_block} ... {first_block + len(source_blocks) - 1} are not within "
                f"the grant's {granted}"
            )
        check_layers(layers, self._memory.layers)
        check_blocks(source_blocks, self._memory.num_blocks, side="source")
        if self._pushing.error is not None:
            raise self._pushing.error
        if layers and source_blocks:
            chunk = Chunk(layers.start, len(layers), first_block, len(source_blocks))
            ready = None if self._stage is None else self._stage(layers, source_blocks)
            self._channel.submit(self._pushing, Send(chunk, tuple(source_blocks), ready))

    def finish(self, payload: bytes, on_done: Callable[[TransferError | None], None]) -> None:
        """See ``Push.finish``. Where the connection is down already, ``on_done`` is called from
        within.
        """
        if len(payload) > MAX_CONTROL_BYTES:
            raise ValueError(
                f"a finish payload of {len(payload)} bytes exceeds {MAX_CONTROL_BYTES}"
            )
        self._channel.submit(self._pushing, Finish(payload, on_done))

    def abort(self, reason: str, on_done: Callable[[], None]) -> None:
        """See ``Push.abort``. Where the connection is down already, ``on_done`` is called from
        within.
        """
        self._channel.submit(self._pushing, Abort(reason, on_done))


def _here(device_memory: KVMemory | None) -> Here:
    host_id, process_id = shm.host_id(), shm.process_id()
    if device_memory is None or device_memory.device is None:
        return Here(host_id=host_id, process_id=process_id)
    cuda = importlib.import_module("kvtransfer.cuda")
    gpu = cuda.gpu_id(device_memory.device)
    return Here(host_id=host_id, process_id=process_id, gpu=gpu, domain=cuda.domain_of(gpu))


def _mark(_layers: range, _blocks: Sequence[BlockId]) -> object:
    """An event behind what the engine has queued: nothing waits for it here."""
    return importlib.import_module("kvtransfer.cuda").engine_event()
