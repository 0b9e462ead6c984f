"""Tokens by expert rank and layer, for the heat map.

Summing the reports of 72 ranks takes longer than a token may wait, so it is done a layer at a time
with a pause for others between layers, and only while somebody looks.
"""

from collections.abc import Mapping, Sequence

import anyio
import anyio.lowlevel
import msgspec

from protocol.ids import WorkerRef
from protocol.workers import ExpertReport
from server.cluster import Cluster
from server.cluster_view import view_of
from server.expert_metrics import layer_of, whole_reports

EVERY_S = 2.0


class ExpertLayer(msgspec.Struct, frozen=True, kw_only=True):
    layer: int
    rank_tokens: list[float]  # of the last window, in the order of the group's rank_numbers
    balancedness: float
    hottest_expert: int
    hottest_share: float  # of the layer's tokens in the last window, whichever expert has most
    most_replicas: int


class ExpertGroup(msgspec.Struct, frozen=True, kw_only=True):
    group: str
    ranks: int
    rank_numbers: list[int]  # those that are there: a group goes on without a lost one
    experts: int
    slots: int  # of one layer, on all ranks
    placement_epoch: int
    migrations: int
    layers: list[ExpertLayer]


class ExpertHeat:
    """Of the groups whose ranks have all reported. Readers share one computation."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._groups: list[ExpertGroup] = []
        self._of: Mapping[WorkerRef, ExpertReport] = {}
        self._next_at = 0.0
        self._busy = anyio.Lock()

    async def groups(self) -> list[ExpertGroup]:
        """At most ``EVERY_S`` old, or as old as the reports are."""
        async with self._busy:
            now = self._cluster.clock.now()
            if now >= self._next_at and self._changed():
                numbers = {
                    group.group_id: [state.info.rank for state in group.ranks]
                    for group in view_of(self._cluster.members).groups
                }
                self._groups = [
                    await _group(name, numbers[name], reports)
                    for name, reports in whole_reports(self._cluster.members, self._of).items()
                ]
                self._next_at = now + EVERY_S
            return self._groups

    def _changed(self) -> bool:
        """Reports are never changed in place: the same objects say the same."""
        latest = self._cluster.expert_reports
        same = latest.keys() == self._of.keys() and all(
            report is self._of[ref] for ref, report in latest.items()
        )
        self._of = dict(latest)
        return not same


async def _group(
    name: str, rank_numbers: list[int], reports: Sequence[ExpertReport]
) -> ExpertGroup:
    layers = []
    slots = 0
    for index, layer in enumerate(reports[0].layers):
        of = layer_of(reports, index)
        window = [
            sum(rank) for rank in zip(*(r.window_tokens[index] for r in reports), strict=True)
        ]
        hottest = max(range(len(window)), key=window.__getitem__)
        slots = of.slots
        layers.append(
            ExpertLayer(
                layer=layer,
                rank_tokens=[round(tokens, 1) for tokens in of.rank_tokens],
                balancedness=round(of.balancedness, 4),
                hottest_expert=hottest,
                hottest_share=round(window[hottest] / max(1, sum(window)), 4),
                most_replicas=max(of.replicas),
            )
        )
        await anyio.lowlevel.checkpoint()
    return ExpertGroup(
        group=name,
        ranks=len(reports),
        rank_numbers=rank_numbers,
        experts=len(reports[0].tokens[0]) if reports[0].tokens else 0,
        slots=slots,
        placement_epoch=max(report.placement_epoch for report in reports),
        migrations=sum(report.migrations for report in reports),
        layers=layers,
    )
