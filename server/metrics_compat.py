"""The few gauges that autoscalers and inference gateways read, under the names they know.

Kubernetes' inference extension and llm-d ask for three signals by vLLM's names. Colons are for
recording rules, so our own metrics do not have them.
"""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.cluster import Cluster

_MODEL = ("model_name",)


class VllmAliases(Collector):
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "In decode batches", labels=_MODEL)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting", "For decode ranks, or at workers", labels=_MODEL
        )
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of decode blocks in use, 0 to 1", labels=_MODEL
        )
        members = self._cluster.members
        for model in sorted({state.info.model for state in members}):
            mine = [state for state in members if state.info.model == model]
            decode = [state.load for state in mine if state.info.role == "decode"]
            queued = sum(state.load.queued_requests for state in mine)
            total = sum(load.total_blocks for load in decode)
            free = sum(load.free_blocks for load in decode)
            running.add_metric([model], sum(load.running_requests for load in decode))
            waiting.add_metric([model], queued + self._cluster.waiting_requests)
            usage.add_metric([model], (total - free) / total if total else 0.0)
        yield from (running, waiting, usage)
