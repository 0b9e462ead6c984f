"""One prefill worker and one decode rank in this process: real engines, real transfer, no bus."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from decode.intake import Intake
from decode.loop import DecodeLoop
from decode.rebalance import ExpertMoves, RebalanceRule
from decode.scheduler import DecodeScheduler
from decode.swap import SwapSpace
from decode.two_batches import TwoBatches
from engine.collectives import ExpertGroup
from engine.experts.placement import Topology
from engine.kvcache.block_pool import BlockPool
from engine.kvcache.mirror import HostMirror
from engine.kvcache.prefix_index import PrefixIndex
from engine.kvcache.storage import KVStorage
from engine.loading import LoadedModel, load
from engine.meeting.joining import Meeting, RankMeeting
from engine.model_runner import ModelRunner
from engine.rendezvous import Rendezvous
from engine.sampling.sampler import Sampler
from kvtransfer.memory import allocate_shared, buffer, wrap
from kvtransfer.sink import make_sink
from kvtransfer.source import make_source
from prefill.forward import Forward
from prefill.loop import PrefillLoop
from prefill.prefix_feed import PrefixFeed
from prefill.ranks import OneRank
from prefill.scheduler import PrefillLimits, PrefillScheduler
from protocol.ids import AttemptRef, RequestId, WorkerId, WorkerRef, new_incarnation
from protocol.kv import Grant
from protocol.messages import (
    Cancel,
    Granted,
    Prefill,
    PrefillDone,
    Rejected,
    RequestFailed,
    Reserve,
    StepTokens,
)
from protocol.requests import GenerateRequest, SamplingParams, StopConditions
from runtime.worker_process import ToPeer

PEER = b"gateway"
BLOCK_TOKENS = 16
WAIT_S = 60.0


class Gateway:
    """What a gateway would have heard, request by request. Stands in for both outboxes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.messages: list[msgspec.Struct] = []
        self.tokens: dict[AttemptRef, list[int]] = defaultdict(list)
        self.finished: dict[AttemptRef, str] = {}
        self.failed: dict[AttemptRef, str] = {}
        self.cached: dict[AttemptRef, int] = {}
        self.grants: dict[AttemptRef, Grant] = {}
        self.rejected: dict[AttemptRef, str] = {}

    def put(self, items: Iterable[ToPeer]) -> None:
        with self._changed:
            for _, message in items:
                self.messages.append(message)
                self._hear(message)
            self._changed.notify_all()

    def _hear(self, message: msgspec.Struct) -> None:
        match message:
            case Granted(grant=grant):
                self.grants[grant.ref] = grant
            case Rejected(ref=ref, error=error):
                self.rejected[ref] = error.code
            case PrefillDone(ref=ref, token_id=token, finish_reason=reason, cached_tokens=cached):
                self.tokens[ref].insert(0, token)
                self.cached[ref] = cached
                if reason is not None:
                    self.finished[ref] = reason
            case StepTokens(deltas=deltas):
                for delta in deltas:
                    self.tokens[delta.ref].extend(delta.token_ids)
                    if delta.finish_reason is not None:
                        self.finished[delta.ref] = delta.finish_reason
            case RequestFailed(ref=ref, error=error):
                self.failed[ref] = error.code
            case _:
                raise AssertionError(f"unexpected {message}")

    def wait_for(self, condition: Callable[["Gateway"], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), WAIT_S), vars(self)


@dataclass(kw_only=True)
class Pair:
    model: LoadedModel
    prefill: PrefillLoop
    decode: DecodeLoop
    prefill_scheduler: PrefillScheduler
    decode_scheduler: DecodeScheduler
    gateway: Gateway = field(default_factory=Gateway)
    requests: int = 0

    def a_request(
        self, prompt: Iterable[int], max_tokens: int, caller: str = "", **sampling: float
    ) -> GenerateRequest:
        self.requests += 1
        params = SamplingParams(**({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        return GenerateRequest(
            request_id=RequestId(f"r{self.requests}"),
            attempt=0,
            model="tiny",
            prompt_token_ids=tuple(prompt),
            sampling=params,
            stop=StopConditions(max_tokens=max_tokens),
            caller=caller,
        )

    def reserve(self, request: GenerateRequest) -> Grant:
        self.decode.post(PEER, Reserve(request=request, remaining_s=WAIT_S))
        self.gateway.wait_for(lambda g: request.ref in g.grants)
        return self.gateway.grants[request.ref]

    def start(self, request: GenerateRequest) -> AttemptRef:
        grant = self.reserve(request)
        self.prefill.post(PEER, Prefill(request=request, grant=grant, remaining_s=WAIT_S))
        return request.ref

    def cancel(self, ref: AttemptRef) -> None:
        self.prefill.post(PEER, Cancel(ref=ref))
        self.decode.post(PEER, Cancel(ref=ref))

    def finish(self, *refs: AttemptRef) -> list[list[int]]:
        self.gateway.wait_for(lambda g: all(ref in g.finished for ref in refs))
        return [self.gateway.tokens[ref] for ref in refs]

    def assert_nothing_is_held(self) -> None:
        """Every block is free or cached again, on both sides, within a moment."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            decode, prefill = self.decode.account.load, self.prefill.load
            if (
                decode.free_blocks == decode.total_blocks
                and decode.quarantined_blocks == 0
                and prefill.free_blocks == prefill.total_blocks
            ):
                return
            time.sleep(0.02)
        raise AssertionError(f"still held: {self.decode.account.load} {self.prefill.load}")


@contextmanager
def running_pair(
    folder: Path,
    *,
    transport: str = "auto",
    decode_blocks: int = 64,
    prefill_blocks: int = 64,
    max_queued_requests: int = 1024,
    split_dense_experts: int = 0,
    mirrored: bool = False,
    meeting: Meeting | None = None,
) -> Iterator[Pair]:
    """``mirrored``: engines and transports on separate memory, as on a GPU. ``meeting``: how the
    decode rank comes by its group; None: as a rank alone.
    """
    device = torch.device("cpu")
    single = ExpertGroup.single(device)

    def loaded(split: int) -> LoadedModel:
        return load(
            folder,
            device=device,
            dtype="float32",
            numerics="exact",
            group=single,
            split_dense_experts=split,
            block_tokens=BLOCK_TOKENS,
        )

    gateway = Gateway()
    model = loaded(0)
    prefill, prefill_scheduler = _prefill(
        model, gateway, prefill_blocks, max_queued_requests, transport, mirrored=mirrored
    )
    decode, decode_scheduler = _decode(
        loaded(split_dense_experts) if split_dense_experts else model,
        gateway,
        decode_blocks,
        mirrored=mirrored,
        meeting=meeting or RankMeeting(Rendezvous(single, "unused"), patience_s=WAIT_S),
    )
    threads = [threading.Thread(target=loop.run) for loop in (prefill, decode)]
    for thread in threads:
        thread.start()
    try:
        yield Pair(
            model=model,
            prefill=prefill,
            decode=decode,
            prefill_scheduler=prefill_scheduler,
            decode_scheduler=decode_scheduler,
            gateway=gateway,
        )
    finally:
        prefill.stop()
        decode.stop()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)


def _prefill(
    model: LoadedModel,
    gateway: Gateway,
    num_blocks: int,
    max_queued_requests: int,
    transport: str,
    *,
    mirrored: bool,
) -> tuple[PrefillLoop, PrefillScheduler]:
    worker = WorkerRef(WorkerId("prefill-0"), new_incarnation())
    storage = KVStorage(model.layout, num_blocks, device=torch.device("cpu"))
    memory = wrap(model.layout, num_blocks, address=storage.memory_address, owner=storage)
    if mirrored:
        memory = allocate_shared(model.layout, num_blocks)
    pool = BlockPool(num_blocks)
    index = PrefixIndex(pool)
    scheduler = PrefillScheduler(
        pool,
        index,
        block_tokens=BLOCK_TOKENS,
        fingerprint="f",
        limits=PrefillLimits(max_batch_tokens=64, max_queued_requests=max_queued_requests),
    )
    loop = PrefillLoop(
        worker=worker,
        scheduler=scheduler,
        forward=Forward(
            ModelRunner(model.model, storage), layers_per_push=1, device=torch.device("cpu")
        ),
        ranks=OneRank(),
        sampler=Sampler(model.config.vocab_size, "cpu"),
        source=make_source(
            memory,
            worker,
            lift=HostMirror(storage, buffer(memory)).store if mirrored else None,
            transport=transport,  # type: ignore[arg-type]
        ),
        outbox=gateway,  # type: ignore[arg-type]
        pool=pool,
        prefix_index=index,
        prefix_feed=PrefixFeed(),
        vocab_size=model.config.vocab_size,
    )
    return loop, scheduler


def _decode(
    model: LoadedModel, gateway: Gateway, num_blocks: int, *, mirrored: bool, meeting: Meeting
) -> tuple[DecodeLoop, DecodeScheduler]:
    worker = WorkerRef(WorkerId("decode-0/0"), new_incarnation())
    memory = allocate_shared(model.layout, num_blocks)
    storage = KVStorage(model.layout, num_blocks, device=torch.device("cpu"), buffer=buffer(memory))
    scheduler = DecodeScheduler(BlockPool(num_blocks), block_tokens=BLOCK_TOKENS, max_batch=32)
    swap = SwapSpace(storage)
    sink = make_sink(memory, worker, lambda event: loop.post_transfer(event))  # noqa: PLW0108
    loop = DecodeLoop(
        worker=worker,
        seat=0,
        scheduler=scheduler,
        intake=Intake(
            worker=worker,
            scheduler=scheduler,
            sink=sink,
            layout_digest=model.layout.digest(),
            max_model_len=min(model.config.max_model_len, num_blocks * BLOCK_TOKENS),
            max_granted=64,
            swap_out=swap.put,
        ),
        swap=swap,
        runner=ModelRunner(model.model, storage),
        sampler=Sampler(model.config.vocab_size, "cpu"),
        experts=ExpertMoves(
            exchanges={},
            placements={},
            counts=None,
            seat=0,
            topology=Topology(1),
            mode="global",
            rule=RebalanceRule(window=100, interval=100, above=1.0),
        ),
        meter=model.meter,
        meeting=meeting,
        least_ranks=1,
        two_batches=TwoBatches("never", possible=False),
        outbox=gateway,  # type: ignore[arg-type]
        on_membership=lambda: None,
        land=HostMirror(storage, buffer(memory)).load if mirrored else lambda _blocks: None,
        device=torch.device("cpu"),
    )
    return loop, scheduler
