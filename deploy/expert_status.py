"""``headrace status --experts``: what experts and their ranks do, from the gateway's metrics.

With ``--record`` the tokens of each expert become a recorded load, by which a decode worker can
place its experts when it starts (``decode.experts.load_file``).
"""

from collections.abc import Mapping, Sequence
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
    "largest",
)
_UNITS = {10**9: "GB", 10**6: "MB", 10**3: "kB"}
_RANK_COLUMNS = (
    "rank",
    "dispatch",
    "compute",
    "combine",
    "waits",
    "sent a layer",
    "groups",
    "stood still",
    "transport",
    "buffers",
)


@dataclass(slots=True)
class Layer:
    tokens: dict[int, float] = field(default_factory=dict)  # by expert
    replicas: dict[int, float] = field(default_factory=dict)  # by expert
    # By expert that has several: part of its tokens that one of them gets.
    largest_share: dict[int, float] = field(default_factory=dict)
    slots: float = 0
    balancedness: float = 1


@dataclass(slots=True)
class Rank:
    """What a rank's exchanges cost since it started. Parts are dispatch, compute, combine, rows and
    skew.
    """

    seconds: dict[str, float] = field(default_factory=dict)  # by part
    sent_bytes: dict[str, float] = field(default_factory=dict)  # by part
    steps: dict[str, float] = field(default_factory=dict)  # by batches of a step
    layer_calls: float = 0
    row_exchanges: float = 0
    groups_formed: float = 0
    interrupted_s: float = 0
    buffer_bytes: float = 0
    transport: str = ""


@dataclass(slots=True)
class Group:
    """The experts of one decode worker, by layer, and its ranks' exchanges."""

    group_epoch: float = 0
    placement_epoch: float = 0
    migrations: float = 0
    layers: dict[int, Layer] = field(default_factory=dict)
    ranks: dict[int, Rank] = field(default_factory=dict)


def groups_in(metrics: str) -> dict[str, Group]:
    """By group id, from the text of /metrics; without layers before the first window is over."""
    groups: dict[str, Group] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if not sample.name.startswith(_METRIC) or "group" not in sample.labels:
                continue
            name = sample.name.removeprefix(_METRIC).removesuffix("_total")
            group = groups.setdefault(sample.labels["group"], Group())
            if name in ("group_epoch", "placement_epoch", "migrations"):
                setattr(group, name, sample.value)
                continue
            if "rank" in sample.labels:
                rank = group.ranks.setdefault(int(sample.labels["rank"]), Rank())
                _note(rank, name, sample.labels, sample.value)
                continue
            layer = group.layers.setdefault(int(sample.labels["layer"]), Layer())
            if name in ("slots", "balancedness"):
                setattr(layer, name, sample.value)
            elif name in ("tokens", "replicas", "largest_share"):
                getattr(layer, name)[int(sample.labels["expert"])] = sample.value
    return groups


def _note(rank: Rank, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == "exchange_seconds":
        rank.seconds[labels["part"]] = value
    elif name == "exchange_bytes":
        rank.sent_bytes[labels["part"]] = value
    elif name == "steps":
        rank.steps[labels["batches"]] = value
    elif name == "buffer_bytes":
        rank.buffer_bytes, rank.transport = value, labels["transport"]
    elif name == "interrupted_seconds":
        rank.interrupted_s = value
    elif name in ("layer_calls", "row_exchanges", "groups_formed"):
        setattr(rank, name, value)


def lines_of_experts(groups: Mapping[str, Group]) -> list[str]:
    if not groups:
        return ["no decode worker has reported yet"]
    lines: list[str] = []
    for name, group in sorted(groups.items()):
        lines += [
            "",
            f"{name}: group epoch {group.group_epoch:.0f}, placement epoch "
            f"{group.placement_epoch:.0f}, {group.migrations:.0f} experts moved",
        ]
        rows = [_row(number, of) for number, of in sorted(group.layers.items())]
        if rows:
            lines += _table(_COLUMNS, rows)
        else:
            lines.append(
                "no window of tokens yet: one takes decode.experts.rebalance_window steps, and a "
                "dense model has none"
            )
        if group.ranks:
            lines += ["", _skew_of(group)]
            ranks = [_rank_row(number, of) for number, of in sorted(group.ranks.items())]
            lines += _table(_RANK_COLUMNS, ranks)
    return lines


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    ]


def _skew_of(group: Group) -> str:
    skews = [
        rank.seconds.get("skew", 0.0) / rank.row_exchanges
        for rank in group.ranks.values()
        if rank.row_exchanges
    ]
    steps = next(iter(group.ranks.values())).steps
    return (
        "means of a MoE layer, and of a turn for waits; ranks come "
        f"{_ms(max(skews, default=0.0))} apart to a turn; "
        f"{steps.get('2', 0):.0f} of {sum(steps.values()):.0f} steps as two batches"
    )


def _rank_row(number: int, rank: Rank) -> list[str]:
    layers, turns = max(1.0, rank.layer_calls), max(1.0, rank.row_exchanges)
    parts = (rank.seconds.get(part, 0.0) / layers for part in ("dispatch", "compute", "combine"))
    return [
        str(number),
        *(_ms(seconds) for seconds in parts),
        _ms(rank.seconds.get("rows", 0.0) / turns),
        _size(sum(rank.sent_bytes.values()) / layers),
        f"{rank.groups_formed:.0f}",
        f"{rank.interrupted_s:.1f} s",
        rank.transport,
        _size(rank.buffer_bytes),
    ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms"


def _size(count: float) -> str:
    scale = next((unit for unit in _UNITS if count >= unit), 1)
    return f"{count / scale:.1f} {_UNITS[scale]}" if scale > 1 else f"{count:.0f} B"


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
        f"{layer.largest_share.get(busiest, 1.0):.0%}",
    ]


def record(groups: Mapping[str, Group], file: Path) -> None:
    """Write the load of the only group.

    Raises:
        ConfigError: there is none or more than one, or the file cannot be written.
    """
    counted = {name: group for name, group in groups.items() if group.layers}
    if len(counted) != 1:
        raise ConfigError(
            f"--record needs one decode worker with experts, and there are {len(counted)}: "
            f"{', '.join(sorted(counted)) or 'none has reported yet'}"
        )
    (group,) = counted.values()
    layers = {
        number: [layer.tokens[expert] for expert in sorted(layer.tokens)]
        for number, layer in group.layers.items()
    }
    experts = len(next(iter(layers.values())))
    try:
        file.write_bytes(RecordedLoad(num_experts=experts, layers=layers).to_json())
    except OSError as error:
        raise ConfigError(f"--record {file}: {error.strerror}") from error
