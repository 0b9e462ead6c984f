"""What the experts of a decode group do, over all its ranks, for /metrics.

headrace_expert_tokens_total{group,layer,expert}   tokens that chose the expert
headrace_expert_replicas{group,layer,expert}       slots that hold it
headrace_expert_largest_share{group,layer,expert}  part of its tokens that one of several slots gets
headrace_expert_slots{group,layer}                 slots on all ranks, empty ones included
headrace_expert_balancedness{group,layer}          mean / max of ranks' tokens in the last window
headrace_expert_placement_epoch{group}             how often a layer has got another placement
headrace_expert_migrations_total{group}            experts that have come to ranks that had them not
headrace_expert_exchange_seconds_total{group,rank,part}  dispatch, compute, combine; rows, skew
headrace_expert_exchange_bytes_total{group,rank,part}    to other ranks: dispatch, combine
headrace_expert_layer_calls_total{group,rank}      MoE layers that the rank has passed
headrace_expert_row_exchanges_total{group,rank}    turns that the rank has agreed on with the others
headrace_expert_groups_formed_total{group,rank}    how often the ranks have met
headrace_expert_interrupted_seconds_total{group,rank}    from a group's last turn to the next one's
headrace_expert_steps_total{group,rank,batches}    steps of decoding that passed as one or as two
headrace_expert_group_epoch{group}                 of the group that is in place
headrace_expert_buffer_bytes{group,rank,transport} of the exchange, at most

The last nine are by each rank's own account, as of its last heartbeat. Of the others a group is
shown when all its ranks have reported a window. Ranks report windows of the same steps,
so the sums are of one window but for the moment in which the reports arrive.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from protocol.ids import WorkerRef
from protocol.workers import ExpertReport, ExpertTraffic, WorkerState
from server.cluster_view import view_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExperts:
    """One layer over all ranks. Sequences are by expert, unless they say otherwise."""

    tokens: Sequence[int]
    replicas: Sequence[int]
    largest_share: Sequence[
        float
    ]  # of its tokens, that one replica gets; 1 where it is the only one
    slots: int
    rank_tokens: Sequence[float]  # by rank, of the last window, by the shares of its slots
    balancedness: float  # 1 where no rank has more tokens than the mean, and without tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupExperts:
    layers: Mapping[int, LayerExperts]
    placement_epoch: int
    migrations: int


def groups_of(
    members: Iterable[WorkerState], reports: Mapping[WorkerRef, ExpertReport]
) -> dict[str, GroupExperts]:
    """By group id; groups of which a rank has not reported are left out."""
    return {group: _group(of) for group, of in whole_reports(members, reports).items()}


def whole_reports(
    members: Iterable[WorkerState], reports: Mapping[WorkerRef, ExpertReport]
) -> dict[str, list[ExpertReport]]:
    """By group id, a report from each rank in rank order; groups that lack one are left out."""
    found = {}
    for group in view_of(members).groups:
        of_group = [reports[ref] for ref in group.refs if ref in reports]
        whole = group.complete and len(of_group) == len(group.ranks)
        if whole and len({report.layers for report in of_group}) == 1:
            found[group.group_id] = of_group
    return found


def expert_metrics(
    members: Iterable[WorkerState], reports: Mapping[WorkerRef, ExpertReport]
) -> Iterable[Metric]:
    """The families above."""
    of_expert, of_layer = ("group", "layer", "expert"), ("group", "layer")
    tokens = CounterMetricFamily(
        "headrace_expert_tokens", "Tokens that chose the expert", labels=of_expert
    )
    replicas = GaugeMetricFamily(
        "headrace_expert_replicas", "Slots that hold the expert", labels=of_expert
    )
    largest = GaugeMetricFamily(
        "headrace_expert_largest_share",
        "Part of the expert's tokens that one of its replicas gets, where it has several",
        labels=of_expert,
    )
    slots = GaugeMetricFamily("headrace_expert_slots", "Expert slots on all ranks", labels=of_layer)
    balancedness = GaugeMetricFamily(
        "headrace_expert_balancedness", "Mean over max of ranks' tokens", labels=of_layer
    )
    epoch = GaugeMetricFamily(
        "headrace_expert_placement_epoch", "Placements that layers have got", labels=("group",)
    )
    migrations = CounterMetricFamily(
        "headrace_expert_migrations", "Experts that have come to ranks", labels=("group",)
    )
    for group, experts in groups_of(members, reports).items():
        epoch.add_metric([group], experts.placement_epoch)
        migrations.add_metric([group], experts.migrations)
        for layer, of in experts.layers.items():
            slots.add_metric([group, str(layer)], of.slots)
            balancedness.add_metric([group, str(layer)], of.balancedness)
            for expert, (count, copies) in enumerate(zip(of.tokens, of.replicas, strict=True)):
                tokens.add_metric([group, str(layer), str(expert)], count)
                replicas.add_metric([group, str(layer), str(expert)], copies)
                if copies > 1:
                    share = of.largest_share[expert]
                    largest.add_metric([group, str(layer), str(expert)], share)
    return tokens, replicas, largest, slots, balancedness, epoch, migrations


def traffic_metrics(members: Iterable[WorkerState]) -> Iterable[Metric]:
    """What the ranks' exchanges cost: the last nine families above."""
    of_rank = ("group", "rank")
    seconds = CounterMetricFamily(
        "headrace_expert_exchange_seconds",
        "Time in dispatch, compute and combine, and waiting for step rows",
        labels=(*of_rank, "part"),
    )
    sent = CounterMetricFamily(
        "headrace_expert_exchange_bytes", "Sent to other ranks", labels=(*of_rank, "part")
    )
    calls = CounterMetricFamily(
        "headrace_expert_layer_calls", "MoE layers that the rank has passed", labels=of_rank
    )
    rows = CounterMetricFamily(
        "headrace_expert_row_exchanges", "Turns that the ranks have agreed on", labels=of_rank
    )
    steps = CounterMetricFamily(
        "headrace_expert_steps",
        "Steps of decoding that passed as so many batches",
        labels=(*of_rank, "batches"),
    )
    formed = CounterMetricFamily(
        "headrace_expert_groups_formed", "How often the ranks have met", labels=of_rank
    )
    interrupted = CounterMetricFamily(
        "headrace_expert_interrupted_seconds",
        "Time from the last turn of a group to the first of the next",
        labels=of_rank,
    )
    epoch = GaugeMetricFamily(
        "headrace_expert_group_epoch", "Epoch of the group of ranks", labels=("group",)
    )
    buffers = GaugeMetricFamily(
        "headrace_expert_buffer_bytes",
        "Buffers of the exchange, at most",
        labels=(*of_rank, "transport"),
    )
    epochs: dict[str, int] = {}
    for state in members:
        info, traffic = state.info, state.load.traffic
        if traffic is None:
            continue
        epochs[info.group_id] = max(info.epoch, epochs.get(info.group_id, 0))
        labels = [info.group_id, str(info.rank)]
        for part, value in _seconds_of(traffic).items():
            seconds.add_metric([*labels, part], value)
        sent.add_metric([*labels, "dispatch"], traffic.dispatch_bytes)
        sent.add_metric([*labels, "combine"], traffic.combine_bytes)
        calls.add_metric(labels, traffic.layer_calls)
        rows.add_metric(labels, traffic.row_exchanges)
        steps.add_metric([*labels, "1"], traffic.steps - traffic.steps_in_two)
        steps.add_metric([*labels, "2"], traffic.steps_in_two)
        formed.add_metric(labels, traffic.groups_formed)
        interrupted.add_metric(labels, traffic.interrupted_s)
        buffers.add_metric([*labels, traffic.transport], traffic.buffer_bytes)
    for group, number in epochs.items():
        epoch.add_metric([group], number)
    return seconds, sent, calls, rows, steps, formed, interrupted, epoch, buffers


def _seconds_of(traffic: ExpertTraffic) -> dict[str, float]:
    return {
        "dispatch": traffic.dispatch_s,
        "compute": traffic.compute_s,
        "combine": traffic.combine_s,
        "rows": traffic.row_exchange_s,
        "skew": traffic.skew_s,
    }


def _group(reports: Sequence[ExpertReport]) -> GroupExperts:
    layers = reports[0].layers
    return GroupExperts(
        layers={layer: layer_of(reports, index) for index, layer in enumerate(layers)},
        placement_epoch=max(report.placement_epoch for report in reports),
        migrations=sum(report.migrations for report in reports),
    )


def layer_of(reports: Sequence[ExpertReport], index: int) -> LayerExperts:
    """The layer at ``index`` of the reports; there is one from each rank, in rank order."""
    tokens = [sum(of) for of in zip(*(report.tokens[index] for report in reports), strict=True)]
    window = [sum(of) for of in zip(*(r.window_tokens[index] for r in reports), strict=True)]
    held = [report.held[index] for report in reports]
    copies = Counter(expert for of_rank in held for expert in of_rank if expert >= 0)
    shares = [
        [(e, share) for e, share in zip(of_rank, report.shares[index], strict=True) if e >= 0]
        for of_rank, report in zip(held, reports, strict=True)
    ]
    whole, largest = [0] * len(tokens), [0] * len(tokens)
    for expert, share in chain.from_iterable(shares):
        whole[expert] += share
        largest[expert] = max(largest[expert], share)
    loads = [
        sum(window[e] * share / whole[e] for e, share in of_rank if share) for of_rank in shares
    ]
    busiest = max(loads)
    return LayerExperts(
        tokens=tokens,
        replicas=[copies[expert] for expert in range(len(tokens))],
        largest_share=[
            most / of_all if of_all else 1.0 for most, of_all in zip(largest, whole, strict=True)
        ],
        slots=sum(map(len, held)),
        rank_tokens=loads,
        balancedness=sum(loads) / len(loads) / busiest if busiest else 1.0,
    )
