"""The process of one prefill worker: load, serve, drain."""

import functools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import torch
from msgspec import structs

from engine.collectives import ExpertGroup
from engine.kvcache.block_pool import BlockPool
from engine.kvcache.mirror import HostMirror
from engine.kvcache.prefix_index import PrefixIndex
from engine.kvcache.storage import KVStorage
from engine.loading import LoadedModel, load, resolve_numerics
from engine.model_runner import ModelRunner
from engine.sampling.sampler import Sampler
from engine.vocabulary import read_grammars
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared, buffer, wrap
from kvtransfer.source import make_source
from prefill.loop import PrefillLoop
from prefill.prefix_feed import PrefixFeed
from prefill.scheduler import PrefillLimits, PrefillScheduler
from prefill.settings import PrefillSettings
from protocol.codec import Decoder
from protocol.ids import BlockId, WorkerId, WorkerRef, new_incarnation
from protocol.messages import ToPrefill
from protocol.prefix import fingerprint_digest
from protocol.workers import WorkerInfo
from runtime.keys import ClusterKey, load_key
from runtime.mailbox import Outbox
from runtime.registration import Registration
from runtime.reporting import report, weights_progress
from runtime.worker_process import ToPeer, WorkerProcess


def run(settings: PrefillSettings) -> int:
    """Serve until drained or stopped; 0 is the exit code.

    Raises:
        ConfigError: a file, an address or a setting is wrong; nothing has been served.
    """
    key = load_key(settings.bus.cluster_key_file)
    device = torch.device(settings.device)
    if settings.process.threads is not None:
        torch.set_num_threads(settings.process.threads)
    loaded = load(
        Path(settings.model.path),
        device=device,
        dtype=settings.model.dtype,
        numerics=resolve_numerics(settings.model.numerics, device),
        group=ExpertGroup.single(device),
        split_dense_experts=settings.model.split_dense_experts,
        block_tokens=settings.kv.block_tokens,
        progress=weights_progress(),
    )
    process = WorkerProcess(
        Decoder[ToPrefill](ToPrefill),
        make_engine=functools.partial(_make_engine, settings, loaded, device, key),
        on_serving=lambda: report("ready"),
        drain_s=settings.process.drain_s,
        key=key,
    )
    anyio.run(process.serve, settings.bind)
    return 0


def _make_engine(  # noqa: PLR0917  partially applied
    settings: PrefillSettings,
    loaded: LoadedModel,
    device: torch.device,
    key: ClusterKey | None,
    address: str,
    outbox: Outbox[ToPeer],
) -> tuple[PrefillLoop, Registration]:
    worker = WorkerRef(WorkerId(settings.worker_id), new_incarnation())
    layout = loaded.layout
    num_blocks = settings.num_blocks or max(1, settings.kv_cache_bytes // layout.block_bytes)
    storage = KVStorage(layout, num_blocks, device=device)
    memory = wrap(layout, num_blocks, address=storage.memory_address, owner=storage)
    device_memory: KVMemory | None = None
    lift: Callable[[range, Sequence[BlockId]], None] | None = None  # a CPU's are read in place
    if device.type != "cpu":
        device_memory = replace(memory, device=device.index or 0)
        memory = allocate_shared(layout, num_blocks)
        lift = HostMirror(storage, buffer(memory)).store
    pool = BlockPool(num_blocks)
    prefix_index = PrefixIndex(pool)
    feed = PrefixFeed()
    source = make_source(
        memory,
        worker,
        device_memory=device_memory,
        lift=lift,
        transport=settings.kv.transport,
        cluster_key=None if key is None else key.derive("kv"),
    )
    loop = PrefillLoop(
        worker=worker,
        scheduler=PrefillScheduler(
            pool,
            prefix_index,
            block_tokens=layout.block_tokens,
            fingerprint=fingerprint_digest(loaded.fingerprint),
            limits=PrefillLimits(
                max_batch_tokens=settings.max_batch_tokens,
                max_batch_sequences=settings.max_batch,
                max_queued_requests=settings.max_queued_requests,
            ),
        ),
        runner=ModelRunner(loaded.model, storage),
        sampler=Sampler(loaded.config.vocab_size, device, read_grammars(Path(settings.model.path))),
        source=source,
        outbox=outbox,
        pool=pool,
        prefix_index=prefix_index,
        prefix_feed=feed,
        layers_per_push=settings.layers_per_push,
        vocab_size=loaded.config.vocab_size,
        device=device,
    )
    info = WorkerInfo(
        ref=worker,
        role="prefill",
        group_id=settings.worker_id,
        rank=0,
        world_size=1,
        epoch=0,
        address=address,
        model=settings.model.name,
        max_model_len=min(
            settings.model.max_model_len or loaded.config.max_model_len,
            loaded.config.max_model_len,
            num_blocks * layout.block_tokens,
        ),
        layout=layout,
        num_blocks=num_blocks,
        fingerprint=dict(loaded.fingerprint),
        pid=os.getpid(),
        host=platform.node(),
    )
    registration = Registration(
        settings.bus.scheduler,
        info=lambda: info,
        load=lambda: structs.replace(loop.load, links=source.links()),
        prefix=feed.take,
        key=key,
    )
    return loop, registration
