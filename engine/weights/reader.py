"""How models get their tensors: asked for by name and shape, read when they are built.

A model first asks for all its tensors, which checks names and shapes and counts bytes; only then
is anything read. So a bad checkpoint fails before anything large is allocated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.weights.source import WHOLE, Part, TensorSource
from protocol.errors import ConfigError

Progress = Callable[[int, int], None]  # bytes read, bytes of all tensors asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A tensor, or part of one, that is in the checkpoint and not read yet."""

    reader: "WeightReader"
    name: str
    part: Part
    dtype: torch.dtype
    num_bytes: int

    def read(self) -> Tensor:
        """On the reader's device. On the host it may be the file, mapped: do not write to it."""
        return self.reader.read(self)


class WeightReader:
    """The tensors of one source, as one rank wants them."""

    def __init__(
        self,
        source: TensorSource,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._source = source
        self._progress = progress
        self._bytes_wanted = 0
        self._bytes_read = 0

    def again(self) -> "WeightReader":
        """The same source for another thread, once the model has been read. Tells no progress."""
        return WeightReader(self._source, device=self.device, dtype=self.dtype)

    def want(
        self, name: str, *shape: int, part: Part = WHOLE, dtype: torch.dtype | None = None
    ) -> Wanted:
        """``part`` of tensor ``name``, whose whole shape must be ``shape``; no byte is read.

        It will be in ``dtype``, the model's when None.

        Raises:
            ConfigError: there is no such tensor, or it has another shape.
        """
        found = self._source.shape(name)
        if found is None:
            raise ConfigError(f"{self._source.name}: tensor {name} is missing")
        if found != shape:
            raise ConfigError(
                f"{self._source.name}: tensor {name} has shape {list(found)}, "
                f"the config asks for {list(shape)}"
            )
        dtype = dtype or self.dtype
        num_bytes = math.prod(part.of(shape)) * dtype.itemsize
        self._bytes_wanted += num_bytes
        return Wanted(reader=self, name=name, part=part, dtype=dtype, num_bytes=num_bytes)

    def read(self, wanted: Wanted) -> Tensor:
        tensor = self._source.read(wanted.name, wanted.part).to(self.device, wanted.dtype)
        self._bytes_read += wanted.num_bytes
        if self._progress is not None:
            self._progress(self._bytes_read, self._bytes_wanted)
        return tensor


def read_rows(parts: Sequence[Wanted]) -> Tensor:
    """Matrices of equal width stacked into one, so that one product does the work of all."""
    return torch.cat([part.read() for part in parts])
