"""What a gateway knows of the cluster, for /metrics. It is read when somebody asks, and not before.

headrace_gateway_attempts_in_flight             attempts at workers, canaries included
headrace_gateway_waiting_requests               waiting because every decode rank is full
headrace_gateway_stale_frames_total             dropped: of an old attempt, worker or place
headrace_gateway_retries_total                  attempts that were tried again elsewhere
headrace_gateway_migrations_total               streams that went on elsewhere
headrace_worker_up{worker,role}                 1 while this gateway has a link to it
headrace_worker_ranks{worker,role}              processes that share the model, with itself
headrace_worker_running_requests{worker,role}   by the worker's own account, like all below
headrace_worker_queued_requests{worker,role}
headrace_worker_queued_tokens{worker,role}
headrace_worker_blocks{worker,role,state}       free, cached, granted, active, quarantined or total
headrace_worker_step_seconds{worker,role}
headrace_worker_tokens_per_second{worker,role}
headrace_worker_prefix_hit_tokens_total{worker,role}
headrace_link_...                               see ``server.link_metrics``
headrace_expert_...                             see ``server.expert_metrics``
"""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.workers import WorkerLoad
from server.cluster import Cluster
from server.expert_metrics import expert_metrics, traffic_metrics
from server.link_metrics import link_metrics

_WORKER = ("worker", "role")


class ClusterMetrics(Collector):
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def collect(self) -> Iterable[Metric]:
        cluster = self._cluster
        yield GaugeMetricFamily(
            "headrace_gateway_attempts_in_flight",
            "Attempts at workers now",
            value=len(cluster.attempts.by_request),
        )
        yield GaugeMetricFamily(
            "headrace_gateway_waiting_requests",
            "Requests that wait for a decode rank",
            value=cluster.waiting_requests,
        )
        yield CounterMetricFamily(
            "headrace_gateway_stale_frames",
            "Messages about nothing current",
            value=cluster.links.stale_frames,
        )
        yield CounterMetricFamily(
            "headrace_gateway_retries", "Attempts tried again elsewhere", value=cluster.retries
        )
        yield CounterMetricFamily(
            "headrace_gateway_migrations",
            "Streams that went on elsewhere",
            value=cluster.migrations,
        )
        yield from self._workers()
        yield from expert_metrics(cluster.members, cluster.expert_reports)
        yield from traffic_metrics(cluster.members)
        yield from link_metrics(cluster.members)

    def _workers(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("headrace_worker_up", "The gateway has a link to it", labels=_WORKER)
        blocks = GaugeMetricFamily(
            "headrace_worker_blocks", "KV blocks", labels=(*_WORKER, "state")
        )
        hits = CounterMetricFamily(
            "headrace_worker_prefix_hit_tokens",
            "Prompt tokens found in the prefix cache",
            labels=_WORKER,
        )
        loads = {
            name: GaugeMetricFamily(f"headrace_worker_{name}", text, labels=_WORKER)
            for name, text in (
                ("ranks", "Processes that share the model with it, itself included"),
                ("running_requests", "Requests in the batch"),
                ("queued_requests", "Requests that wait at the worker"),
                ("queued_tokens", "Prompt tokens that wait or are being computed"),
                ("step_seconds", "Smoothed duration of a step"),
                ("tokens_per_second", "Smoothed rate of tokens"),
            )
        }
        for state in self._cluster.members:
            load = state.load
            labels = [state.info.ref.worker_id, state.info.role]
            up.add_metric(labels, float(self._cluster.links.is_up(state.info.ref)))
            for name, count in _blocks_by_state(load).items():
                blocks.add_metric([*labels, name], count)
            hits.add_metric(labels, load.prefix_hit_tokens)
            loads["ranks"].add_metric(labels, state.info.world_size)
            loads["running_requests"].add_metric(labels, load.running_requests)
            loads["queued_requests"].add_metric(labels, load.queued_requests)
            loads["queued_tokens"].add_metric(labels, load.queued_tokens)
            loads["step_seconds"].add_metric(labels, load.step_seconds)
            loads["tokens_per_second"].add_metric(labels, load.tokens_per_second)
        yield from (up, blocks, hits, *loads.values())


def _blocks_by_state(load: WorkerLoad) -> dict[str, int]:
    """The worker's ledger. It asserts its own sum; ``free`` is what that leaves."""
    held = {
        "cached": load.cached_blocks,
        "granted": load.granted_blocks,
        "active": load.active_blocks,
        "quarantined": load.quarantined_blocks,
    }
    free = load.total_blocks - sum(held.values())
    return {"free": free, **held, "total": load.total_blocks}
