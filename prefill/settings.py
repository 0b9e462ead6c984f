"""Settings of one prefill worker process. Values are final; ``deploy`` reads flags and files."""

from typing import Literal

from pydantic import ByteSize, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from runtime.settings import (
    BusSettings,
    Device,
    HostPort,
    KVSettings,
    ModelSettings,
    ProcessSettings,
    Settings,
    WorkerAddress,
)


class PrefillGroupSettings(Settings):
    """The ranks that share the model: the heads, hidden units and experts of each layer, or in
    stages also the layers.
    """

    ranks: PositiveInt = 1
    """Ranks of one prefill worker, each a process with a part of every layer of its stage. The
    model's heads must divide by the ranks of a stage."""

    stages: PositiveInt = 1
    """Groups of as many ranks each, which have the model's layers one group after another, and
    compute one chunk of a prompt each at a time. ranks must be a multiple."""

    rank: NonNegativeInt | None = None
    """This process's rank; 0 leads. Empty: start all ranks as children of this process."""

    rendezvous: HostPort = "127.0.0.1:8210"
    """host:port where the ranks meet, at the start and after each loss; rank 0 listens there."""

    rendezvous_timeout_s: PositiveFloat = 120.0
    """Seconds that a rank waits for the others before it says so and waits again."""

    step_timeout_s: PositiveFloat = 30.0
    """Seconds that a rank may keep the others waiting in a step before it counts as lost."""

    rows: Literal["auto", "shared_memory", "gloo"] = "auto"
    """What carries rows between ranks on CPUs, as decode.group.rows."""

    @model_validator(mode="after")
    def _rank_is_in_the_group(self) -> "PrefillGroupSettings":
        if self.ranks % self.stages:
            raise ValueError(
                f"{self.ranks} ranks cannot form {self.stages} stages of as many each: make ranks "
                "a multiple of stages"
            )
        if self.rank is not None and self.rank >= self.ranks:
            raise ValueError(f"rank {self.rank} is not one of 0..{self.ranks - 1}: raise ranks")
        return self


class PrefillSettings(Settings):
    model: ModelSettings = ModelSettings()
    kv: KVSettings = KVSettings()
    bus: BusSettings = BusSettings()
    process: ProcessSettings = ProcessSettings()
    group: PrefillGroupSettings = PrefillGroupSettings()

    workers: PositiveInt = 1
    """Prefill workers that the local launcher starts. A worker itself ignores it."""

    worker_id: str = "prefill-0"
    """Unique in the cluster and stable across restarts of the process."""

    bind: WorkerAddress = "tcp://127.0.0.1:0"
    """Where gateways reach this worker, which is its rank 0. Port 0 takes a free one."""

    device: Device = "cpu"
    """cpu, cuda or cuda:N. cuda: ranks that are started together take one GPU each, in order."""

    kv_cache_bytes: ByteSize = ByteSize(1 << 30)
    """Memory of each rank for KV blocks: prompts being computed and the prefix cache. Such as
    512MiB."""

    num_blocks: PositiveInt | None = None
    """KV blocks. Empty: as many as kv_cache_bytes holds."""

    max_batch_tokens: PositiveInt = 512
    """Prompt tokens computed in one step, over all prompts of the batch."""

    max_batch: PositiveInt = 16
    """Prompts computed in one step."""

    max_queued_requests: PositiveInt = 512
    """Beyond this many waiting prompts, new ones are refused as overloaded."""

    layers_per_push: PositiveInt = 8
    """Layers whose KV is pushed together, while the next ones compute."""


def rank_name(worker_id: str, rank: int) -> str:
    """What people call the process; the rank that leads has the worker's own name."""
    return f"{worker_id}/{rank}" if rank else worker_id
