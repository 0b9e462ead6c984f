"""The gated activation between the two halves of a feed-forward layer."""

# Shape suffixes: N rows   J gate and up columns   F half of them

from torch import Tensor
from torch.nn import functional

from engine.cpu import rows


def silu_and_mul(gate_up_NJ: Tensor) -> Tensor:
    """``silu(gate) * up`` of rows that hold all gate columns, then all up columns: (N, J / 2)."""
    if rows.serves_gate(gate_up_NJ):
        return rows.silu_and_mul(gate_up_NJ)
    gate_NF, up_NF = gate_up_NJ.chunk(2, dim=-1)
    return functional.silu(gate_NF) * up_NF
