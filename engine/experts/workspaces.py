"""The buffers of exchanges of fixed size: allocated once, shared by all layers of a model.

There are as many as exchanges may be under way. Addresses never change, so a captured graph stays
valid. What is in them is unknown here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.experts.buffers import ExchangeShape, buffer_rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workspace:
    """Rows of bytes, as ``engine.experts.buffers.BufferRows`` counts them."""

    sent: Tensor
    arrived: Tensor
    returned: Tensor
    home: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.sent, self.arrived, self.returned, self.home


class Workspaces:
    def __init__(
        self, name: str, shape: ExchangeShape, *, in_flight: int, device: torch.device
    ) -> None:
        """Everything is allocated here, and written once, so that no step does either."""
        rows = buffer_rows(name, shape)

        def zeros(count: int, width: int) -> Tensor:
            return torch.zeros(count, width, dtype=torch.uint8, device=device)

        self._all = tuple(
            Workspace(
                sent=zeros(rows.sent, shape.dispatch_row_bytes),
                arrived=zeros(rows.arrived, shape.dispatch_row_bytes),
                returned=zeros(rows.returned, shape.result_row_bytes),
                home=zeros(rows.home, shape.result_row_bytes),
            )
            for _ in range(in_flight)
        )
        self._free = list(self._all)
        self._life = 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for workspace in self._all for tensor in workspace.tensors)

    def take(self, life: int) -> Workspace:
        """One that no exchange uses. What a group's earlier ``life`` left unfinished is dead."""
        if life != self._life:
            self._life, self._free = life, list(self._all)
        assert self._free, f"more than {len(self._all)} exchanges of expert rows are under way"
        return self._free.pop(0)

    def give_back(self, workspace: Workspace) -> None:
        """Its exchange is over; what it holds is valid until the next one is begun."""
        self._free.append(workspace)
