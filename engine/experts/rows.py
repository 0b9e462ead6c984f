"""Several tensors of the same tokens side by side in rows of bytes: one exchange carries all.

Each column is aligned for its own dtype; what is between columns is never read.

Shape suffixes: T tokens   B rows   W bytes of a row   C copies
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.experts.buffers import aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    first: int  # bytes
    width: int
    dtype: torch.dtype


def columns_of(payloads: Sequence[Tensor]) -> tuple[Column, ...]:
    """How (T, *) tensors lie in a row, in their order."""
    columns: list[Column] = []
    first = 0
    for payload in payloads:
        width = payload.shape[1] * payload.element_size()
        columns.append(Column(first=first, width=width, dtype=payload.dtype))
        first += aligned(width)
    return tuple(columns)


def row_bytes(columns: Sequence[Column]) -> int:
    return columns[-1].first + aligned(columns[-1].width)


def pack(payloads: Sequence[Tensor], columns: Sequence[Column], *, copies: int) -> Tensor:
    """(copies * T, W) bytes."""
    rows_CTW = torch.empty(
        copies, len(payloads[0]), row_bytes(columns), dtype=torch.uint8, device=payloads[0].device
    )
    write(rows_CTW, payloads, columns)
    return rows_CTW.flatten(0, 1)


def write(rows_CTW: Tensor, payloads: Sequence[Tensor], columns: Sequence[Column]) -> None:
    """Into every copy, in place."""
    for payload, part in zip(payloads, unpack(rows_CTW, columns), strict=True):
        part.copy_(payload)


def unpack(rows_BW: Tensor, columns: Sequence[Column]) -> list[Tensor]:
    """Views of the columns, (B, *) each."""
    return [
        rows_BW[..., column.first : column.first + column.width].view(column.dtype)
        for column in columns
    ]
