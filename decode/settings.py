"""Settings of one decode rank process. Values are final; ``deploy`` reads flags and files."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from runtime.settings import (
    BusSettings,
    Device,
    HostPort,
    KVSettings,
    ModelSettings,
    Places,
    ProcessSettings,
    Settings,
    WorkerAddress,
)

CPU_STEP_TIMEOUT_S = 10.0  # the scheduler's lease: nobody counts on the rank any more
GPU_STEP_TIMEOUT_S = 30.0
SPARE_FROM = 4  # ranks; below, room for another one's experts costs more than half as much again


class GroupSettings(Settings):
    """The ranks that share one model replica and step together."""

    ranks: PositiveInt = 2
    """Ranks of the decode worker. Each MoE layer's experts are spread over all of them."""

    rank: NonNegativeInt | None = None
    """This process's rank. Empty: start this node's ranks as children of this process."""

    nodes: PositiveInt = 1
    """Machines or containers that share the ranks, consecutive ones each."""

    node: NonNegativeInt = 0
    """Which of the nodes this is, from 0; its own ranks are started when `rank` is empty."""

    first_ranks: PositiveInt | None = None
    """Ranks that are enough to begin with; the others join when they come. Empty: all of them."""

    least_ranks: PositiveInt | None = None
    """Ranks that go on together when the others are lost; each gets expert slots for that. Empty:
    one fewer than all from four ranks on, and all of them below."""

    rendezvous: HostPort = "127.0.0.1:8200"
    """host:port where the ranks meet, at the start and after each loss; rank 0 listens there."""

    places: Places = ""
    """Where further ranks listen, such as 1=host:port,8=host:port: a rank that is new finds the
    others there while rank 0 is lost. Equal on all ranks. Empty: wherever a port is free."""

    rendezvous_timeout_s: PositiveFloat = 120.0
    """Seconds that a rank waits for the others before it gives up."""

    step_timeout_s: PositiveFloat | None = None
    """Seconds that a rank may keep the others waiting in a step before it counts as lost. All
    streams stand still so long when a rank freezes. Empty: 10 on CPUs; 30 on GPUs, where first
    steps compile kernels."""

    rows: Literal["auto", "shared_memory", "gloo"] = "auto"
    """What carries rows between ranks on CPUs. shared_memory: memory that all of them map, as
    processes of one host, container and user can. gloo: TCP. auto: shared_memory where it can."""

    @model_validator(mode="after")
    def _rank_is_in_the_group(self) -> "GroupSettings":
        if self.rank is not None and self.rank >= self.ranks:
            raise ValueError(f"rank {self.rank} is not one of 0..{self.ranks - 1}: raise ranks")
        return self

    @model_validator(mode="after")
    def _every_node_has_a_rank(self) -> "GroupSettings":
        if self.nodes > self.ranks:
            raise ValueError(f"{self.nodes} nodes cannot share {self.ranks} ranks: lower nodes")
        if self.node >= self.nodes:
            raise ValueError(f"node {self.node} is not one of 0..{self.nodes - 1}: raise nodes")
        return self

    @model_validator(mode="after")
    def _parts_of_the_group(self) -> "GroupSettings":
        for name, number in (("first_ranks", self.first_ranks), ("least_ranks", self.least_ranks)):
            if number is not None and number > self.ranks:
                raise ValueError(f"{name} {number} is more than ranks {self.ranks}: lower it")
        return self

    @model_validator(mode="after")
    def _places_of_ranks(self) -> "GroupSettings":
        numbers = [int(entry.partition("=")[0]) for entry in self.places.split(",") if entry]
        if len(set(numbers)) < len(numbers) or any(not 0 < n < self.ranks for n in numbers):
            raise ValueError(
                f"places must name each rank once, of 1..{self.ranks - 1}: rank 0 is at rendezvous"
            )
        return self

    @property
    def place_of(self) -> dict[int, str]:
        """``places`` by rank."""
        entries = (entry.partition("=") for entry in self.places.split(",") if entry)
        return {int(rank): place for rank, _, place in entries}

    @property
    def least(self) -> int:
        if self.least_ranks is not None:
            return self.least_ranks
        return self.ranks - 1 if self.ranks >= SPARE_FROM else self.ranks

    @property
    def ranks_of_node(self) -> range:
        """The consecutive ranks that run here; nodes differ by one rank at most."""
        first, end = (number * self.ranks // self.nodes for number in (self.node, self.node + 1))
        return range(first, end)


class ExpertSettings(Settings):
    """How a model's experts are spread over the ranks of the group; the same on every rank."""

    redundant: NonNegativeInt = 0
    """Expert slots beyond one for each expert, over all ranks, for replicas of busy experts."""

    ranks_per_tray: PositiveInt = 1
    """Consecutive ranks that may fail together. Replicas of an expert are put in other trays."""

    transport: Literal["auto", "all_to_all", "padded", "all_gather", "deepep", "nccl_ep"] = "auto"
    """How tokens travel to their experts. all_to_all: exact sizes. padded: fixed sizes, as CUDA
    graphs need. all_gather: to all ranks, results summed on the way. deepep, nccl_ep: those
    libraries. auto: what suits device, numerics and sizes, never an optional library."""

    payload: Literal["native", "bf16", "fp8"] = "native"
    """What travels: values in the model's dtype, in bfloat16, or in 8 bits with a scale for each
    128. What rounds needs fast numerics."""

    queue_pair_depth: PositiveInt = 1024
    """What NVSHMEM_QP_DEPTH is on every rank, for transport deepep; 1024 where it is not set."""

    two_batches: Literal["auto", "measure", "always", "never"] = "auto"
    """Whether a step's tokens pass the layers as two batches, one computing while the other's
    rows travel. measure: what is quicker here, tried now and then. auto: so on GPUs only."""

    load_file: Path | None = None
    """A recorded expert load (JSON) to place experts by at the start. Empty: evenly."""

    rebalance: bool = False
    """Count where tokens go and move experts between the ranks' slots while they decode."""

    rebalance_window: PositiveInt = 1000
    """Steps that are counted before experts move; also the interval of reports."""

    rebalance_interval: PositiveInt = 3000
    """Steps from one rebalancing to the next; at least the window."""

    rebalance_above: Annotated[float, Field(ge=1)] = 1.05
    """A layer stays as it is when its busiest rank has at most this times the mean of tokens."""

    @model_validator(mode="after")
    def _window_fits_the_interval(self) -> "ExpertSettings":
        if self.rebalance and self.rebalance_window > self.rebalance_interval:
            raise ValueError(
                f"rebalance_window {self.rebalance_window} is longer than rebalance_interval "
                f"{self.rebalance_interval}: lower the window or raise the interval"
            )
        return self


class DecodeSettings(Settings):
    model: ModelSettings = ModelSettings()
    kv: KVSettings = KVSettings()
    bus: BusSettings = BusSettings()
    process: ProcessSettings = ProcessSettings()
    group: GroupSettings = GroupSettings()
    experts: ExpertSettings = ExpertSettings()

    worker_id: str = "decode-0"
    """Of the whole group, unique in the cluster; rank 3 announces itself as decode-0/3."""

    bind: WorkerAddress = "tcp://127.0.0.1:0"
    """Where gateways reach this rank; KV by tcp comes to the same host. Port 0 takes a free one;
    from another, ranks that are started together take consecutive ports."""

    device: Device = "cpu"
    """cpu, cuda or cuda:N. cuda: ranks that are started together take one GPU each, in order."""

    kv_cache_bytes: ByteSize = ByteSize(1 << 30)
    """Memory for KV blocks of this rank. Such as 512MiB."""

    num_blocks: PositiveInt | None = None
    """KV blocks of this rank. Empty: as many as kv_cache_bytes holds."""

    max_batch: PositiveInt = 64
    """Requests that take part in one step of this rank."""

    max_granted_requests: PositiveInt = Field(default=128)
    """Beyond this many grants that wait for KV, reservations are refused as overloaded."""

    @property
    def step_timeout_s(self) -> float:
        """Of the group, on this rank's device."""
        by_device = CPU_STEP_TIMEOUT_S if self.device == "cpu" else GPU_STEP_TIMEOUT_S
        return self.group.step_timeout_s or by_device
