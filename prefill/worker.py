"""The process of one prefill rank: load its part, meet the other ranks if there are any, serve,
drain. Rank 0 leads: it alone is known to gateways and to the scheduler.
"""

import asyncio
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import anyio
import torch
from msgspec import structs

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.mirror import HostMirror
from engine.kvcache.prefix_index import PrefixIndex
from engine.kvcache.storage import KVStorage
from engine.loading import LoadedModel, load, resolve_numerics
from engine.meeting.joining import RankMeeting, tell_others
from engine.model_runner import ModelRunner
from engine.rendezvous import Rendezvous
from engine.sampling.sampler import Sampler
from engine.vocabulary import read_grammars
from kvtransfer.interface import KVMemory, KVSource
from kvtransfer.memory import allocate_shared, buffer, wrap
from kvtransfer.shares import Share, share_of_rank
from kvtransfer.source import Lift, Source, make_source
from prefill.follower import FollowerLoop
from prefill.forward import Forward
from prefill.joint_push import JointSource
from prefill.lockstep import ROW_VERSION
from prefill.loop import PrefillLoop
from prefill.place import Place
from prefill.prefix_feed import PrefixFeed
from prefill.ranks import LeadRank, OneRank, Ranks
from prefill.scheduler import PrefillLimits, PrefillScheduler
from prefill.settings import PrefillSettings
from protocol.codec import Decoder
from protocol.errors import ConfigError
from protocol.ids import WorkerId, WorkerRef, new_incarnation
from protocol.messages import ToPrefill
from protocol.prefix import fingerprint_digest
from protocol.workers import WorkerInfo
from runtime.keys import ClusterKey, load_key
from runtime.mailbox import Outbox
from runtime.registration import Registration
from runtime.reporting import report, weights_progress
from runtime.worker_process import ToPeer, WorkerProcess, serve_until_told


def run(settings: PrefillSettings) -> int:
    """Serve as one rank until drained or stopped; 0 is the exit code.

    Raises:
        ConfigError: a file, an address or a setting is wrong; nothing has been served.
    """
    key = load_key(settings.bus.cluster_key_file)
    device = torch.device(settings.device)
    place = Place.of(settings.group, device)
    if settings.process.threads is not None:
        torch.set_num_threads(settings.process.threads)
    try:
        loaded = load(
            Path(settings.model.path),
            device=device,
            dtype=settings.model.dtype,
            numerics=resolve_numerics(settings.model.numerics, device),
            group=place.sharing,
            tensor_parallel=True,
            stage=place.stage,
            split_dense_experts=settings.model.split_dense_experts,
            block_tokens=settings.kv.block_tokens,
            progress=weights_progress(),
        )
    except ConfigError as error:
        if place.ranks.num_seats > 1:
            report("failed", message=str(error))  # a launcher that ends all ranks need not wait
            tell_others(
                str(error),
                lambda: make_rendezvous(settings, place, key, None),
                deadline_s=settings.group.rendezvous_timeout_s,
            )
        raise
    rank = PrefillRank(settings, loaded, place, key)
    if place.ranks.seat:
        anyio.run(serve_until_told, rank.follower(), settings.process.drain_s)
        return 0
    process = WorkerProcess(
        Decoder[ToPrefill](ToPrefill),
        make_engine=rank.leader,
        on_serving=lambda: report("ready"),
        drain_s=settings.process.drain_s,
        key=key,
    )
    anyio.run(process.serve, settings.bind)
    return 0


class PrefillRank:
    """What a rank's process is made of, whether it leads or follows."""

    def __init__(
        self,
        settings: PrefillSettings,
        loaded: LoadedModel,
        place: Place,
        key: ClusterKey | None,
    ) -> None:
        self._settings = settings
        self._loaded = loaded
        self._place = place
        self._key = key
        device, held = place.ranks.device, loaded.held
        self._share = self._share_of(place.ranks.seat)
        # A stage may have a layer more than another; block numbers mean the same in all of them.
        most = structs.replace(held, num_layers=-(-loaded.layout.num_layers // place.stage.count))
        self._num_blocks = settings.num_blocks or max(
            1, settings.kv_cache_bytes // most.block_bytes
        )
        first = loaded.layers.start
        self._storage = KVStorage(held, self._num_blocks, device=device, first_layer=first)
        memory = wrap(
            held, self._num_blocks, address=self._storage.memory_address, owner=self._storage
        )
        self._memory = replace(memory, first_layer=first)
        self._device_memory: KVMemory | None = None
        self._lift: Lift | None = None  # a CPU's are read in place
        if device.type != "cpu":
            self._device_memory = replace(self._memory, device=device.index or 0)
            mirror = allocate_shared(held, self._num_blocks)
            self._memory = replace(mirror, first_layer=first)
            self._lift = HostMirror(self._storage, buffer(self._memory)).store
        self._forward = Forward(
            ModelRunner(loaded.model, self._storage),
            layers_per_push=settings.layers_per_push,
            device=device,
            relay=place.relay(hidden=loaded.config.hidden_width, dtype=loaded.dtype),
        )

    def follower(self) -> FollowerLoop:
        name = WorkerId(f"{self._settings.worker_id}/{self._place.ranks.seat}")
        return FollowerLoop(
            self._forward,
            self._meeting(),
            make_source=(
                None
                if self._share is None
                else lambda: self._source(WorkerRef(name, new_incarnation()))
            ),
            on_serving=lambda: report("ready"),
        )

    def leader(self, address: str, outbox: Outbox[ToPeer]) -> tuple[PrefillLoop, Registration]:
        settings, loaded = self._settings, self._loaded
        worker = WorkerRef(WorkerId(settings.worker_id), new_incarnation())
        own_source = self._source(worker)
        source: KVSource = own_source
        ranks: Ranks = OneRank()
        if self._place.ranks.num_seats > 1:
            events = asyncio.get_running_loop()
            joint = JointSource(own_source, senders=self._senders())
            source, ranks = (
                joint,
                LeadRank(
                    self._meeting(),
                    joint,
                    on_membership=lambda: events.call_soon_threadsafe(registration.changed),
                ),
            )
        pool = BlockPool(self._num_blocks)
        prefix_index = PrefixIndex(pool)
        feed = PrefixFeed()
        loop = PrefillLoop(
            worker=worker,
            scheduler=PrefillScheduler(
                pool,
                prefix_index,
                block_tokens=loaded.layout.block_tokens,
                fingerprint=fingerprint_digest(loaded.fingerprint),
                limits=PrefillLimits(
                    max_batch_tokens=settings.max_batch_tokens,
                    max_batch_sequences=settings.max_batch,
                    max_queued_requests=settings.max_queued_requests,
                ),
            ),
            forward=self._forward,
            ranks=ranks,
            sampler=Sampler(
                loaded.config.vocab_size,
                self._place.ranks.device,
                read_grammars(Path(settings.model.path)),
            ),
            source=source,
            outbox=outbox,
            pool=pool,
            prefix_index=prefix_index,
            prefix_feed=feed,
            vocab_size=loaded.config.vocab_size,
            num_stages=self._place.stage.count,
        )
        info = self._info(worker, address)
        registration = Registration(
            settings.bus.scheduler,
            info=lambda: info if ranks.together else None,
            load=lambda: structs.replace(loop.load, links=source.links()),
            prefix=feed.take,
            key=self._key,
        )
        return loop, registration

    def _info(self, worker: WorkerRef, address: str) -> WorkerInfo:
        settings, loaded = self._settings, self._loaded
        return WorkerInfo(
            ref=worker,
            role="prefill",
            group_id=settings.worker_id,
            rank=0,
            world_size=self._place.ranks.num_seats,
            epoch=0,
            address=address,
            model=settings.model.name,
            max_model_len=min(
                settings.model.max_model_len or loaded.config.max_model_len,
                loaded.config.max_model_len,
                self._num_blocks * loaded.layout.block_tokens,
            ),
            layout=loaded.layout,
            num_blocks=self._num_blocks,
            fingerprint=dict(loaded.fingerprint),
            pid=os.getpid(),
            host=platform.node(),
        )

    def _source(self, worker: WorkerRef) -> Source:
        assert self._share is not None, "rank 0 has a share, and the others are not asked"
        return make_source(
            self._memory,
            worker,
            device_memory=self._device_memory,
            lift=self._lift,
            transport=self._settings.kv.transport,
            share=self._share,
            whole=self._loaded.layout,
            cluster_key=None if self._key is None else self._key.derive("kv"),
        )

    def _senders(self) -> list[int]:
        """The other ranks that have a share of their own."""
        others = range(1, self._place.ranks.num_seats)
        return [rank for rank in others if self._share_of(rank) is not None]

    def _share_of(self, rank: int) -> Share | None:
        ranks, stages = self._place.ranks.num_seats, self._place.stage.count
        return share_of_rank(rank, ranks, self._loaded.layout, num_stages=stages)

    def _meeting(self) -> RankMeeting:
        settings, device = self._settings, self._place.ranks.device
        terms = {
            **self._loaded.fingerprint,
            "rows": str(ROW_VERSION),
            "num_blocks": str(self._num_blocks),
            "prefill.group.stages": str(settings.group.stages),
            "prefill.layers_per_push": str(settings.layers_per_push),
            # Ranks choose experts by numbers that must be the same bits on all of them.
            "processor": processor(device),
            "process.threads": str(torch.get_num_threads()),
        }
        rendezvous = make_rendezvous(settings, self._place, self._key, terms)
        return RankMeeting(rendezvous, patience_s=settings.group.rendezvous_timeout_s)


def processor(device: torch.device) -> str:
    """What computes, as far as it may differ in the last bit from another kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


def make_rendezvous(
    settings: PrefillSettings,
    place: Place,
    key: ClusterKey | None,
    terms: Mapping[str, str] | None,
) -> Rendezvous:
    return Rendezvous(
        place.ranks,
        settings.group.rendezvous.removeprefix("tcp://"),
        name=settings.worker_id,
        role="prefill",
        collective_timeout_s=settings.group.step_timeout_s,
        rows=settings.group.rows,
        terms=terms,
        key=b"" if key is None else key.derive("ranks"),
        circle=place.circle,
    )
