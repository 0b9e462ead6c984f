"""What is asked of Ray for one worker, and what is said while Ray has no room. Pure.

A worker is one placement group with a bundle for each of its ranks, so Ray gives it all of its
places at once or none. This module does not know Ray.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Resources = Mapping[str, float]

NODE_LABEL = "ray.io/node-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """``ranks`` processes that are placed together. ``topology`` is Ray's strategy by label."""

    name: str
    ranks: int
    each: Resources
    topology: Mapping[str, str]

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [dict(self.each) for _ in range(self.ranks)]

    @property
    def wanted(self) -> str:
        """For people: ``4 × (1 CPU, 1 GPU) in one node``."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.each.items())
        within = [
            "one node" if label == NODE_LABEL else f"nodes of one {label}"
            for label, strategy in self.topology.items()
            if strategy == "STRICT_PACK"
        ]
        where = f" in {within[0]}" if within and self.ranks > 1 else ""
        return f"{self.ranks} × ({each}){where}"


def a_gang(
    name: str,
    ranks: int,
    *,
    device: str,
    cpus: float,
    nodes: Sequence[Resources],
    domain_label: str = "",
) -> Gang:
    """The gang of a worker whose ranks compute on ``device``, in a cluster of ``nodes``.

    All ranks go to one node if one is large enough when empty; else to few nodes, which have an
    equal ``domain_label`` if one is named.
    """
    each = {"CPU": cpus} | ({"GPU": 1.0} if device.startswith("cuda") else {})
    if any(_room(node, each) >= ranks for node in nodes):
        topology = {NODE_LABEL: "STRICT_PACK"}
    else:
        topology = {NODE_LABEL: "PACK"}
    if domain_label:
        topology[domain_label] = "STRICT_PACK"
    return Gang(name=name, ranks=ranks, each=each, topology=topology)


def offers(nodes: Sequence[Resources]) -> str:
    """For people: what each node has in all."""
    return "; ".join(
        ", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU") if node.get(name))
        or "nothing"
        for node in nodes
    )


def _room(node: Resources, each: Resources) -> int:
    return min(int(node.get(name, 0) // amount) for name, amount in each.items())
