"""How many tokens of this rank chose each expert, counted where they are routed.

Only real tokens count: an id of -1 (padding) does not, and an idle rank counts nothing. Every
token counts once, at its own rank, so sums over ranks are sums over tokens. Counting stays on the
device; the host sees a window's counts when it takes them, all layers at once.

Shape suffixes: L layers   E experts   C counters of a layer   T tokens   K chosen experts
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class ExpertCounts:
    def __init__(self, layers: Sequence[int], num_experts: int, *, device: torch.device) -> None:
        """``layers`` are the model's layers that have experts, ascending."""
        self.layers = tuple(layers)
        # One more in front takes the ids that are not routed, so that nothing is selected.
        self._counts_LC = torch.zeros(
            len(self.layers), num_experts + 1, dtype=torch.int64, device=device
        )
        self._row_of = dict(zip(self.layers, self._counts_LC.unbind(), strict=True))
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def add(self, layer: int, ids_TK: Tensor) -> None:
        """Count the choices of one layer, without waiting for the device."""
        chosen = ids_TK.flatten() + 1
        self._row_of[layer].scatter_add_(0, chosen, self._one.expand(chosen.shape[0]))

    def take(self) -> tuple[tuple[int, ...], ...]:
        """Counts by layer and expert since the last call. Waits for the device."""
        counts = self._counts_LC[:, 1:].tolist()  # host sync
        self._counts_LC.zero_()
        return tuple(map(tuple, counts))
