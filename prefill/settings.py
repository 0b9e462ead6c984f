"""Settings of one prefill worker process. Values are final; ``deploy`` reads flags and files."""

from pydantic import ByteSize, PositiveInt

from runtime.settings import (
    BusSettings,
    Device,
    KVSettings,
    ModelSettings,
    ProcessSettings,
    Settings,
    WorkerAddress,
)


class PrefillSettings(Settings):
    model: ModelSettings = ModelSettings()
    kv: KVSettings = KVSettings()
    bus: BusSettings = BusSettings()
    process: ProcessSettings = ProcessSettings()

    workers: PositiveInt = 1
    """Prefill workers that the local launcher starts. A worker itself ignores it."""

    worker_id: str = "prefill-0"
    """Unique in the cluster and stable across restarts of the process."""

    bind: WorkerAddress = "tcp://127.0.0.1:0"
    """Where gateways reach this worker. Port 0 takes a free one; it is announced."""

    device: Device = "cpu"
    """cpu, cuda or cuda:N."""

    kv_cache_bytes: ByteSize = ByteSize(1 << 30)
    """Memory for KV blocks: prompts being computed and the prefix cache. Such as 512MiB."""

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
