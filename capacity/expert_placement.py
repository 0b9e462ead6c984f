"""How many expert slots and how much room for KV a model leaves on each of N ranks.

Slots come from the code that places experts when a decode worker starts, so the table is what
would happen. Figures are per rank, one GPU each; every rank has equally many slots, used or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from capacity.model_shapes import ModelShape
from engine.experts.placement import EMPTY, place_evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRow:
    """A model on so many ranks. Bytes and tokens are of one rank."""

    model: str
    ranks: int
    slots_per_rank: int
    replicas: int  # slots on all ranks that hold a further copy of an expert
    empty: int  # slots on all ranks that hold nothing
    expert_bytes: int  # of all its slots
    weight_bytes: int  # of everything it holds, slots included
    kv_bytes: int  # below 0: the weights alone do not fit

    kv_tokens: int  # of KV cache; 0 when there is no room

    @property
    def fits(self) -> bool:
        return self.kv_tokens > 0

    @property
    def kv_tokens_of_all(self) -> int:
        return self.kv_tokens * self.ranks


def placement_row(
    model: ModelShape, ranks: int, *, redundant: int, memory_bytes: float, reserved: float
) -> PlacementRow:
    """``memory_bytes`` is one GPU's; the share ``reserved`` is for activations, buffers and graphs.

    Raises:
        ConfigError: a count is out of range.
    """
    placement = place_evenly(model.experts, ranks, redundant)
    slots = [expert for held in placement.slots for expert in held]
    used = sum(expert != EMPTY for expert in slots)
    expert_bytes = placement.slots_per_rank * model.expert_layers * model.expert_bytes
    weight_bytes = expert_bytes + model.replicated_bytes
    kv_bytes = memory_bytes * (1 - reserved) - weight_bytes
    return PlacementRow(
        model=model.name,
        ranks=ranks,
        slots_per_rank=placement.slots_per_rank,
        replicas=used - model.experts,
        empty=len(slots) - used,
        expert_bytes=round(expert_bytes),
        weight_bytes=round(weight_bytes),
        kv_bytes=round(kv_bytes),
        kv_tokens=max(0, int(kv_bytes // model.kv_bytes_per_token)),
    )


def table_of(rows: Sequence[PlacementRow]) -> str:
    """In Markdown."""
    heads = (
        "ranks",
        "slots a rank",
        "replicas",
        "empty",
        "experts",
        "weights",
        "KV room",
        "tokens",
    )
    lines = [" | ".join(["", *heads, "on all ranks", ""]).strip()]
    lines.append("|" + "---:|" * (len(heads) + 1))
    lines += [" | ".join(["", *_cells(row), ""]).strip() for row in rows]
    return "\n".join(lines)


def _cells(row: PlacementRow) -> list[str]:
    if not row.fits:
        room = ["does not fit", "-", "-"]
    else:
        room = [_gb(row.kv_bytes), _short(row.kv_tokens), _short(row.kv_tokens_of_all)]
    return [
        str(row.ranks),
        str(row.slots_per_rank),
        str(row.replicas),
        str(row.empty),
        _gb(row.expert_bytes),
        _gb(row.weight_bytes),
        *room,
    ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:.2f} M"
