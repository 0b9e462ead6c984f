"""The process of one decode rank: load its slots, meet the other ranks, serve, drain."""

import asyncio
import functools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import torch

from decode.intake import Intake
from decode.lockstep import ROW_VERSION
from decode.loop import DecodeLoop
from decode.rebalance import ExpertMoves, RebalanceRule
from decode.scheduler import DecodeScheduler
from decode.settings import DecodeSettings, ExpertSettings
from decode.swap import SwapSpace
from decode.two_batches import TwoBatches
from engine.collectives import ExpertGroup
from engine.experts.exchange import ExchangeChoice
from engine.experts.recorded_load import RecordedLoad, parse_load
from engine.experts.spread import ExpertSpread
from engine.kvcache.block_pool import BlockPool
from engine.kvcache.mirror import HostMirror
from engine.kvcache.storage import KVStorage
from engine.loading import LoadedModel, load, resolve_numerics
from engine.meeting.joining import RankMeeting, tell_others
from engine.model_runner import ModelRunner
from engine.rendezvous import Rendezvous
from engine.sampling.sampler import Sampler
from engine.vocabulary import read_grammars
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared, buffer, wrap
from kvtransfer.sink import make_sink
from protocol.codec import Decoder
from protocol.errors import ConfigError
from protocol.ids import BlockId, WorkerId, WorkerRef, new_incarnation
from protocol.messages import ToDecode
from protocol.workers import WorkerInfo
from runtime.keys import ClusterKey, load_key
from runtime.log import get_log
from runtime.mailbox import Outbox
from runtime.registration import Registration
from runtime.reporting import report, weights_progress
from runtime.settings import host_of
from runtime.worker_process import ToPeer, WorkerProcess

log = get_log(__name__)


def run(settings: DecodeSettings) -> int:
    """Serve one rank until drained or stopped; 0 is the exit code.

    Raises:
        ConfigError: a file, an address or a setting is wrong; nothing has been served.
    """
    key = load_key(settings.bus.cluster_key_file)
    device = torch.device(settings.device)
    group = ExpertGroup(
        seat=settings.group.rank or 0, num_seats=settings.group.ranks, device=device
    )
    if settings.process.threads is not None:
        torch.set_num_threads(settings.process.threads)
    try:
        loaded = load(
            Path(settings.model.path),
            device=device,
            dtype=settings.model.dtype,
            numerics=resolve_numerics(settings.model.numerics, device),
            group=group,
            split_dense_experts=settings.model.split_dense_experts,
            spread=_spread(settings),
            exchange=_exchange(settings),
            block_tokens=settings.kv.block_tokens,
            progress=weights_progress(),
        )
    except ConfigError as error:
        if group.num_seats > 1:
            report("failed", message=str(error))  # a launcher that ends all ranks need not wait
            tell_others(
                str(error),
                lambda: _messenger(settings, group, key),
                deadline_s=settings.group.rendezvous_timeout_s,
            )
        raise
    process = WorkerProcess(
        Decoder[ToDecode](ToDecode),
        make_engine=functools.partial(_make_engine, settings, loaded, group, key),
        on_serving=lambda: report("ready"),
        drain_s=settings.process.drain_s,
        key=key,
    )
    anyio.run(process.serve, settings.bind)
    return 0


def _messenger(settings: DecodeSettings, group: ExpertGroup, key: ClusterKey | None) -> Rendezvous:
    """To the others, for a rank that cannot serve."""
    return Rendezvous(
        group,
        settings.group.rendezvous.removeprefix("tcp://"),
        name=settings.worker_id,
        places=settings.group.place_of,
        key=b"" if key is None else key.derive("ranks"),
    )


def _spread(settings: DecodeSettings) -> ExpertSpread:
    experts, group = settings.experts, settings.group
    return ExpertSpread(
        redundant=experts.redundant,
        least_ranks=group.least,
        ranks_per_tray=experts.ranks_per_tray,
        load=None if experts.load_file is None else _read_load(experts.load_file),
        movable=experts.rebalance and group.ranks > 1,
        counted=True,
    )


def _exchange(settings: DecodeSettings) -> ExchangeChoice:
    return ExchangeChoice(
        transport=settings.experts.transport,
        payload=settings.experts.payload,
        max_tokens_per_rank=settings.max_batch,
        queue_pair_depth=settings.experts.queue_pair_depth,
    )


def _read_load(file: Path) -> RecordedLoad:
    try:
        document = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"decode.experts.load_file {file}: {error.strerror}") from error
    return parse_load(document, str(file))


def _expert_moves(settings: DecodeSettings, loaded: LoadedModel, group: ExpertGroup) -> ExpertMoves:
    spread, experts = _spread(settings), settings.experts
    if experts.rebalance and loaded.counts is None:
        log.warning("experts stay where they are: no token chooses among them")
    layers = loaded.config.sparse_layers
    return ExpertMoves(
        exchanges=loaded.model.slot_exchanges,
        placements={
            layer: placement for layer, placement in enumerate(loaded.placements) if layers[layer]
        },
        counts=loaded.counts,
        seat=group.seat,
        topology=spread.topology(group.num_seats),
        mode=spread.mode,
        rule=RebalanceRule(
            window=experts.rebalance_window,
            interval=experts.rebalance_interval if spread.movable else experts.rebalance_window,
            above=experts.rebalance_above,
            moves=spread.movable,
        ),
        alike=(_exchange(settings), experts.two_batches),
    )


def _two_batches(settings: ExpertSettings, loaded: LoadedModel, group: ExpertGroup) -> TwoBatches:
    choice = settings.two_batches
    if choice == "auto":
        # On a CPU the exchange needs the cores that the other batch would compute on.
        choice = "never" if group.device.type == "cpu" else "measure"
    return TwoBatches(choice, possible=loaded.allows_two_batches)


def _landed_already(_block_ids: Sequence[BlockId]) -> None:
    """On a CPU the transports write into the engine's own blocks."""


def _meeting(
    settings: DecodeSettings,
    loaded: LoadedModel,
    group: ExpertGroup,
    experts: ExpertMoves,
    key: ClusterKey | None,
) -> RankMeeting:
    rendezvous = Rendezvous(
        group,
        settings.group.rendezvous.removeprefix("tcp://"),
        name=settings.worker_id,
        places=settings.group.place_of,
        first=settings.group.first_ranks,
        least=loaded.least_ranks,
        collective_timeout_s=settings.step_timeout_s,
        rows=settings.group.rows,
        terms={
            **loaded.fingerprint,
            "rows": str(ROW_VERSION),
            "placement": f"{experts.started_with:x}",
        },
        key=b"" if key is None else key.derive("ranks"),
    )
    return RankMeeting(rendezvous, patience_s=settings.group.rendezvous_timeout_s)


def _make_engine(  # noqa: PLR0917  partially applied
    settings: DecodeSettings,
    loaded: LoadedModel,
    group: ExpertGroup,
    key: ClusterKey | None,
    address: str,
    outbox: Outbox[ToPeer],
) -> tuple[DecodeLoop, Registration]:
    seat = group.seat
    worker = WorkerRef(WorkerId(f"{settings.worker_id}/{seat}"), new_incarnation())
    layout = loaded.layout
    num_blocks = settings.num_blocks or max(1, settings.kv_cache_bytes // layout.block_bytes)
    memory = allocate_shared(layout, num_blocks)
    device_memory: KVMemory | None = None
    if group.device.type == "cpu":
        storage = KVStorage(layout, num_blocks, device=group.device, buffer=buffer(memory))
        land: Callable[[Sequence[BlockId]], None] = _landed_already
    else:
        storage = KVStorage(layout, num_blocks, device=group.device)
        land = HostMirror(storage, buffer(memory)).load
        device_memory = replace(
            wrap(layout, num_blocks, address=storage.memory_address, owner=storage),
            device=group.device.index or 0,
        )
    max_model_len = min(
        settings.model.max_model_len or loaded.config.max_model_len,
        loaded.config.max_model_len,
        num_blocks * layout.block_tokens,
    )
    scheduler = DecodeScheduler(
        BlockPool(num_blocks), block_tokens=layout.block_tokens, max_batch=settings.max_batch
    )
    sink = make_sink(
        memory,
        worker,
        lambda event: loop.post_transfer(event),  # noqa: PLW0108  made below
        device_memory=device_memory,
        transport=settings.kv.transport,
        payload=settings.kv.payload,
        host=host_of(settings.bind),
        cluster_key=None if key is None else key.derive("kv"),
    )
    swap = SwapSpace(storage)
    events = asyncio.get_running_loop()
    experts = _expert_moves(settings, loaded, group)
    loop = DecodeLoop(
        worker=worker,
        seat=seat,
        scheduler=scheduler,
        intake=Intake(
            worker=worker,
            scheduler=scheduler,
            sink=sink,
            layout_digest=layout.digest(),
            max_model_len=max_model_len,
            max_granted=settings.max_granted_requests,
            swap_out=swap.put,
        ),
        swap=swap,
        runner=ModelRunner(loaded.model, storage),
        sampler=Sampler(
            loaded.config.vocab_size, group.device, read_grammars(Path(settings.model.path))
        ),
        experts=experts,
        meter=loaded.meter,
        two_batches=_two_batches(settings.experts, loaded, group),
        meeting=_meeting(settings, loaded, group, experts, key),
        least_ranks=loaded.least_ranks,
        outbox=outbox,
        land=land,
        on_membership=lambda: events.call_soon_threadsafe(registration.changed),
        device=group.device,
    )

    def info() -> WorkerInfo | None:
        if loop.epoch is None:
            return None
        return WorkerInfo(
            ref=worker,
            role="decode",
            group_id=settings.worker_id,
            rank=seat,
            world_size=group.num_seats,
            absent=tuple(sorted(set(range(group.num_seats)) - set(loop.members))),
            spare_ranks=group.num_seats - loaded.least_ranks,
            epoch=loop.epoch,
            address=address,
            model=settings.model.name,
            max_model_len=max_model_len,
            layout=layout,
            num_blocks=num_blocks,
            fingerprint=dict(loaded.fingerprint),
            pid=os.getpid(),
            host=platform.node(),
        )

    registration = Registration(
        settings.bus.scheduler,
        info=info,
        load=lambda: loop.account.load,
        experts=lambda: experts.report,
        key=key,
    )
    return loop, registration
