"""``headrace status --experts``: what each layer's experts do, from the gateway's metrics.

With ``--record`` the tokens of each expert become a recorded load, by which a decode worker can
place its experts when it starts (``decode.experts.load_file``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engine.experts.recorded_load import RecordedLoad
from protocol.errors import ConfigError

_METRIC = "headrace_expert_"
_COLUMNS = (
    "layer",
    "experts",
    "slots",
    "tokens",
    "balancedness",
    "busiest",
    "its share",
    "replicas",
)


@dataclass(slots=True)
class Layer:
    tokens: dict[int, float] = field(default_factory=dict)  # by expert
    replicas: dict[int, float] = field(default_factory=dict)  # by expert
    slots: float = 0
    balancedness: float = 1


@dataclass(slots=True)
class Group:
    """The experts of one decode worker, by layer."""

    placement_epoch: float = 0
    migrations: float = 0
    layers: dict[int, Layer] = field(default_factory=dict)


def groups_in(metrics: str) -> dict[str, Group]:
    """By group id, from the text of /metrics; none before the first window is over."""
    groups: dict[str, Group] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if not sample.name.startswith(_METRIC) or "group" not in sample.labels:
                continue
            name = sample.name.removeprefix(_METRIC).removesuffix("_total")
            group = groups.setdefault(sample.labels["group"], Group())
            if name in ("placement_epoch", "migrations"):
                setattr(group, name, sample.value)
                continue
            layer = group.layers.setdefault(int(sample.labels["layer"]), Layer())
            if name in ("slots", "balancedness"):
                setattr(layer, name, sample.value)
            elif name in ("tokens", "replicas"):
                getattr(layer, name)[int(sample.labels["expert"])] = sample.value
    return groups


def lines_of_experts(groups: Mapping[str, Group]) -> list[str]:
    if not groups:
        return [
            "no experts yet: a decode worker reports after decode.experts.rebalance_window steps"
        ]
    lines: list[str] = []
    for name, group in sorted(groups.items()):
        lines += [
            "",
            f"{name}: placement epoch {group.placement_epoch:.0f}, "
            f"{group.migrations:.0f} experts moved",
        ]
        rows = [list(_COLUMNS), *(_row(number, of) for number, of in sorted(group.layers.items()))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines += [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
    return lines


def _row(number: int, layer: Layer) -> list[str]:
    total = sum(layer.tokens.values())
    busiest = max(layer.tokens, key=lambda expert: layer.tokens[expert])
    share = layer.tokens[busiest] / total if total else 0.0
    return [
        str(number),
        str(len(layer.tokens)),
        f"{layer.slots:.0f}",
        f"{total:.0f}",
        f"{layer.balancedness:.3f}",
        str(busiest),
        f"{share:.1%}",
        f"{layer.replicas[busiest]:.0f}",
    ]


def record(groups: Mapping[str, Group], file: Path) -> None:
    """Write the load of the only group.

    Raises:
        ConfigError: there is none or more than one, or the file cannot be written.
    """
    if len(groups) != 1:
        raise ConfigError(
            f"--record needs one decode worker with experts, and there are {len(groups)}: "
            f"{', '.join(sorted(groups)) or 'none has reported yet'}"
        )
    (group,) = groups.values()
    layers = {
        number: [layer.tokens[expert] for expert in sorted(layer.tokens)]
        for number, layer in group.layers.items()
    }
    experts = len(next(iter(layers.values())))
    try:
        file.write_bytes(RecordedLoad(num_experts=experts, layers=layers).to_json())
    except OSError as error:
        raise ConfigError(f"--record {file}: {error.strerror}") from error
