"""Where a model's tensors come from: named arrays in files, read one at a time and in part.

Names are Hugging Face's, whatever the file calls them. Opening a source reads headers only.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a matrix; None takes all rows or all columns."""

    rows: slice | None = None
    columns: slice | None = None

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of an array of ``shape``."""
        taken = [self.rows, self.columns][: len(shape)]
        sizes = [
            size if span is None else len(range(size)[span])
            for size, span in zip(shape, taken, strict=False)
        ]
        return (*sizes, *shape[len(taken) :])


WHOLE = Part()


class TensorSource(Protocol):
    """One checkpoint. All methods raise ``ConfigError`` naming the file and the tensor."""

    @property
    def name(self) -> str:
        """The file or folder, for messages."""
        ...

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """The whole array's shape, or None when there is no such tensor."""
        ...

    def read(self, tensor: str, part: Part = WHOLE) -> Tensor:
        """On the host, in the file's precision or float32; may share memory with the file."""
        ...

    def digest(self) -> str:
        """Of all headers and sizes and a sample of the bytes: equal on every rank."""
        ...

    def close(self) -> None: ...
