"""How models take their tensors: by name and shape, checked first, then converted to the device.

A reader on the ``meta`` device checks names and shapes and counts bytes without reading any: a
load goes over the model twice, first so, and so fails before anything large is allocated.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.weights.source import WHOLE, Part, TensorSource
from protocol.errors import ConfigError

OnBytes = Callable[[int], None]  # bytes that the tensor just taken has on the device


class WeightReader:
    def __init__(
        self,
        source: TensorSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: OnBytes,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._source = source
        self._on_bytes = on_bytes

    def take(
        self, name: str, *shape: int, part: Part = WHOLE, dtype: torch.dtype | None = None
    ) -> Tensor:
        """``part`` of tensor ``name``, whose whole shape must be ``shape``.

        The result is in ``dtype``, the model's when None, on the reader's device; on the host it
        may be the file itself, mapped, and must not be written to.

        Raises:
            ConfigError: there is no such tensor, or it has another shape.
        """
        self._check(name, shape)
        wanted = dtype or self.dtype
        if self.device.type == "meta":
            taken = torch.empty(part.of(shape), dtype=wanted, device=self.device)
        else:
            taken = self._source.read(name, part).to(self.device, wanted)
        self._on_bytes(taken.nbytes)
        return taken

    def take_rows(self, names: Sequence[str], rows: Sequence[int], columns: int) -> Tensor:
        """Matrices of equal width stacked into one, so that one product does the work of all."""
        parts = [self.take(name, count, columns) for name, count in zip(names, rows, strict=True)]
        return torch.cat(parts)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._source.shape(name)
        if found is None:
            raise ConfigError(f"{self._source.name}: tensor {name} is missing")
        if found != shape:
            raise ConfigError(
                f"{self._source.name}: tensor {name} has shape {list(found)}, "
                f"the config asks for {list(shape)}"
            )
